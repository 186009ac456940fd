/* Where a disk's bytes are: a backend is a table of operations and a state. The block engine calls it from several
 * threads at once, and for whole sectors of 512 bytes inside the disk only. Backends of another extension module, or
 * made of Python callbacks, need nothing but this table. */

enum vpci_disk_abi { VPCI_DISK_ABI = 1 };

enum vpci_disk_flag {
    VPCI_DISK_NOW = 1,      /* on the pump's thread: -EAGAIN rather than wait for anything */
    VPCI_DISK_DURABLE = 2,  /* a write: on stable storage when it returns */
    VPCI_DISK_UNMAP = 4     /* zeroes: the space may be given back */
};

/* All but reads and writes return 0 or -errno, and may block. discard and zero may be NULL, or say -EOPNOTSUPP: a
 * discard is a hint, and zeroes are then written. */
typedef struct vpci_disk_ops {
    uint32_t abi;
    /* Move bytes between the pieces and the disk at offset. Return how many, which may be fewer, or -errno. 0 means that
     * the disk has no bytes there. */
    int64_t (*read)(void *disk, const struct iovec *iov, uint32_t n_iov, uint64_t offset, uint32_t flags);
    int64_t (*write)(void *disk, const struct iovec *iov, uint32_t n_iov, uint64_t offset, uint32_t flags);
    /* What was completed before is on stable storage when it returns. */
    int (*flush)(void *disk);
    /* The bytes are not needed any more. */
    int (*discard)(void *disk, uint64_t offset, uint64_t len, uint32_t flags);
    /* The bytes read as zero. */
    int (*zero)(void *disk, uint64_t offset, uint64_t len, uint32_t flags);
} vpci_disk_ops;

/* A file or a block device. Offsets go to the descriptor as they are. now: enum vpci_disk_now. */
enum vpci_disk_now {
    VPCI_NOW_NEVER = 0,     /* reads may wait for a device, and it cannot be said which */
    VPCI_NOW_CACHED = 1,    /* reads that the page cache has do not wait */
    VPCI_NOW_ALWAYS = 2     /* nothing ever waits: memory */
};

typedef struct vpci_file {
    int fd;                 /* the caller's; -1: it is closed, and everything fails */
    uint32_t now;
    uint32_t is_block;      /* a block device */
} vpci_file;

const vpci_disk_ops *vpci_file_disk(void);
/* Reads zeroes, forgets writes; its state is a vpci_file on /dev/zero. */
const vpci_disk_ops *vpci_null_disk(void);

/* An NBD server, through libnbd, which is loaded when it is asked for. */
typedef struct vpci_nbd vpci_nbd;

typedef struct vpci_nbd_info {
    int64_t size_bytes;
    uint32_t read_only, can_flush, can_fua, can_trim, can_zero, multi_conn;
    uint32_t minimum_block, preferred_block;   /* bytes, 0: the server does not say */
} vpci_nbd_info;

/* Connect, n_lanes times if the server takes several; library is a path or a name for dlopen. On failure NULL, with a
 * sentence in error (of error_len bytes). Blocks, for timeout_ms at most but for the look-up of a host's name. */
vpci_nbd *vpci_nbd_open(const char *library, const char *uri, uint32_t n_lanes, int timeout_ms, vpci_nbd_info *info,
                        char *error, uint32_t error_len);
/* Calls that wait for the server fail now, and so does every later one. From any thread. */
void vpci_nbd_interrupt(vpci_nbd *nbd);
/* No call is under way. */
void vpci_nbd_close(vpci_nbd *nbd);
const vpci_disk_ops *vpci_nbd_disk(void);
