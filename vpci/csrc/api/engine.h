/* An engine serves the chains of a queue. The pump knows this table and nothing of the model behind it.
 * A model in C names its table; a model in Python uses the handoff engine, which keeps chains for Python to take.
 * Foreign engines (another extension module) use the vpci_host table, for they cannot link to this one. */

typedef struct vpci_dev vpci_dev;
struct vpci_engine;

typedef struct vpci_host {
    uint32_t abi;
    /* Finish a chain: once, from any thread; len = bytes written, counted from the first writable byte. */
    void (*done)(vpci_chain *chain, uint32_t len);
    uint32_t (*read)(const vpci_chain *chain, uint32_t off, void *buf, uint32_t len);
    uint32_t (*write)(const vpci_chain *chain, uint32_t off, const void *buf, uint32_t len);
    /* For run() only. The next chain of the queue, or NULL: there is none, or none can be fetched now. */
    vpci_chain *(*take)(vpci_queue *queue);
    /* For run() only. It was not needed after all: the one that was taken last goes back into the ring, and so on. */
    void (*put_back)(vpci_queue *queue, vpci_chain *chain);
    /* Have event() called for epoll's events on fd; edge-triggered, so each goes on until there is no more. From
     * event() and run(), or before the device starts. Asking again replaces what was asked. Returns 0 or -errno. */
    int (*watch)(vpci_dev *dev, const struct vpci_engine *engine, void *state, int fd, uint32_t events);
    /* Before the fd is closed. */
    void (*unwatch)(vpci_dev *dev, int fd);
    /* Have run() called for this queue, on its thread. */
    void (*look)(vpci_dev *dev, uint32_t queue_index);
} vpci_host;

/* What run() says of its queue. */
enum vpci_run {
    VPCI_RUN_MORE,      /* call again: there was more than one look may take */
    VPCI_RUN_KICKS,     /* the ring is empty, or has too little: the driver is asked for a kick when it has more */
    VPCI_RUN_QUIET      /* chains may be there and are of no use now: no kick is asked for, event() will tell */
};

typedef struct vpci_engine {
    uint32_t abi;
    /* On the queue's own thread: must not block. Owns the chain until done. chain->error may be set. NULL with run. */
    void (*serve)(void *state, const vpci_host *host, vpci_chain *chain);
    /* Give up what has not begun on this queue: finish those chains now. May be NULL. */
    void (*cancel)(void *state, uint32_t queue_index);
    /* The negotiated features changed. May be NULL. */
    void (*features)(void *state, uint64_t features);
    /* Instead of serve, for an engine that takes chains when it has a use for them: the queue was kicked, or looked for.
     * On the queue's own thread, also for a queue that is stopped (then there is nothing to take). It holds no chain
     * when it returns. Returns enum vpci_run. May be NULL. */
    uint32_t (*run)(void *state, const vpci_host *host, vpci_queue *queue, uint16_t queue_index);
    /* Epoll's events on an fd that is watched. On the pump's thread: must not block. May be NULL. */
    void (*event)(void *state, const vpci_host *host, int fd, uint32_t events);
} vpci_engine;

enum vpci_engine_abi { VPCI_ENGINE_ABI = 2 };

const vpci_host *vpci_host_table(void);

/* The handoff engine: chains wait here until Python takes them. */
typedef struct vpci_handoff vpci_handoff;

vpci_handoff *vpci_handoff_new(void);
void vpci_handoff_free(vpci_handoff *h);
const vpci_engine *vpci_handoff_engine(void);
/* Up to max chains; waits up to timeout_ms (-1: for ever) for the first, or until chains are recalled. Returns how many,
 * or -1 once closed. */
int vpci_handoff_take(vpci_handoff *h, vpci_chain **chains, uint32_t max, int timeout_ms);
/* Wake every taker; takes return -1 from now on. */
void vpci_handoff_close(vpci_handoff *h);
/* An eventfd that is readable when chains have arrived or the engine was closed; -errno when there is none to be had.
 * Before the device starts. The fd is the engine's. */
int vpci_handoff_event_fd(vpci_handoff *h);
/* How often the negotiated features have changed; chain->scratch[0] has it as it was when the chain came. A reset
 * changes them after its drain, so chains of the old life have the number of before. */
uint64_t vpci_handoff_life(vpci_handoff *h);
/* How often chains were recalled: when it has grown, those that were taken before are worth a look. */
uint64_t vpci_handoff_recalls(vpci_handoff *h);
/* A chain that was taken and is not done: has somebody waited too long for its queue since it came? */
bool vpci_handoff_is_recalled(const vpci_chain *chain);
/* Finish n chains with one call. */
void vpci_chains_done(vpci_chain **chains, const uint32_t *lens, uint32_t n);
void vpci_chain_done(vpci_chain *chain, uint32_t len);
