/* The two mailboxes of a device: events for Python, and what other threads leave for the pump (Python's answers,
 * chains that engines have finished, the wish to stop). Messages wake by a condition, the pump by an eventfd. */
#include "pump.h"

#include <sys/eventfd.h>
#include <time.h>

int mailbox_init(struct mailbox *box)
{
    *box = (struct mailbox){.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
    if (box->wake_fd < 0)
        return -errno;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&box->lock, NULL);
    pthread_cond_init(&box->for_python, &attr);
    pthread_condattr_destroy(&attr);
    box->last_order = &box->orders;
    box->last_done = &box->done;
    return 0;
}

void order_free(struct order *order)
{
    if (!order)
        return;
    free(order->payload);
    free(order->effects);
    free(order->rows);
    free(order);
}

void mailbox_fini(struct mailbox *box)
{
    for (struct order *o = box->orders, *next; o; o = next) {
        next = o->next;
        order_free(o);
    }
    close(box->wake_fd);
    pthread_cond_destroy(&box->for_python);
    pthread_mutex_destroy(&box->lock);
}

void mailbox_wake(struct mailbox *box)
{
    uint64_t one = 1;
    ssize_t n = write(box->wake_fd, &one, sizeof(one));   /* EAGAIN: it is awake already */
    (void)n;
}

/* ---- to Python ---- */

void mailbox_note(struct mailbox *box, const vpci_event *note)
{
    pthread_mutex_lock(&box->lock);
    if (box->n_notes < MAX_NOTES) {
        vpci_event *slot = &box->notes[(box->first_note + box->n_notes++) % MAX_NOTES];
        *slot = *note;
        slot->kind = VPCI_EVENT_NOTE;
    } else {
        box->lost_notes++;
        box->lost_since++;
    }
    pthread_cond_signal(&box->for_python);
    pthread_mutex_unlock(&box->lock);
}

void vpci_chain_note(vpci_chain *chain, vpci_event note)
{
    mailbox_note(&chain->queue->dev->box, &note);
}

void mailbox_message(struct mailbox *box, const vpci_event *message)
{
    pthread_mutex_lock(&box->lock);
    box->message = *message;
    pthread_cond_signal(&box->for_python);
    pthread_mutex_unlock(&box->lock);
}

void mailbox_end(struct mailbox *box)
{
    pthread_mutex_lock(&box->lock);
    box->ended = true;
    pthread_cond_signal(&box->for_python);
    pthread_mutex_unlock(&box->lock);
}

static bool take_event(struct mailbox *box, vpci_event *event)
{
    if (box->n_notes) {
        *event = box->notes[box->first_note];
        box->first_note = (box->first_note + 1) % MAX_NOTES;
        box->n_notes--;
    } else if (box->lost_since) {
        *event = (vpci_event){.kind = VPCI_EVENT_NOTE, .note = VPCI_NOTE_LOST, .a = box->lost_since};
        box->lost_since = 0;
    } else if (box->message.kind) {
        *event = box->message;
        box->message.kind = VPCI_EVENT_NONE;
    } else if (box->ended) {
        *event = (vpci_event){.kind = VPCI_EVENT_STOPPED};
    } else {
        return false;
    }
    return true;
}

int vpci_dev_next(vpci_dev *dev, vpci_event *event, int timeout_ms)
{
    struct mailbox *box = &dev->box;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t ns = t.tv_nsec + (int64_t)(timeout_ms > 0 ? timeout_ms : 0) * 1000000;
    t.tv_sec += ns / 1000000000;
    t.tv_nsec = ns % 1000000000;
    int rc = 0;
    pthread_mutex_lock(&box->lock);
    bool got;
    while (!(got = take_event(box, event)) && timeout_ms && rc != ETIMEDOUT)
        rc = timeout_ms < 0 ? pthread_cond_wait(&box->for_python, &box->lock)
                            : pthread_cond_timedwait(&box->for_python, &box->lock, &t);
    pthread_mutex_unlock(&box->lock);
    return got;
}

