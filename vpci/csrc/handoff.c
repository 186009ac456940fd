/* The engine of models written in Python: the pump leaves chains here, a Python thread takes them in batches and
 * finishes them with vpci_chains_done. A model that sleeps holds its own chains up and nothing else.
 * What it keeps for too long is asked back: cancel() recalls a queue's chains, and the Python thread is woken to give up
 * those that it was handed before.
 * A model that has no use for a chain before something happens elsewhere leaves it in the ring: its queue is gated, and
 * chains come only against credit (vpci_dev_grant). */
#include "pump.h"

#include <sys/eventfd.h>
#include <time.h>

struct vpci_handoff {
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    vpci_chain *first, **last;
    int event_fd;             /* readable when chains arrive, for a taker that waits for other things too; -1: none */
    uint64_t life;            /* grows when queues have been drained for new features, as in every reset */
    vpci_dev *dev;            /* once a chain came */
    uint64_t recalls;         /* of any queue */
    bool recalled;            /* since the last take */
    bool closed;
};

vpci_handoff *vpci_handoff_new(void)
{
    vpci_handoff *h = calloc(1, sizeof(*h));
    if (!h)
        return NULL;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->arrived, &attr);
    pthread_condattr_destroy(&attr);
    h->last = &h->first;
    h->event_fd = -1;
    return h;
}

int vpci_handoff_event_fd(vpci_handoff *h)
{
    if (h->event_fd < 0)
        h->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return h->event_fd < 0 ? -errno : h->event_fd;
}

static void wake(vpci_handoff *h)
{
    if (h->event_fd < 0)
        return;
    uint64_t one = 1;
    ssize_t n = write(h->event_fd, &one, sizeof(one));   /* EAGAIN: it is awake already */
    (void)n;
}

uint64_t vpci_handoff_life(vpci_handoff *h)
{
    return __atomic_load_n(&h->life, __ATOMIC_SEQ_CST);
}

/* What a chain takes off its queue's credit; more than nothing, so that the gate closes in the end. */
static int64_t cost(const vpci_chain *chain)
{
    uint64_t bytes = (uint64_t)chain->out_len + chain->in_len;
    return bytes ? (int64_t)bytes : 1;
}

void vpci_handoff_free(vpci_handoff *h)
{
    if (!h)
        return;
    if (h->event_fd >= 0)
        close(h->event_fd);
    pthread_cond_destroy(&h->arrived);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

static void serve(void *state, const vpci_host *host, vpci_chain *chain)
{
    vpci_handoff *h = state;
    if (chain->error) {
        host->done(chain, 0);
        return;
    }
    chain->queue->credit -= cost(chain);
    chain->scratch[0] = vpci_handoff_life(h);
    chain->scratch[1] = chain->queue->recalls;
    chain->next = NULL;
    pthread_mutex_lock(&h->lock);
    h->dev = chain->queue->dev;
    bool first = !h->first;
    *h->last = chain;
    h->last = &chain->next;
    pthread_cond_signal(&h->arrived);
    pthread_mutex_unlock(&h->lock);
    if (first)
        wake(h);
}

/* Once for each queue and after its drain: what was served before is of an older life. */
static void features(void *state, uint64_t acked)
{
    (void)acked;
    __atomic_add_fetch(&((vpci_handoff *)state)->life, 1, __ATOMIC_SEQ_CST);
}

uint64_t vpci_handoff_recalls(vpci_handoff *h)
{
    return __atomic_load_n(&h->recalls, __ATOMIC_SEQ_CST);
}

bool vpci_handoff_is_recalled(const vpci_chain *chain)
{
    return chain->scratch[1] != __atomic_load_n(&chain->queue->recalls, __ATOMIC_SEQ_CST);
}

/* With the lock held: whoever takes next, or waits for something to take, looks at the chains that it has. */
static void recall(vpci_handoff *h, uint32_t queue_index)
{
    if (!h->dev)
        return;
    __atomic_add_fetch(&h->dev->queues[queue_index]->recalls, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&h->recalls, 1, __ATOMIC_SEQ_CST);
    h->recalled = true;
    pthread_cond_signal(&h->arrived);
}

/* What Python has not taken yet can be given up here; what it has kept, on its own thread. */
static void cancel(void *state, uint32_t queue_index)
{
    vpci_handoff *h = state;
    vpci_chain *given_up = NULL;
    pthread_mutex_lock(&h->lock);
    vpci_chain **at = &h->first;
    while (*at) {
        vpci_chain *chain = *at;
        if (chain->queue_index != queue_index) {
            at = &chain->next;
            continue;
        }
        *at = chain->next;
        chain->queue->credit += cost(chain);   /* Python never sees it and goes on waiting for what it asked */
        chain->next = given_up;
        given_up = chain;
    }
    h->last = at;
    recall(h, queue_index);
    pthread_mutex_unlock(&h->lock);
    wake(h);
    for (vpci_chain *next; given_up; given_up = next) {
        next = given_up->next;
        vpci_chain_done(given_up, 0);
    }
}

static const vpci_engine engine = {.abi = VPCI_ENGINE_ABI, .serve = serve, .cancel = cancel, .features = features};

const vpci_engine *vpci_handoff_engine(void)
{
    return &engine;
}

static struct timespec deadline_in(int timeout_ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += timeout_ms / 1000;
    t.tv_nsec += (timeout_ms % 1000) * 1000000L;
    if (t.tv_nsec >= 1000000000L) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000L;
    }
    return t;
}

static void await_chains(vpci_handoff *h, int timeout_ms)
{
    struct timespec deadline = deadline_in(timeout_ms > 0 ? timeout_ms : 0);
    int rc = 0;
    while (!h->first && !h->closed && !h->recalled && rc != ETIMEDOUT && timeout_ms)
        rc = timeout_ms < 0 ? pthread_cond_wait(&h->arrived, &h->lock)
                            : pthread_cond_timedwait(&h->arrived, &h->lock, &deadline);
}

int vpci_handoff_take(vpci_handoff *h, vpci_chain **chains, uint32_t max, int timeout_ms)
{
    uint32_t n = 0;
    pthread_mutex_lock(&h->lock);
    await_chains(h, timeout_ms);
    for (; n < max && h->first; n++) {
        chains[n] = h->first;
        h->first = chains[n]->next;
    }
    if (!h->first)
        h->last = &h->first;
    h->recalled = false;
    bool over = !n && h->closed;
    pthread_mutex_unlock(&h->lock);
    return over ? -1 : (int)n;
}

void vpci_handoff_close(vpci_handoff *h)
{
    pthread_mutex_lock(&h->lock);
    h->closed = true;
    pthread_cond_broadcast(&h->arrived);
    pthread_mutex_unlock(&h->lock);
    wake(h);
}

/* The ring is looked at without a kick: while the gate was shut the driver was not asked for any. */
void vpci_dev_grant(vpci_dev *dev, uint32_t queue, int64_t bytes)
{
    if (queue >= dev->n_queues)
        return;
    vpci_queue *q = dev->queues[queue];
    pthread_mutex_lock(&dev->awake);
    q->gated = true;
    q->credit += bytes;
    bool look = q->credit > 0 && q->started && !q->broken;
    q->runnable |= look;
    pthread_mutex_unlock(&dev->awake);
    if (look)
        mailbox_wake(&dev->box);
}

void vpci_chains_done(vpci_chain **chains, const uint32_t *lens, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        vpci_chain_done(chains[i], lens[i]);
}
