/* The load generator: a driver's half of one split virtqueue, which keeps requests in flight. vpci/driver/load.py makes
 * it. It shares no code with the device's half, for a mistake that both made would prove nothing.
 * Sources: [v0.9.1 2.3], [seed]; the rules G1 to G4 are in docs/rings.md. */

typedef struct vpci_drv vpci_drv;

enum vpci_drv_kick_rule { VPCI_DRV_KICK_ALWAYS, VPCI_DRV_KICK_USED_FLAGS, VPCI_DRV_KICK_AVAIL_EVENT };
enum vpci_drv_wait_rule {
    VPCI_DRV_POLL,            /* interrupts stay suppressed, as far as the rule of the queue can say it */
    VPCI_DRV_AVAIL_FLAGS,     /* interrupts, asked for by avail.flags */
    VPCI_DRV_USED_EVENT       /* interrupts, asked for by used_event */
};

/* One descriptor of the template. Request slot k has its buffer at gpa + k * stride. */
typedef struct vpci_drv_piece {
    uint64_t gpa;
    uint64_t stride;
    uint32_t len;
    uint32_t writable;
} vpci_drv_piece;

/* Bytes of slot k lie at first + k * stride in this process; first NULL: there are none. */
typedef struct vpci_drv_place {
    uint8_t *first;
    uint64_t stride;
} vpci_drv_place;

typedef struct vpci_drv_setup {
    uint8_t *ring;            /* a whole ring of `size` entries, avail_event included, nothing in flight */
    uint32_t size;            /* a power of two 1..32768 */
    uint32_t depth;           /* requests in flight at most: they must have their descriptors in the table */
    const vpci_drv_piece *pieces;
    uint32_t n_pieces;
    uint32_t kick_rule;       /* enum vpci_drv_kick_rule */
    uint32_t wait_rule;       /* enum vpci_drv_wait_rule */
    int kick_fd;              /* an ioeventfd; -1: vpci_drv_run asks its caller to kick */
    int irq_fd;               /* the interrupts' eventfd, non-blocking; only without POLL */
    int wake_fd;              /* readable: the caller has something else to do; -1: nothing */
    uint32_t ends_interrupts; /* INTx: vpci_drv_run asks its caller to end each interrupt */
    vpci_drv_place tables;    /* indirect tables of n_pieces descriptors, at tables_gpa; NULL: direct chains */
    uint64_t tables_gpa;

    /* Request n has the number first + step * (n % count), or with `random` some number of these. */
    uint64_t first, step, count;
    uint32_t random;          /* the seed; 0: in order */
    uint32_t n_marks;         /* so many words, one every mark_stride bytes of `marks`: the number, +1, +2 ... */
    uint64_t mark_stride;
    vpci_drv_place stamp;     /* 8 bytes that get the number */
    vpci_drv_place marks;
    uint32_t marks_checked;   /* 1: the device must have written the marks; 0: they are written for it */
    uint32_t used_len;        /* what each used entry has to say */
    vpci_drv_place status;    /* one byte, which the device must set to 0 */
    uint64_t bytes;           /* that a request moves, for the counter */
} vpci_drv_setup;

enum vpci_drv_why {
    VPCI_DRV_DONE,            /* everything that was asked for came back */
    VPCI_DRV_KICK,            /* kick, then call again */
    VPCI_DRV_WAKE,            /* wake_fd is readable: see to it, then call again */
    VPCI_DRV_INTERRUPT,       /* end the interrupt, then call again */
    VPCI_DRV_TIMEOUT,         /* nothing came back, or no interrupt for it, for timeout_ms */
    VPCI_DRV_BROKEN           /* the device broke the ring: see stats */
};

enum vpci_drv_fault {
    VPCI_DRV_SOUND,
    VPCI_DRV_USED_JUMP,       /* used.idx says more than is in flight */
    VPCI_DRV_HEAD,            /* a used entry names no chain in flight */
    VPCI_DRV_LENGTH,          /* the used entry's length */
    VPCI_DRV_STATUS,          /* the status byte */
    VPCI_DRV_DATA             /* a mark */
};

/* Of latencies in ns: 32 buckets for each doubling up to 2^41; the last one has what is longer. */
enum vpci_drv_size { VPCI_DRV_BUCKETS = 1184 };

typedef struct vpci_drv_stats {
    uint64_t requests;        /* that came back, right or wrong */
    uint64_t bytes;
    uint64_t kicks;
    uint64_t publications;    /* of avail.idx: those without a kick were suppressed */
    uint64_t interrupts;      /* signals of the eventfd */
    uint64_t faults;          /* wrong lengths, status bytes, marks; the first one is told here: */
    uint64_t fault_number;    /* its request's number */
    uint64_t fault_got;
    uint64_t fault_wanted;
    uint32_t fault;           /* enum vpci_drv_fault */
    uint32_t in_flight;
    uint32_t not_taken;       /* used entries in the ring: after a time-out, those whose interrupt never came */
    uint64_t latency[VPCI_DRV_BUCKETS];
} vpci_drv_stats;

/* NULL when memory is short or the setup makes no sense. The fds and all memory stay the caller's. */
vpci_drv *vpci_drv_new(const vpci_drv_setup *setup);
void vpci_drv_free(vpci_drv *drv);
/* Go on until `count` requests in all were sent (0: no limit) or CLOCK_MONOTONIC passes stop_ns (0: no limit), and all
 * of them came back. Returns enum vpci_drv_why. */
int vpci_drv_run(vpci_drv *drv, uint64_t count, uint64_t stop_ns, uint32_t timeout_ms);
void vpci_drv_read_stats(const vpci_drv *drv, vpci_drv_stats *stats);
/* The longest latency in ns that a bucket counts, and the bucket of a latency. */
uint64_t vpci_drv_bucket_ns(uint32_t bucket);
uint32_t vpci_drv_bucket(uint64_t ns);
