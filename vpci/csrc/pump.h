/* What the pump's own files share: the device, its connection, and the operation that a message has begun. */
#ifndef VPCI_PUMP_H
#define VPCI_PUMP_H

#include "core.h"

/* ---- conn.c: the client's socket, bytes and fds to messages and back ---- */

struct vpci_dev;

enum { MAX_HELD_FDS = 256, RX_MIN = 65536, TX_HIGH = 4 << 20 };
#define RX_MAX (2u * VFU_MAX_MESSAGE)

/* fds that came with the byte at this position of the stream. */
struct held_fd {
    uint64_t position;
    int fd;
};

struct conn {
    int fd;                 /* -1: no client */
    bool versioned;         /* VERSION was answered */
    bool hung_up;           /* the peer has closed, but there may be bytes of it to read */
    bool gone;              /* the peer is gone or was given up; close when nothing is under way */
    uint8_t *rx;            /* bytes received and not executed: rx[rx_at .. rx_end) */
    size_t rx_at, rx_end, rx_cap;
    uint64_t position;      /* of rx[rx_at] in the stream */
    struct held_fd held[MAX_HELD_FDS];
    uint32_t n_held;
    uint8_t *tx;
    size_t tx_at, tx_end, tx_cap;
    size_t tx_fds_at;       /* the byte of tx that the fds go with */
    int tx_fds[VFU_MAX_FDS];
    uint32_t n_tx_fds;
    uint32_t armed;         /* epoll events asked for now */
};

/* A complete message; data points into the receive buffer until the next receive. */
struct message {
    struct vfu_header h;
    const uint8_t *data;
    uint32_t len;
    int fds[VFU_MAX_FDS];   /* closed by message_close unless set to -1 */
    uint32_t n_fds;
};

void conn_init(struct conn *c);
void conn_open(struct conn *c, int fd);
void conn_close(struct conn *c);
void conn_fini(struct conn *c);
/* One receive. Returns 0, or enum vpci_refusal and *detail when the connection must end; EOF sets gone. */
int conn_receive(struct conn *c, uint64_t *detail);
bool conn_has_room(const struct conn *c);
/* Take the next whole message. 1: there is one, 0: not yet, < 0: -(enum vpci_refusal), the stream is lost. */
int conn_next(struct conn *c, struct message *m, uint64_t *detail);
void message_close(struct message *m);
/* Queue a reply: the parts follow each other. Returns false when memory is short. */
bool conn_reply(struct conn *c, const struct vfu_header *request, uint32_t error, const void *a, size_t a_len,
                const void *b, size_t b_len);
/* The same with fds, which stay the caller's and must live until they are sent or the connection is closed. */
bool conn_reply_fds(struct conn *c, const struct vfu_header *request, const void *a, size_t a_len, const void *b,
                    size_t b_len, const int *fds, uint32_t n_fds);
void conn_send(struct conn *c);
bool conn_congested(const struct conn *c);

/* Queue a request of our own. */
bool conn_request(struct conn *c, const struct vfu_header *header, const void *a, size_t a_len, const void *b,
                  size_t b_len);
/* Give each whole reply that waits behind requests to take(), and cut it out of the stream. */
void conn_take_replies(struct conn *c, bool (*take)(struct vpci_dev *dev, const struct message *m), struct vpci_dev *dev);

/* ---- far.c: memory that only the client reaches ---- */

struct far {
    pthread_t thread;
    bool started, ending;
    pthread_cond_t changed;            /* with dev->awake: a reply, another operation, work */
    struct vfu_header request;         /* the one message that waits for its reply */
    bool pending, error;
    uint16_t last_id;
    void *in;                          /* where a DMA_READ's data goes */
    uint32_t len;
    uint32_t max_len;                  /* of one message's data */
};

void far_init(struct vpci_dev *dev);
void far_fini(struct vpci_dev *dev);
void far_adopt(struct vpci_dev *dev, vpci_queue *q);
/* Something that its thread waits for has changed. */
void far_tell(struct vpci_dev *dev);
/* A queue has work for the thread. */
void far_start(struct vpci_dev *dev);
void far_finish_chain(struct vpci_dev *dev, vpci_chain *chain, uint32_t len);
/* Is the queue in the thread's hands? */
bool far_has(const vpci_queue *q);
/* Finished chains of queues that drain are not pushed any more. */
void far_drop(struct vpci_dev *dev);
bool far_at_rest(const struct vpci_dev *dev, bool draining_only);
/* Returns whether the reply was one of ours, in time or late. */
bool far_take_reply(struct vpci_dev *dev, const struct message *m);

