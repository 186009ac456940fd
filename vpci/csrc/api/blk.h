/* The block engine: requests parsed and served in C on a disk's backend (disk.h). Source: [devices.md 3]. */

typedef struct vpci_blk vpci_blk;

typedef struct vpci_blk_stats {
    uint64_t reads, writes, flushes, ids, discards, write_zeroes, secure_erases;
    uint64_t bytes_read, bytes_written;
    uint64_t errors;          /* requests answered IOERR */
    uint64_t unsupported;     /* requests answered UNSUPP */
    uint64_t served_inline;   /* requests that did not have to wait for anything */
    uint64_t backend_errors;  /* calls of the backend that failed */
    uint64_t durability_lost; /* 1: a flush failed, and nothing is called durable until a reopen */
} vpci_blk_stats;

/* What a request of segments may ask for; a segment is { u64 sector, u32 num_sectors, u32 flags }. */
typedef struct vpci_blk_limits {
    uint32_t max_sectors;     /* of one segment */
    uint32_t max_seg;         /* segments of one request */
} vpci_blk_limits;

typedef struct vpci_blk_setup {
    const vpci_disk_ops *ops;
    void *disk;               /* stays the caller's, and outlives the engine */
    uint32_t align;           /* bytes: what offsets, lengths and memory handed to the backend are multiples of */
    uint32_t private_memory;  /* the backend touches the bytes itself: it never gets guest memory, which may vanish */
    uint64_t sectors;         /* of 512 bytes */
    uint64_t features;        /* as offered: they say which types of requests there are */
    const char *serial;       /* up to 20 bytes, NUL padded */
    uint32_t read_only;
    uint32_t writeback;       /* the config field, at first */
    uint32_t may_unmap;       /* zeroes that the driver lets go are holes */
    uint32_t n_queues, n_threads;
    vpci_blk_limits discard, write_zeroes, secure_erase;
} vpci_blk_setup;

/* NULL when memory or threads are short. Free it when no chain is in flight. */
vpci_blk *vpci_blk_new(const vpci_blk_setup *setup);
void vpci_blk_free(vpci_blk *blk);
const vpci_engine *vpci_blk_engine(void);
/* The config field writeback; 0 makes every write write-through. */
void vpci_blk_set_writeback(vpci_blk *blk, int writeback);
/* Hold every request back once those that the backend has are done. Returns 0, or -ETIMEDOUT: they are not, and nothing is held.
 * The same thread resumes. Between the two the backend's state may be changed. */
int vpci_blk_pause(vpci_blk *blk, int timeout_ms);
void vpci_blk_resume(vpci_blk *blk);
/* While paused: the disk's size. */
void vpci_blk_set_sectors(vpci_blk *blk, uint64_t sectors);
/* While paused: the backend was opened anew. What it wrote before it failed is the caller's to judge. */
void vpci_blk_reopened(vpci_blk *blk, const vpci_disk_ops *ops, void *disk, uint32_t align);
void vpci_blk_read_stats(vpci_blk *blk, vpci_blk_stats *stats);
/* Feature bits that change how requests are served. */
enum vpci_blk_feature {
    VPCI_BLK_F_FLUSH = 9, VPCI_BLK_F_DISCARD = 13, VPCI_BLK_F_WRITE_ZEROES = 14, VPCI_BLK_F_SECURE_ERASE = 16
};
