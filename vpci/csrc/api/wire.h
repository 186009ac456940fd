/* vfio-user messages as they travel: written once, read by the C compiler and by cffi.
 * Little endian, every field at its natural alignment, so the structs need no packing.
 * Source: [vfio-user] (the protocol document) and [linux vfio.h] for what it borrows. */

struct vfu_header {
    uint16_t id;
    uint16_t command;
    uint32_t size;   /* bytes, this header included */
    uint32_t flags;
    uint32_t error;  /* an errno when VFU_F_ERROR is set */
};

struct vfu_version {
    uint16_t major;
    uint16_t minor;
    /* JSON text and a NUL follow */
};

struct vfu_device_info {
    uint32_t argsz;
    uint32_t flags;
    uint32_t num_regions;
    uint32_t num_irqs;
};

struct vfu_region_info {
    uint32_t argsz;
    uint32_t flags;
    uint32_t index;
    uint32_t cap_offset;
    uint64_t size;
    uint64_t offset;
};

struct vfu_region_io_fds {
    uint32_t argsz;
    uint32_t flags;
    uint32_t index;
    uint32_t count;
    /* in a reply, count times struct vfu_ioeventfd follow */
};

struct vfu_ioeventfd {
    uint64_t offset;
    uint64_t size;
    uint32_t fd_index;
    uint32_t type;
    uint32_t flags;
    uint32_t shadow_mem_fd_index;
    uint64_t shadow_offset;
    uint64_t datamatch;
};

struct vfu_irq_info {
    uint32_t argsz;
    uint32_t flags;
    uint32_t index;
    uint32_t count;
};

struct vfu_irq_set {
    uint32_t argsz;
    uint32_t flags;
    uint32_t index;
    uint32_t start;
    uint32_t count;
    /* VFU_IRQ_DATA_BOOL: count bytes follow */
};

struct vfu_region_access {
    uint64_t offset;
    uint32_t region;
    uint32_t count;
    /* data of count bytes: in a write and in the reply to a read */
};

struct vfu_write_multi {
    uint64_t count;
    /* count times struct vfu_one_write follow */
};

struct vfu_one_write {
    uint64_t offset;
    uint32_t region;
    uint32_t count;   /* of the bytes of data that count, 8 at most */
    uint64_t data;
};

struct vfu_dma_map {
    uint32_t argsz;
    uint32_t flags;
    uint64_t offset;  /* in the file that comes along */
    uint64_t addr;
    uint64_t size;
};

struct vfu_dma_unmap {
    uint32_t argsz;
    uint32_t flags;
    uint64_t addr;
    uint64_t size;
};

struct vfu_dma_access {
    uint64_t addr;
    uint64_t count;
    /* data of count bytes: in a write and in the reply to a read */
};

enum vfu_command {
    VFU_VERSION = 1,
    VFU_DMA_MAP = 2,
    VFU_DMA_UNMAP = 3,
    VFU_DEVICE_GET_INFO = 4,
    VFU_DEVICE_GET_REGION_INFO = 5,
    VFU_DEVICE_GET_REGION_IO_FDS = 6,
    VFU_DEVICE_GET_IRQ_INFO = 7,
    VFU_DEVICE_SET_IRQS = 8,
    VFU_REGION_READ = 9,
    VFU_REGION_WRITE = 10,
    VFU_DMA_READ = 11,
    VFU_DMA_WRITE = 12,
    VFU_DEVICE_RESET = 13,
    VFU_REGION_WRITE_MULTI = 15,
    VFU_DEVICE_FEATURE = 16,
    VFU_MIG_DATA_READ = 17,
    VFU_MIG_DATA_WRITE = 18
};

enum vfu_header_flag {
    VFU_F_TYPE_MASK = 0xf,
    VFU_F_REPLY = 0x1,
    VFU_F_NO_REPLY = 0x10,
    VFU_F_ERROR = 0x20
};

enum vfu_device_flag { VFU_DEVICE_RESETS = 1, VFU_DEVICE_PCI = 2 };

enum vfu_region_flag { VFU_REGION_READABLE = 1, VFU_REGION_WRITABLE = 2 };

enum vfu_dma_flag {
    VFU_DMA_READABLE = 1,
    VFU_DMA_WRITABLE = 2,
    VFU_DMA_MAP_FLAGS = 0xf   /* with the hints that the protocol once had: mmap, file I/O */
};

enum vfu_dma_unmap_flag { VFU_DMA_UNMAP_DIRTY = 1, VFU_DMA_UNMAP_ALL = 2 };

enum vfu_irq_info_flag {
    VFU_IRQ_EVENTFD = 1,
    VFU_IRQ_MASKABLE = 2,
    VFU_IRQ_AUTOMASKED = 4,
    VFU_IRQ_NORESIZE = 8
};

enum vfu_irq_set_flag {
    VFU_IRQ_DATA_NONE = 0x1,
    VFU_IRQ_DATA_BOOL = 0x2,
    VFU_IRQ_DATA_EVENTFD = 0x4,
    VFU_IRQ_ACTION_MASK = 0x8,
    VFU_IRQ_ACTION_UNMASK = 0x10,
    VFU_IRQ_ACTION_TRIGGER = 0x20
};

enum vfu_irq_index {
    VFU_IRQ_INTX = 0,
    VFU_IRQ_MSI = 1,
    VFU_IRQ_MSIX = 2,
    VFU_IRQ_ERR = 3,
    VFU_IRQ_REQ = 4,
    VFU_IRQ_INDICES = 5
};

enum vfu_region_index {
    VFU_REGION_BAR0 = 0,
    VFU_REGION_BAR1 = 1,
    VFU_REGION_ROM = 6,
    VFU_REGION_CONFIG = 7,
    VFU_REGION_VGA = 8,
    VFU_REGION_INDICES = 9
};

enum vfu_ioeventfd_flag { VFU_IOEVENTFD_DATAMATCH = 1 };

enum vfu_limit {
    VFU_MAX_FDS = 16,            /* fds in one message that we take; QEMU refuses to hear of more */
    VFU_MAX_DATA = 1048576,      /* payload data bytes in one message */
    VFU_MAX_MESSAGE = 1048832,   /* VFU_MAX_DATA and any fixed part */
    VFU_MAX_BAR0 = 4096          /* bytes of the largest header that we serve */
};