/* ---- hot.c: register accesses that need no Python ---- */

struct hot {
    uint32_t size;          /* of BAR0 */
    uint8_t *image;         /* what reads see */
    uint8_t *read_kind;     /* enum vpci_hot_read, a byte */
    uint8_t *kick_width;    /* where a kick starts: its width; else 0 */
    uint16_t notify;        /* queue_notify as last written */
};

int hot_init(struct hot *hot, uint32_t size);
void hot_fini(struct hot *hot);
void hot_install(struct hot *hot, const vpci_hot_row *rows, uint32_t n_rows);
bool hot_covers_isr(const struct hot *hot, uint32_t off, uint32_t len);
void hot_read(const struct hot *hot, uint32_t off, uint32_t len, uint32_t isr, uint8_t *out);
bool hot_is_kick(const struct hot *hot, uint32_t off, uint32_t len);
/* Where kicks go. False when the table has no such place. */
bool hot_kick_place(const struct hot *hot, uint32_t *off, uint32_t *width);
void hot_set_notify(struct hot *hot, uint16_t value);

/* ---- mailbox.c: to Python and back ---- */

enum { MAX_NOTES = 128 };

/* An answer or a post from Python. */
struct order {
    struct order *next;
    bool is_answer;
    uint32_t error;
    uint8_t *payload;
    uint32_t len;
    vpci_effect *effects;
    uint32_t n_effects;
    vpci_hot_row *rows;
    uint32_t n_rows;
};

struct mailbox {
    pthread_mutex_t lock;
    pthread_cond_t for_python;
    int wake_fd;                       /* wakes the pump */
    vpci_event notes[MAX_NOTES];
    uint32_t first_note, n_notes;
    uint64_t lost_notes, lost_since;
    vpci_event message;                /* kind NONE: nothing waits for Python */
    bool ended;                        /* the pump is: STOPPED is to be told once */
    struct order *orders, **last_order;
    vpci_chain *done, **last_done;     /* chains finished by other threads */
    bool stop;
};

int mailbox_init(struct mailbox *box);
void mailbox_fini(struct mailbox *box);
void mailbox_wake(struct mailbox *box);
void mailbox_note(struct mailbox *box, const vpci_event *note);
void mailbox_message(struct mailbox *box, const vpci_event *message);
void mailbox_end(struct mailbox *box);
/* The wake-up was noticed. */
void mailbox_woken(struct mailbox *box);
/* Take what other threads left. */
void mailbox_collect(struct mailbox *box, struct order **orders, vpci_chain **done, bool *stop);
void order_free(struct order *order);

/* ---- pump.c ---- */

/* What the message in execution waits for. Requests after it stay in the receive buffer. */
enum op {
    OP_NONE,
    OP_PYTHON,     /* Python's answer */
    OP_DRAIN,      /* have the answer; the queues it stops have work in flight */
    OP_UNMAP,      /* work in flight on the memory to be unmapped */
    OP_QUIESCE,    /* the same, for a front that will unmap it; or all work in flight, to be dropped */
    OP_CLOSING,    /* the client is gone; work in flight of its life */
    OP_STOPPING,   /* vpci_dev_stop */
    OP_ENDED
};

struct vpci_dev {
    vpci_mem *mem;
    struct vpci_irq irq;
    struct hot hot;
    struct mailbox box;
    const vpci_front *front;
    void *front_state;
    bool in_front;                     /* inside a call of the front's that waits: it must not be entered again */
    struct conn conn;                  /* the own front's, like listen_fd and accepting */
    struct far far;
    vpci_queue **queues;
    uint32_t n_queues;
    uint64_t region_sizes[VFU_REGION_INDICES];
    uint32_t cancel_ms, close_ms;

    pthread_t thread;
    bool thread_started;
    pthread_t owner;                   /* the thread, as it knows itself */
    int epoll_fd;
    int listen_fd;
    bool accepting;
    bool held_by_bus_master;
    bool stop;                         /* vpci_dev_stop was called */

