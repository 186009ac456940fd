/* The split virtqueue, device side: pop chains, push used entries, decide about events.
 * Sources: [legacy-header 4, 5, 6]; the rules' names are in docs/rings.md. */

typedef struct vpci_queue vpci_queue;

/* What G means for a ring ([legacy-header 3]); Python computes the mask from the dialect. */
enum vpci_ring_rule {
    VPCI_RING_INDIRECT = 1,        /* descriptors with flag 4 are tables */
    VPCI_RING_USED_EVENT = 2,      /* interrupts by used_event, avail.flags ignored */
    VPCI_RING_AVAIL_EVENT = 4,     /* avail_event is stored when the device goes idle */
    VPCI_RING_USED_FLAGS = 8,      /* a guest that reads used.flags is possible */
    VPCI_RING_NOTIFY_ON_EMPTY = 16 /* bit 24 */
};

/* Why a ring cannot be trusted ([legacy-header 8]). */
enum vpci_ring_error {
    VPCI_RING_OK = 0,
    VPCI_RING_AVAIL_JUMP,
    VPCI_RING_HEAD,
    VPCI_RING_NEXT,
    VPCI_RING_LOOP,            /* longer than the table it lives in */
    VPCI_RING_MAX_SG,          /* longer than the configured max_sg */
    VPCI_RING_INDIRECT_NOT_ACKED,
    VPCI_RING_INDIRECT_NESTED,
    VPCI_RING_INDIRECT_NEXT,
    VPCI_RING_TABLE_LENGTH,
    VPCI_RING_TABLE_UNMAPPED,
    VPCI_RING_UNMAPPED,
    VPCI_RING_VANISHED,        /* a file of guest memory has shrunk */
    VPCI_RING_FAR_MEMORY,      /* memory that only messages reach, and the front cannot send them */
    VPCI_RING_ERRORS
};

/* Why one chain's content is wrong although the ring is sound. */
enum vpci_chain_error {
    VPCI_CHAIN_OK = 0,
    VPCI_CHAIN_UNMAPPED,      /* a buffer outside mapped memory, or without the needed right */
    VPCI_CHAIN_WRAP,          /* addr + len passes 2^64 */
    VPCI_CHAIN_ORDER,         /* readable after writable */
    VPCI_CHAIN_TOO_LONG,      /* lengths add up to more than 2^32 - 1 */
    VPCI_CHAIN_ERRORS
};

/* One popped chain. Owned by whoever serves it until vpci_chain_done or vpci_ring_push. */
typedef struct vpci_chain {
    vpci_queue *queue;
    struct iovec *iov;      /* out_iovs readable pieces, then in_iovs writable ones */
    uint32_t out_iovs;
    uint32_t in_iovs;
    uint32_t out_len;       /* bytes the device may read */
    uint32_t in_len;        /* bytes the device may write */
    uint16_t queue_index;
    uint16_t head;
    uint16_t error;         /* enum vpci_chain_error; the pieces are then not to be used */
    uint16_t last_in_set;   /* vpci_chain_set_last was called */
    uint8_t *last_in;       /* the last writable byte if there is one in memory, else NULL */
    uint32_t used_len;      /* what vpci_chain_done was told */
    struct vpci_chain *next;/* for the lists of whoever holds it */
    uint64_t scratch[10];    /* the engine's own while it holds the chain */
} vpci_chain;

/* What a queue has seen, in the specification's words. */
typedef struct vpci_queue_stats {
    uint64_t kicks;
    uint64_t chains;
    uint64_t used;
    uint64_t interrupts;
    uint64_t suppressed;
    uint64_t request_errors;
    uint64_t zero_len;
    uint64_t ring_errors;
    uint64_t ignored_kicks;  /* for a stopped queue */
    uint32_t in_flight;
    uint32_t broken;         /* enum vpci_ring_error, 0 = sound */
    uint16_t broken_head;
    uint16_t last_avail;
    uint16_t used_idx;
    uint16_t started;
    uint64_t broken_addr;
    uint16_t suspended;
    uint16_t avail_idx;      /* as it is; as last read while the ring is far or not at work */
    uint16_t published;      /* used.idx as the driver can see it */
    uint16_t driver_event;   /* used_event or, without that rule, avail.flags, likewise */
    uint16_t no_notify;      /* used.flags asks for no kicks */
    uint16_t remote;         /* the ring or a chain is in memory that only the client reaches */
    uint32_t rules;
} vpci_queue_stats;

/* size: a power of two 1..32768, max_sg: longest chain accepted, in descriptors. NULL when memory is short
 * or the size is not legal. */
vpci_queue *vpci_queue_new(vpci_mem *mem, uint32_t size, uint32_t max_sg);
void vpci_queue_free(vpci_queue *q);

/* (Re)start at a page frame: indices 0, sound. Stop: no fetch until the next start. */
void vpci_queue_start(vpci_queue *q, uint32_t pfn);
void vpci_queue_stop(vpci_queue *q);
void vpci_queue_rules(vpci_queue *q, uint32_t rules);

/* Look the ring's pages up again after the memory table changed. Returns 1 when the ring is whole. */
int vpci_queue_remap(vpci_queue *q);
void vpci_queue_read_stats(const vpci_queue *q, vpci_queue_stats *stats);

/* The next chain, or NULL: nothing there, the queue is stopped, suspended or broken (see stats), or as many
 * chains are in flight as the ring has slots. */
vpci_chain *vpci_ring_pop(vpci_queue *q);
/* Undo the last pop: its chain is the next to be popped again. Only in the reverse order of popping. */
void vpci_ring_unpop(vpci_queue *q, vpci_chain *chain);
/* Write the used entry of a chain, and free it; not visible before publish, and never once the ring is broken.
 * Only for a started queue that is not suspended. Returns 0 when it was given up and the chain is still the caller's
 * (far memory only), else 1. */
int vpci_ring_push(vpci_queue *q, vpci_chain *chain, uint32_t len);
/* Give a chain back without a used entry (the queue was stopped). */
void vpci_ring_drop(vpci_queue *q, vpci_chain *chain);
/* Make pushed entries visible. Returns 1 when the driver wants an interrupt for them. */
int vpci_ring_publish(vpci_queue *q);
/* Ask for no kicks while the device is certain to look again by itself. */
void vpci_ring_busy(vpci_queue *q);
/* Ask for kicks and look once more. Returns 1 when there is something to fetch after all. */
int vpci_ring_idle(vpci_queue *q);

/* The same when chains that were put back are too few: only for those that come after them. */
int vpci_ring_starve(vpci_queue *q);

/* need_event of the specification, for tests. */
int vpci_need_event(uint16_t event, uint16_t new_idx, uint16_t old_idx);

/* Copies between a chain and a buffer by byte position; return the bytes copied. */
uint32_t vpci_chain_read(const vpci_chain *chain, uint32_t off, void *buf, uint32_t len);
uint32_t vpci_chain_write(const vpci_chain *chain, uint32_t off, const void *buf, uint32_t len);
/* Set the last writable byte, also of a chain with an error; nothing when it is not in memory. */
void vpci_chain_set_last(vpci_chain *chain, uint8_t value);
