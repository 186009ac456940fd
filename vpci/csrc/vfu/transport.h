/* libvfio-user as the front of a device (api/front.h), for vpci/vfu/libvfio_user.py. */

typedef struct vpci_transport vpci_transport;

typedef struct vpci_transport_setup {
    uint64_t region_sizes[9];  /* by libvfio-user's region index; 0: not there */
    uint32_t io_regions;       /* bit n: region n is in I/O space */
    uint32_t irq_counts[5];    /* enum vfu_dev_irq_type */
    uint32_t max_ranges;       /* of guest memory */
} vpci_transport_setup;

/* Listen at path, which must be free. core: vpci_core_table() of vpci._core. NULL: *error is an errno. */
vpci_transport *vpci_transport_new(const char *path, const vpci_transport_setup *setup, const void *core, int *error);
/* A vpci_front, to be started with the transport as its state. */
const void *vpci_transport_front(void);
/* The device that it is the front of; before the start. */
void vpci_transport_bind(vpci_transport *transport, void *dev);
/* After the pump has ended and while the device lives: the client's connection ends and the path goes. */
void vpci_transport_free(vpci_transport *transport);