    enum op op;
    uint64_t op_since_ms;
    bool op_cancelled, op_given_up;
    struct vfu_header request;         /* the header of the message in execution */
    struct order *answer;              /* OP_DRAIN */
    struct vfu_dma_unmap unmap;        /* OP_UNMAP, OP_QUIESCE */
    bool drops;                        /* OP_QUIESCE */
    struct multi {                     /* a REGION_WRITE_MULTI in execution, one write after the other */
        struct vfu_header request;
        struct vfu_one_write *writes;
        uint64_t n, next;              /* n 0: none */
        uint32_t error;                /* the first one */
    } multi;
    uint32_t max_fds;                  /* that the client takes in one message */
    bool ioeventfds;                   /* a kick has one place in every state of the layout */
    int watched_unmask_fd;
    struct watch *watches;
    uint32_t n_watches;
    uint8_t *python_data;              /* the payload that Python is looking at */

    pthread_mutex_t awake;             /* held by whoever works on the device: the pump while it is not asleep, the
                                        * far thread while it does not wait, readers of state */
    vpci_dev_stats stats;
    uint64_t features;
};

/* The client may have given an eventfd by which it unmasks INTx. */
void pump_watch_unmask(struct vpci_dev *dev);
void pump_unwatch_unmask(struct vpci_dev *dev);
void pump_watch_kick(struct vpci_dev *dev, vpci_queue *q);
/* The thread. */
void *pump_run(void *dev);
int pump_watch(struct vpci_dev *dev, int fd);
/* Ask for these epoll events of an fd; 0: only for its hang-up. */
void pump_watch_for(struct vpci_dev *dev, int fd, uint32_t events);
/* A client has the connected socket `fd`, or was refused on it. */
void pump_connected(struct vpci_dev *dev, int fd);
void pump_turned_away(struct vpci_dev *dev, int fd);
void pump_begin_closing(struct vpci_dev *dev);
/* Bring the work that dev->unmap would wait for to its end, or drop all work. Returns whether it has ended; else the
 * operation begins that waits for it. */
bool pump_quiesce(struct vpci_dev *dev, bool drop);
/* For a front that has to answer before it returns: turns without messages, until the operation is over. */
void pump_wait(struct vpci_dev *dev);
void pump_forget_eventfds(struct vpci_dev *dev);
void pump_note(struct vpci_dev *dev, vpci_event note);
void pump_kick(struct vpci_dev *dev, uint32_t queue_index);
void pump_begin(struct vpci_dev *dev, enum op op);
void pump_finish_chain(struct vpci_dev *dev, vpci_chain *chain, uint32_t len);
void pump_remap(struct vpci_dev *dev);
bool pump_may_fetch(const struct vpci_dev *dev, const vpci_queue *q);
void pump_look(struct vpci_dev *dev, vpci_queue *q);
bool pump_unmap_is_ready(struct vpci_dev *dev);

/* ---- watch.c: descriptors of engines in the pump's epoll set ---- */

struct watch {
    int fd;
    const vpci_engine *engine;
    void *state;
};

int watch_add(struct vpci_dev *dev, const vpci_engine *engine, void *state, int fd, uint32_t events);
void watch_remove(struct vpci_dev *dev, int fd);
void watch_look(struct vpci_dev *dev, uint32_t queue_index);
/* Returns whether the fd is an engine's. */
bool watch_event(struct vpci_dev *dev, int fd, uint32_t events);

/* ---- effects.c ---- */

void effects_apply(struct vpci_dev *dev, const struct order *order);
void effects_stop_queue(vpci_queue *q);

/* ---- messages.c ---- */

void message_execute(struct vpci_dev *dev, struct message *m);
/* Go on with a REGION_WRITE_MULTI. Returns false when there is none. */
bool message_go_on(struct vpci_dev *dev);
void message_finish_unmap(struct vpci_dev *dev);
void reply(struct vpci_dev *dev, uint32_t error, const void *a, size_t a_len, const void *b, size_t b_len);
/* An access of a region; data: what is written, NULL for a read. */
void message_access(struct vpci_dev *dev, const struct vfu_region_access *a, const uint8_t *data);
void message_reset(struct vpci_dev *dev);

/* ---- own.c ---- */

extern const vpci_front own_front;

#endif
