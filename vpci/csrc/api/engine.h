/* An engine serves the chains of a queue. The pump knows this table and nothing of the model behind it.
 * A model in C names its table; a model in Python uses the handoff engine, which keeps chains for Python to take.
 * Foreign engines (another extension module) use the vpci_host table, for they cannot link to this one. */

typedef struct vpci_host {
    uint32_t abi;
    /* Finish a chain: once, from any thread; len = bytes written, counted from the first writable byte. */
    void (*done)(vpci_chain *chain, uint32_t len);
    uint32_t (*read)(const vpci_chain *chain, uint32_t off, void *buf, uint32_t len);
    uint32_t (*write)(const vpci_chain *chain, uint32_t off, const void *buf, uint32_t len);
} vpci_host;

typedef struct vpci_engine {
    uint32_t abi;
    /* On the queue's own thread: must not block. Owns the chain until done. chain->error may be set. */
    void (*serve)(void *state, const vpci_host *host, vpci_chain *chain);
    /* Give up what has not begun on this queue: finish those chains now. May be NULL. */
    void (*cancel)(void *state, uint32_t queue_index);
    /* The negotiated features changed. May be NULL. */
    void (*features)(void *state, uint64_t features);
} vpci_engine;

enum vpci_engine_abi { VPCI_ENGINE_ABI = 1 };

const vpci_host *vpci_host_table(void);

/* The handoff engine: chains wait here until Python takes them. */
typedef struct vpci_handoff vpci_handoff;

vpci_handoff *vpci_handoff_new(void);
void vpci_handoff_free(vpci_handoff *h);
const vpci_engine *vpci_handoff_engine(void);
/* Up to max chains; waits up to timeout_ms (-1: for ever) for the first. Returns how many, or -1 once closed. */
int vpci_handoff_take(vpci_handoff *h, vpci_chain **chains, uint32_t max, int timeout_ms);
/* Wake every taker; takes return -1 from now on. */
void vpci_handoff_close(vpci_handoff *h);
/* An eventfd that is readable when chains have arrived or the engine was closed; -errno when there is none to be had.
 * Before the device starts. The fd is the engine's. */
int vpci_handoff_event_fd(vpci_handoff *h);
/* How often the negotiated features have changed; chain->scratch[0] has it as it was when the chain came. A reset
 * changes them after its drain, so chains of the old life have the number of before. */
uint64_t vpci_handoff_life(vpci_handoff *h);
/* Finish n chains with one call. */
void vpci_chains_done(vpci_chain **chains, const uint32_t *lens, uint32_t n);
void vpci_chain_done(vpci_chain *chain, uint32_t len);
