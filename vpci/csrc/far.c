/* Memory that only the client can reach: a thread that may wait for it. The pump leaves a queue whose ring or buffers
 * are far to this thread; its accesses travel as DMA_READ and DMA_WRITE messages on the client's own socket.
 *
 * The thread holds dev->awake while it works and lets go of it while it waits for a reply, so a queue is never touched
 * by two threads at once. When somebody needs a queue at rest (a drain, an unmap, the end of the client), the wait is
 * given up, what was begun is unwound, and nothing more is sent: the client holds its own big lock while it waits for
 * our answer and could not serve us. A reply that comes after that is dropped. */
#include "pump.h"

/* ---- one access ---- */

/* Must this queue come to rest rather than wait for the client? */
static bool must_unwind(const struct vpci_dev *dev, const vpci_queue *q)
{
    return q->draining || dev->op == OP_UNMAP || dev->op >= OP_CLOSING || dev->conn.fd < 0 || dev->conn.gone;
}

/* A message that Python is answering may turn out to be a reset: nothing of the old life is sent behind its back. */
static bool must_hold_back(const struct vpci_dev *dev)
{
    return dev->op == OP_PYTHON || dev->op == OP_DRAIN;
}

static bool wait_for_client(struct vpci_dev *dev, const vpci_queue *q, bool (*until)(const struct vpci_dev *dev))
{
    while (!until(dev) && !must_unwind(dev, q))
        pthread_cond_wait(&dev->far.changed, &dev->awake);
    return !must_unwind(dev, q);
}

static bool may_send(const struct vpci_dev *dev)
{
    return !must_hold_back(dev) && !conn_congested(&dev->conn);
}

static bool is_answered(const struct vpci_dev *dev)
{
    return !dev->far.pending;
}

static int exchange(struct vpci_dev *dev, vpci_queue *q, uint16_t command, uint64_t gpa, void *in, const void *out,
                    uint32_t len)
{
    struct far *far = &dev->far;
    struct vfu_dma_access access = {.addr = gpa, .count = len};
    if (!wait_for_client(dev, q, may_send))
        return -ECANCELED;
    far->request = (struct vfu_header){.id = ++far->last_id, .command = command};
    far->in = in;
    far->len = len;
    if (!conn_request(&dev->conn, &far->request, &access, sizeof(access), out, out ? len : 0))
        return -ECANCELED;
    far->pending = true;
    dev->stats.far_messages++;
    conn_send(&dev->conn);
    mailbox_wake(&dev->box);   /* to arm for room in the socket, should not all have gone */
    bool answered = wait_for_client(dev, q, is_answered);
    far->in = NULL;
    if (!answered && far->pending) {
        far->pending = false;
        return -ECANCELED;
    }
    return far->error ? -EFAULT : 0;
}

static uint32_t piece_len(const struct vpci_dev *dev, uint32_t left)
{
    return left < dev->far.max_len ? left : dev->far.max_len;
}

static int far_read(void *arg, vpci_queue *q, uint64_t gpa, void *buf, uint32_t len)
{
    int rc = 0;
    for (uint32_t at = 0, n; at < len && !rc; at += n) {
        n = piece_len(arg, len - at);
        rc = exchange(arg, q, VFU_DMA_READ, gpa + at, (uint8_t *)buf + at, NULL, n);
    }
    return rc;
}

static int far_write(void *arg, vpci_queue *q, uint64_t gpa, const void *buf, uint32_t len)
{
    int rc = 0;
    for (uint32_t at = 0, n; at < len && !rc; at += n) {
        n = piece_len(arg, len - at);
        rc = exchange(arg, q, VFU_DMA_WRITE, gpa + at, NULL, (const uint8_t *)buf + at, n);
    }
    return rc;
}

static const struct vpci_far_ops ops = {far_read, far_write};

/* ---- replies ---- */

static bool is_whole(const struct far *far, const struct message *m)
{
    struct vfu_dma_access access;
    size_t want = sizeof(access) + (far->in ? far->len : 0);
    if (m->h.flags & VFU_F_ERROR || m->len < want)
        return false;
    memcpy(&access, m->data, sizeof(access));
    return access.count == far->len;
}

bool far_take_reply(struct vpci_dev *dev, const struct message *m)
{
    struct far *far = &dev->far;
    bool is_dma = m->h.command == VFU_DMA_READ || m->h.command == VFU_DMA_WRITE;
    if (!far->pending || m->h.id != far->request.id || m->h.command != far->request.command)
        return is_dma && (uint16_t)(far->last_id - m->h.id) < 0x8000 && far->last_id;   /* late: dropped */
    far->error = !is_whole(far, m);
    if (!far->error && far->in)
        memcpy(far->in, m->data + sizeof(struct vfu_dma_access), far->len);
    far->pending = false;
    far_tell(dev);
    return true;
}

