/* A front lies between a client and the pump: it owns the socket, and turns what arrives into accesses of regions,
 * ranges of memory and triggers of interrupts. The pump has one of its own (own.c). Another one is in another extension
 * module, which cannot link to this one: it hands the pump a vpci_front, and calls the core through vpci_core.
 * Every function of both tables runs on the pump's thread, unless it says otherwise. */

typedef struct vpci_front {
    uint32_t abi;
    /* An fd in the pump's epoll set has something. Returns 0 when it is none of this front's. */
    int (*event)(void *state, int fd, uint32_t events);
    /* Execute what has arrived, in order, as long as may_execute says so. */
    void (*execute)(void *state);
    /* Send what was answered. */
    void (*send)(void *state);
    /* The turn ends: close what is to be closed, and ask epoll for what is of interest now. */
    void (*settle)(void *state);
    /* The answer to the request in execution: an errno, or 0 and the payload of a reply in two parts. */
    void (*reply)(void *state, uint32_t error, const void *a, size_t a_len, const void *b, size_t b_len);
    /* Give the connection up now; what is under way is not answered. */
    void (*drop)(void *state);
    /* What quiesce asked for: that work is not in flight any more. */
    void (*at_rest)(void *state);
    /* NULL: the core has the client's eventfds. Else signal vector's, or INTx's with 0; returns -1 when the client has
     * armed none. Only from the thread that has the queue. */
    int (*trigger)(void *state, uint32_t vector);
} vpci_front;

typedef struct vpci_core {
    uint32_t abi;
    /* Add an fd to the epoll set, change what is asked for (EPOLLIN and so on), or take it out (0). */
    void (*watch)(vpci_dev *dev, int fd, uint32_t events);
    /* A turn, soon. From any thread. */
    void (*wake)(vpci_dev *dev);
    /* Nothing is under way that the next message would have to wait for. */
    int (*may_execute)(vpci_dev *dev);
    /* A client came; another one came and was sent away; the client is gone, and its life is to end. */
    void (*connected)(vpci_dev *dev, int fd);
    void (*turned_away)(vpci_dev *dev, int fd);
    void (*disconnected)(vpci_dev *dev);
    /* A message was refused, and why. From any thread. */
    void (*refused)(vpci_dev *dev, uint32_t command, const char *why);
    /* An access of a region, and DEVICE_RESET. reply() is called before they return, unless the connection was given up
     * meanwhile; rings go on. data: what is written, NULL for a read. */
    void (*access)(vpci_dev *dev, uint32_t region, uint64_t offset, uint32_t count, const void *data);
    void (*reset)(vpci_dev *dev);
    /* Memory that the front has mapped at hva, NULL when only messages reach it; perm: enum vpci_mem_perm.
     * Before an unmap the device is at rest. Return 0 or -errno. */
    int (*map)(vpci_dev *dev, uint64_t gpa, uint64_t size, void *hva, uint32_t perm);
    int (*unmap)(vpci_dev *dev, uint64_t gpa, uint64_t size);
    /* Bring work to its end: that on a range and on rings in it; with size 0 all of it; to drop all of it leaves no trace
     * of it. Returns 1 when it has ended; after 0 at_rest tells it. */
    int (*quiesce)(vpci_dev *dev, int drop, uint64_t gpa, uint64_t size);
    /* SET_IRQS masked or unmasked [start, start + count) of an index (enum vfu_irq_index). */
    void (*mask)(vpci_dev *dev, uint32_t index, uint32_t start, uint32_t count, int masked);
    /* The client may have armed something: what is pending is triggered. */
    void (*armed)(vpci_dev *dev);
} vpci_core;

enum vpci_front_abi { VPCI_FRONT_ABI = 1 };

const vpci_core *vpci_core_table(void);
/* Start the pump with another front; it and its state stay the caller's. Far memory is refused. Returns 0 or -errno. */
int vpci_dev_start_front(vpci_dev *dev, const vpci_front *front, void *state);
