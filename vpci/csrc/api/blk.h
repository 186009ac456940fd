/* The block engine: requests parsed and served in C on a file descriptor. Source: [devices.md 3]. */

typedef struct vpci_blk vpci_blk;

typedef struct vpci_blk_stats {
    uint64_t reads, writes, flushes, ids;
    uint64_t bytes_read, bytes_written;
    uint64_t errors;        /* requests answered IOERR */
    uint64_t unsupported;   /* requests answered UNSUPP */
    uint64_t served_inline; /* reads that the page cache had */
} vpci_blk_stats;

/* fd: stays the caller's and must outlive the engine. sectors: of 512 bytes. serial: up to 20 bytes, NUL padded.
 * NULL when memory or threads are short. Free it when no chain is in flight. */
vpci_blk *vpci_blk_new(int fd, uint64_t sectors, int read_only, const char *serial, uint32_t n_queues,
                       uint32_t n_threads);
void vpci_blk_free(vpci_blk *blk);
const vpci_engine *vpci_blk_engine(void);
/* The config field writeback; 0 makes every write write-through. */
void vpci_blk_set_writeback(vpci_blk *blk, int writeback);
void vpci_blk_read_stats(vpci_blk *blk, vpci_blk_stats *stats);
/* The feature bit that changes how requests are served. */
enum vpci_blk_feature { VPCI_BLK_F_FLUSH = 9 };
