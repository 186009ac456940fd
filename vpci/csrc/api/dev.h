/* A device: the pump thread, its queues, interrupts and memory, and the two mailboxes between it and Python.
 * The pump hands Python one message at a time (vpci_dev_next) and Python answers it (vpci_dev_answer). */

typedef struct vpci_queue_setup {
    uint32_t size;
    const vpci_engine *engine;
    void *engine_state;
} vpci_queue_setup;

typedef struct vpci_dev_setup {
    uint32_t n_queues;
    const vpci_queue_setup *queues;
    uint32_t max_sg;
    uint64_t region_sizes[9];  /* enum vfu_region_index */
    uint32_t irq_counts[5];    /* enum vfu_irq_index; MSI-X's is the table size */
    uint32_t ioeventfds;       /* kicks have one place in every state of the layout: GET_REGION_IO_FDS offers it */
    uint32_t cancel_ms;        /* a drain cancels what it can after this long */
    uint32_t close_ms;         /* and gives the connection up after this long */
} vpci_dev_setup;

/* One row of the hot table: what C may answer by itself in BAR0. Rows cover the BAR without gap or overlap. */
enum vpci_hot_read { VPCI_READ_VALUE = 0, VPCI_READ_ISR = 1, VPCI_READ_NOTIFY = 2 };
enum vpci_hot_write { VPCI_WRITE_PYTHON = 0, VPCI_WRITE_KICK = 1 };

typedef struct vpci_hot_row {
    uint32_t offset;
    uint32_t width;      /* bytes, 1..8 */
    uint32_t read;       /* enum vpci_hot_read */
    uint32_t write;      /* enum vpci_hot_write; a kick only at this very offset and width */
    uint64_t value;
} vpci_hot_row;

enum vpci_effect_op {
    VPCI_FX_QUEUE_STOP,
    VPCI_FX_QUEUE_START,
    VPCI_FX_FEATURES,
    VPCI_FX_RING_RULES,
    VPCI_FX_QUEUE_VECTOR,
    VPCI_FX_CONFIG_VECTOR,
    VPCI_FX_MSIX,
    VPCI_FX_INTX_DISABLE,
    VPCI_FX_BUS_MASTER,
    VPCI_FX_VECTOR_MASK,
    VPCI_FX_ISR_CLEAR,
    VPCI_FX_NOTIFY_RESET,
    VPCI_FX_RAISE_CONFIG,
    VPCI_FX_KICK,
    VPCI_FX_MAX_FDS,          /* fds in one message that the client takes */
    VPCI_FX_MAX_TRANSFER,     /* bytes of data in one message that the client takes */
    VPCI_FX_OPS
};

typedef struct vpci_effect {
    uint32_t op;
    uint32_t queue;
    uint64_t value;
} vpci_effect;

enum vpci_event_kind {
    VPCI_EVENT_NONE = 0,
    VPCI_EVENT_MESSAGE,       /* must be answered */
    VPCI_EVENT_CLIENT_GONE,   /* must be answered: the function starts afresh */
    VPCI_EVENT_STOPPED,       /* the pump has ended */
    VPCI_EVENT_NOTE           /* something to log */
};

enum vpci_note {
    VPCI_NOTE_CLIENT = 1,     /* a client came: a = pid */
    VPCI_NOTE_REFUSED,        /* a second client came: a = pid, b = the holder's pid */
    VPCI_NOTE_RING_ERROR,     /* queue, a = enum vpci_ring_error, b = head, c = address */
    VPCI_NOTE_MESSAGE,        /* a message was refused: command, a = errno, b = reason (enum vpci_refusal), c = detail */
    VPCI_NOTE_PROTOCOL,       /* the connection was closed: a = reason (enum vpci_refusal), b = detail */
    VPCI_NOTE_CANCEL,         /* a drain takes long; what can be cancelled is: a = chains in flight */
    VPCI_NOTE_STUCK,          /* a drain did not end: the connection is closed: a = chains in flight */
    VPCI_NOTE_LOST,           /* notes were not kept: a = how many */
    VPCI_NOTE_BACKEND,        /* a backend failed, told once until it is opened anew: queue, a = errno, b = the type of
                               * the request, c = its first sector */
    VPCI_NOTE_FRONT           /* another front refused a message: command, text */
};

