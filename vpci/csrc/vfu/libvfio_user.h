/* What vpci._vfu takes from libvfio-user, for cffi alone: C includes the library's own header, and the compiler holds
 * these lines against it. Values and layouts written as "..." are that header's. */

typedef ... vfu_ctx_t;
typedef ... dma_sg_t;
typedef ... vfu_pci_config_space_t;
typedef void *vfu_dma_addr_t;

#define LIB_VFIO_USER_MAJOR ...
#define LIB_VFIO_USER_MINOR ...
#define LIBVFIO_USER_FLAG_ATTACH_NB ...
#define LIBVFIO_USER_MAX_DMA_REGIONS ...

typedef enum { VFU_TRANS_SOCK, VFU_TRANS_PIPE, ... } vfu_trans_t;
typedef enum { VFU_DEV_TYPE_PCI, ... } vfu_dev_type_t;

/* ---- context ---- */

vfu_ctx_t *vfu_create_ctx(vfu_trans_t trans, const char *path, int flags, void *pvt, vfu_dev_type_t dev_type);
int vfu_realize_ctx(vfu_ctx_t *ctx);
int vfu_attach_ctx(vfu_ctx_t *ctx);
int vfu_get_poll_fd(vfu_ctx_t *ctx);
int vfu_run_ctx(vfu_ctx_t *ctx);
void vfu_destroy_ctx(vfu_ctx_t *ctx);
void *vfu_get_private(vfu_ctx_t *ctx);

typedef ... vfu_log_fn_t;
int vfu_setup_log(vfu_ctx_t *ctx, vfu_log_fn_t *log, int level);
void vfu_log(vfu_ctx_t *ctx, int level, const char *fmt, ...);

/* ---- PCI ---- */

typedef enum {
    VFU_PCI_TYPE_CONVENTIONAL, VFU_PCI_TYPE_PCI_X_1, VFU_PCI_TYPE_PCI_X_2, VFU_PCI_TYPE_EXPRESS, ...
} vfu_pci_type_t;

#define PCI_HEADER_TYPE_NORMAL ...
#define VFU_CAP_FLAG_EXTENDED ...
#define VFU_CAP_FLAG_CALLBACK ...
#define VFU_CAP_FLAG_READONLY ...

/* Only their sizes are used: the library copies that many bytes of a capability. */
struct pmcap { ...; };
struct msicap { ...; };
struct msixcap { ...; };
struct pxcap { ...; };
struct dsncap { ...; };

int vfu_pci_init(vfu_ctx_t *ctx, vfu_pci_type_t pci_type, int hdr_type, int revision);
void vfu_pci_set_id(vfu_ctx_t *ctx, uint16_t vid, uint16_t did, uint16_t ssvid, uint16_t ssid);
void vfu_pci_set_class(vfu_ctx_t *ctx, uint8_t base, uint8_t sub, uint8_t pi);
vfu_pci_config_space_t *vfu_pci_get_config_space(vfu_ctx_t *ctx);
ssize_t vfu_pci_add_capability(vfu_ctx_t *ctx, size_t pos, int flags, void *data);
size_t vfu_pci_find_capability(vfu_ctx_t *ctx, bool extended, int cap_id);
size_t vfu_pci_find_next_capability(vfu_ctx_t *ctx, bool extended, size_t pos, int cap_id);

/* ---- regions ---- */

enum {
    VFU_PCI_DEV_BAR0_REGION_IDX, VFU_PCI_DEV_BAR1_REGION_IDX, VFU_PCI_DEV_BAR2_REGION_IDX,
    VFU_PCI_DEV_BAR3_REGION_IDX, VFU_PCI_DEV_BAR4_REGION_IDX, VFU_PCI_DEV_BAR5_REGION_IDX,
    VFU_PCI_DEV_ROM_REGION_IDX, VFU_PCI_DEV_CFG_REGION_IDX, VFU_PCI_DEV_VGA_REGION_IDX, VFU_PCI_DEV_NUM_REGIONS, ...
};

#define VFU_REGION_FLAG_READ ...
#define VFU_REGION_FLAG_WRITE ...
#define VFU_REGION_FLAG_RW ...
#define VFU_REGION_FLAG_MEM ...
#define VFU_REGION_FLAG_ALWAYS_CB ...
#define VFU_REGION_FLAG_64_BITS ...
#define VFU_REGION_FLAG_PREFETCH ...

