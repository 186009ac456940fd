typedef struct gate gate;

typedef struct gate_counts {
    uint32_t held, in_serve, served, cancels;
} gate_counts;

const void *gate_engine(void);
gate *gate_new(void);
void gate_free(gate *g);
int gate_wait(gate *g, uint32_t held, uint32_t in_serve, int timeout_s);
void gate_release(gate *g, int n, int queue);
void gate_begin(gate *g, int n);
void gate_open(gate *g, int open);
void gate_block(gate *g, int block);
gate_counts gate_read(gate *g, uint64_t *features_seen);