/* ---- to the pump ---- */

static void *copy_of(const void *data, size_t len, bool *failed)
{
    void *copy = len ? malloc(len) : NULL;
    if (copy)
        memcpy(copy, data, len);
    *failed |= len && !copy;
    return copy;
}

static int leave_order(vpci_dev *dev, struct order order, const void *payload, const vpci_effect *effects,
                       const vpci_hot_row *rows)
{
    struct mailbox *box = &dev->box;
    bool failed = false;
    struct order *o = copy_of(&order, sizeof(order), &failed);
    if (!o)
        return -ENOMEM;
    o->payload = copy_of(payload, o->len, &failed);
    o->effects = copy_of(effects, o->n_effects * sizeof(*effects), &failed);
    o->rows = copy_of(rows, o->n_rows * sizeof(*rows), &failed);
    if (failed) {
        order_free(o);
        return -ENOMEM;
    }
    pthread_mutex_lock(&box->lock);
    *box->last_order = o;
    box->last_order = &o->next;
    mailbox_wake(box);
    pthread_mutex_unlock(&box->lock);
    return 0;
}

int vpci_dev_answer(vpci_dev *dev, uint32_t error, const void *payload, uint32_t len,
                    const vpci_effect *effects, uint32_t n_effects, const vpci_hot_row *rows, uint32_t n_rows)
{
    struct order o = {.is_answer = true, .error = error, .len = len, .n_effects = n_effects, .n_rows = n_rows};
    return leave_order(dev, o, payload, effects, rows);
}

int vpci_dev_post(vpci_dev *dev, const vpci_effect *effects, uint32_t n_effects,
                  const vpci_hot_row *rows, uint32_t n_rows)
{
    struct order o = {.n_effects = n_effects, .n_rows = n_rows};
    return leave_order(dev, o, NULL, effects, rows);
}

void vpci_dev_stop(vpci_dev *dev)
{
    __atomic_store_n(&dev->box.stop, true, __ATOMIC_SEQ_CST);
    mailbox_wake(&dev->box);
}

/* Before the lists are taken: who adds to them after that writes the counter again, and we wake again. */
void mailbox_woken(struct mailbox *box)
{
    uint64_t count;
    ssize_t n = read(box->wake_fd, &count, sizeof(count));
    (void)n;
}

void mailbox_collect(struct mailbox *box, struct order **orders, vpci_chain **done, bool *stop)
{
    pthread_mutex_lock(&box->lock);
    *orders = box->orders;
    *done = box->done;
    box->orders = NULL;
    box->last_order = &box->orders;
    box->done = NULL;
    box->last_done = &box->done;
    pthread_mutex_unlock(&box->lock);
    *stop = __atomic_load_n(&box->stop, __ATOMIC_SEQ_CST);
}

void vpci_chain_done(vpci_chain *chain, uint32_t len)
{
    struct vpci_dev *dev = chain->queue->dev;
    struct mailbox *box = &dev->box;
    if (pthread_equal(pthread_self(), dev->owner)) {
        pump_finish_chain(dev, chain, len);
        return;
    }
    chain->used_len = len;
    chain->next = NULL;
    pthread_mutex_lock(&box->lock);
    bool first = !box->done;
    *box->last_done = chain;
    box->last_done = &chain->next;
    /* Before the unlock: with this chain the pump may end, and the device be freed, as soon as it gets the lock. */
    if (first)
        mailbox_wake(box);
    pthread_mutex_unlock(&box->lock);
}

static const vpci_host host = {
    .abi = VPCI_ENGINE_ABI, .done = vpci_chain_done, .read = vpci_chain_read, .write = vpci_chain_write,
    .take = vpci_ring_pop, .put_back = vpci_ring_unpop,
    .watch = watch_add, .unwatch = watch_remove, .look = watch_look,
};

const vpci_host *vpci_host_table(void)
{
    return &host;
}