struct iovec { void *iov_base; size_t iov_len; ...; };

typedef ... vfu_region_access_cb_t;
int vfu_setup_region(vfu_ctx_t *ctx, int region_idx, size_t size, vfu_region_access_cb_t *region_access, int flags,
                     struct iovec *mmap_areas, uint32_t nr_mmap_areas, int fd, uint64_t offset);
int vfu_create_ioeventfd(vfu_ctx_t *ctx, uint32_t region_idx, int fd, size_t gpa_offset, uint32_t size,
                         uint32_t flags, uint64_t datamatch, int shadow_fd, size_t shadow_offset);

/* ---- interrupts ---- */

enum vfu_dev_irq_type {
    VFU_DEV_INTX_IRQ, VFU_DEV_MSI_IRQ, VFU_DEV_MSIX_IRQ, VFU_DEV_ERR_IRQ, VFU_DEV_REQ_IRQ, VFU_DEV_NUM_IRQS, ...
};

typedef ... vfu_dev_irq_state_cb_t;
int vfu_setup_device_nr_irqs(vfu_ctx_t *ctx, enum vfu_dev_irq_type type, uint32_t count);
int vfu_setup_irq_state_callback(vfu_ctx_t *ctx, enum vfu_dev_irq_type type, vfu_dev_irq_state_cb_t *cb);
int vfu_irq_trigger(vfu_ctx_t *ctx, uint32_t subindex);

/* ---- reset and quiesce ---- */

typedef enum vfu_reset_type { VFU_RESET_DEVICE, VFU_RESET_LOST_CONN, VFU_RESET_PCI_FLR, ... } vfu_reset_type_t;

typedef ... vfu_reset_cb_t;
typedef ... vfu_device_quiesce_cb_t;
int vfu_setup_device_reset_cb(vfu_ctx_t *ctx, vfu_reset_cb_t *reset);
void vfu_setup_device_quiesce_cb(vfu_ctx_t *ctx, vfu_device_quiesce_cb_t *quiesce);
int vfu_device_quiesced(vfu_ctx_t *ctx, int quiesce_errno);

/* ---- guest memory ---- */

typedef struct vfu_dma_info {
    struct iovec iova;
    void *vaddr;
    struct iovec mapping;
    size_t page_size;
    uint32_t prot;
    ...;
} vfu_dma_info_t;

#define VFU_SGL_DIRECT_ACCESS ...

typedef ... vfu_dma_register_cb_t;
typedef ... vfu_dma_unregister_cb_t;
int vfu_setup_device_dma(vfu_ctx_t *ctx, size_t max_regions, vfu_dma_register_cb_t *dma_register,
                         vfu_dma_unregister_cb_t *dma_unregister);
size_t dma_sg_size(void);
int vfu_addr_to_sgl(vfu_ctx_t *ctx, vfu_dma_addr_t dma_addr, size_t len, dma_sg_t *sgl, size_t max_nr_sgs, int prot);
int vfu_sgl_get(vfu_ctx_t *ctx, dma_sg_t *sgl, struct iovec *iov, size_t cnt, int flags);
void vfu_sgl_mark_dirty(vfu_ctx_t *ctx, dma_sg_t *sgl, size_t cnt);
void vfu_sgl_put(vfu_ctx_t *ctx, dma_sg_t *sgl, struct iovec *iov, size_t cnt);
int vfu_sgl_read(vfu_ctx_t *ctx, dma_sg_t *sg, size_t sg_cnt, void *data, int flags);
int vfu_sgl_write(vfu_ctx_t *ctx, dma_sg_t *sg, size_t sg_cnt, void *data, int flags);
bool vfu_sg_is_mappable(vfu_ctx_t *ctx, dma_sg_t *sg);

/* ---- migration ---- */

typedef enum {
    VFU_MIGR_STATE_STOP, VFU_MIGR_STATE_RUNNING, VFU_MIGR_STATE_STOP_AND_COPY, VFU_MIGR_STATE_PRE_COPY,
    VFU_MIGR_STATE_RESUME, ...
} vfu_migr_state_t;

#define VFU_MIGR_CALLBACKS_VERS ...

typedef ... vfu_migration_callbacks_t;
int vfu_setup_device_migration_callbacks(vfu_ctx_t *ctx, const vfu_migration_callbacks_t *callbacks);