/* ---- the thread ---- */

static vpci_chain *take_done(vpci_queue *q)
{
    vpci_chain *c = q->done;
    if (c && !(q->done = c->next))
        q->last_done = &q->done;
    q->n_done -= c != NULL;
    return c;
}

static void put_back(vpci_queue *q, vpci_chain *c)
{
    if (!(c->next = q->done))
        q->last_done = &c->next;
    q->done = c;
    q->n_done++;
}

static void drop_done(vpci_queue *q)
{
    for (vpci_chain *c; (c = take_done(q));)
        vpci_ring_drop(q, c);
}

/* The list may grow while a push waits for the client, so the chain is off it meanwhile. */
static void push_done(vpci_queue *q)
{
    for (vpci_chain *c; !q->unwound && !q->draining && (c = take_done(q));) {
        bool was_full = q->in_flight == q->size;
        if (!vpci_ring_push(q, c, c->used_len)) {
            put_back(q, c);
            break;
        }
        q->runnable |= was_full;
        q->dirty = true;
    }
    if (q->draining || q->broken)
        drop_done(q);
}

static bool has_work(const struct vpci_dev *dev, const vpci_queue *q)
{
    if (must_unwind(dev, q) || q->suspended)
        return false;
    return q->done || (q->needs_far && (q->dirty || pump_may_fetch(dev, q)));
}

static vpci_queue *next_queue(const struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (has_work(dev, dev->queues[i]))
            return dev->queues[i];
    return NULL;
}

/* Returns whether it came through without giving anything up. */
static bool work(struct vpci_dev *dev, vpci_queue *q)
{
    q->on_far_thread = true;
    q->unwound = false;
    push_done(q);
    if (!q->unwound)
        pump_look(dev, q);
    bool came_through = !q->unwound;
    q->on_far_thread = false;
    q->unwound = false;
    if (q->draining)
        drop_done(q);
    mailbox_wake(&dev->box);   /* the pump may be waiting for just this */
    return came_through;
}

static void *run(void *arg)
{
    struct vpci_dev *dev = arg;
    pthread_mutex_lock(&dev->awake);
    while (!dev->far.ending) {
        vpci_queue *q = next_queue(dev);
        /* What was given up is tried again when something has changed; until then the lock is the pump's. */
        if (!q || !work(dev, q))
            pthread_cond_wait(&dev->far.changed, &dev->awake);
    }
    pthread_mutex_unlock(&dev->awake);
    return NULL;
}

/* ---- for the pump, which holds dev->awake ---- */

void far_init(struct vpci_dev *dev)
{
    pthread_cond_init(&dev->far.changed, NULL);
    dev->far.max_len = FAR_PIECE;
}

void far_adopt(struct vpci_dev *dev, vpci_queue *q)
{
    q->far = &ops;
    q->far_arg = dev;
    q->last_done = &q->done;
}

void far_tell(struct vpci_dev *dev)
{
    pthread_cond_broadcast(&dev->far.changed);
}

void far_start(struct vpci_dev *dev)
{
    if (!dev->far.started)
        dev->far.started = vpci_thread_start(&dev->far.thread, run, dev, "vpci-far") == 0;
    far_tell(dev);
}

void far_finish_chain(struct vpci_dev *dev, vpci_chain *chain, uint32_t len)
{
    vpci_queue *q = chain->queue;
    vpci_chain_release(chain);
    chain->used_len = len;
    chain->next = NULL;
    q->n_done++;
    *q->last_done = chain;
    q->last_done = &chain->next;
    far_start(dev);
}

bool far_has(const vpci_queue *q)
{
    return q->needs_far || q->on_far_thread || q->done;
}

void far_drop(struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (dev->queues[i]->draining && !dev->queues[i]->on_far_thread)
            drop_done(dev->queues[i]);
    far_tell(dev);
}

bool far_at_rest(const struct vpci_dev *dev, bool draining_only)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (dev->queues[i]->on_far_thread && (!draining_only || dev->queues[i]->draining))
            return false;
    return true;
}

void far_fini(struct vpci_dev *dev)
{
    pthread_mutex_lock(&dev->awake);
    dev->far.ending = true;
    far_tell(dev);
    pthread_mutex_unlock(&dev->awake);
    if (dev->far.started)
        pthread_join(dev->far.thread, NULL);
    pthread_cond_destroy(&dev->far.changed);
}