enum vpci_refusal {
    VPCI_WHY_NONE = 0,
    VPCI_WHY_SHORT,           /* the payload is shorter than the message needs; detail = bytes wanted */
    VPCI_WHY_SIZE,            /* the header's size is below 16 or above the limit; detail = size */
    VPCI_WHY_TYPE,            /* a reply that nobody waits for, or an unknown type; detail = flags */
    VPCI_WHY_COMMAND,         /* unknown, or not for a server; detail = command */
    VPCI_WHY_VERSION_FIRST,   /* anything before VERSION */
    VPCI_WHY_REGION,          /* region index or span outside; detail = index << 56 | offset */
    VPCI_WHY_IRQ,             /* irq index, span, flags or data; detail = index */
    VPCI_WHY_MAP,             /* a DMA range that cannot be mapped; detail = gpa */
    VPCI_WHY_UNMAP,           /* no such range; detail = gpa */
    VPCI_WHY_FDS,             /* more fds than are taken, or lost on the way; detail = how many */
    VPCI_WHY_MEMORY,          /* this process is out of memory */
    VPCI_WHYS
};

typedef struct vpci_event {
    uint32_t kind;            /* enum vpci_event_kind */
    uint32_t note;            /* enum vpci_note */
    uint32_t command;         /* enum vfu_command */
    uint32_t queue;
    uint64_t a;
    uint64_t b;
    uint64_t c;
    const uint8_t *data;      /* a message's payload, valid until it is answered */
    uint32_t len;
    uint32_t flags;           /* of the message's header */
    uint32_t pid;             /* the client */
    char text[96];            /* NOTE_FRONT: its words, with a NUL */
} vpci_event;

typedef struct vpci_dev_stats {
    uint64_t messages;
    uint64_t hot;             /* register accesses answered by C */
    uint64_t cold;            /* messages answered by Python */
    uint64_t config_interrupts;
    uint64_t refused_clients;
    uint64_t ignored_kicks;   /* for queues that do not exist */
    uint64_t far_messages;    /* DMA_READ and DMA_WRITE that we sent */
    uint64_t lost_notes;
    uint32_t clients;
    uint32_t client_pid;      /* 0: none is attached */
    uint32_t isr;
    uint32_t intx_status;     /* an INTx interrupt is pending, whether or not Interrupt Disable lets it out */
} vpci_dev_stats;

vpci_dev *vpci_dev_new(const vpci_dev_setup *setup);
/* Start the pump on a listening socket (it stays the caller's; non-blocking). Returns 0 or -errno. */
int vpci_dev_start(vpci_dev *dev, int listen_fd);
/* Ask the pump to drain and end; STOPPED follows. From any thread, also from a signal handler. */
void vpci_dev_stop(vpci_dev *dev);
/* After STOPPED. */
void vpci_dev_free(vpci_dev *dev);

/* The next thing for Python, waiting up to timeout_ms (-1: for ever). Returns 1, or 0 at the time-out. */
int vpci_dev_next(vpci_dev *dev, vpci_event *event, int timeout_ms);
/* Answer the message that vpci_dev_next gave: an errno or 0 with a payload. The queues that an effect stops are drained;
 * then the rows (if any) are the new hot table, the effects are carried out in order, and the reply goes out.
 * Returns 0 or -ENOMEM. */
int vpci_dev_answer(vpci_dev *dev, uint32_t error, const void *payload, uint32_t len,
                    const vpci_effect *effects, uint32_t n_effects, const vpci_hot_row *rows, uint32_t n_rows);
/* The same for a change that no message asked for; no queue may be stopped by it. */
int vpci_dev_post(vpci_dev *dev, const vpci_effect *effects, uint32_t n_effects,
                  const vpci_hot_row *rows, uint32_t n_rows);

/* From the first grant on chains of this queue are handed over only while it has credit: bytes are added to it (or
 * taken, below 0), and each chain takes its readable and writable bytes, at least 1, the last one perhaps more than
 * there is. From any thread. */
void vpci_dev_grant(vpci_dev *dev, uint32_t queue, int64_t bytes);

void vpci_dev_read_stats(vpci_dev *dev, vpci_dev_stats *stats);
void vpci_dev_queue_stats(vpci_dev *dev, uint32_t queue, vpci_queue_stats *stats);
/* One bit a vector, as the PBA shows it; returns the bytes written to buf. */
uint32_t vpci_dev_pending(vpci_dev *dev, uint8_t *buf, uint32_t len);
