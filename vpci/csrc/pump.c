/* The pump: the thread that owns a device. It sleeps in epoll; awake it lets its front (own.c, or one of another module)
 * execute messages in arrival order and send the replies, and only then looks at the rings ("reply first, work second").
 * It never waits for a backend or for Python: what must wait is an operation (enum op), and the loop goes on.
 * Work goes down to the front and to the engines; finished chains come back through mailbox.c. */
#include "pump.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

enum { MAX_CHAINS_A_LOOK = 64, MAX_BYTES_A_LOOK = 1 << 20, MAX_NS_A_LOOK = 200000, MAX_EVENTS = 8 };

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static uint64_t now_ms(void)
{
    return (uint64_t)(now_ns() / 1000000);
}

void pump_note(struct vpci_dev *dev, vpci_event note)
{
    note.pid = dev->stats.client_pid;
    mailbox_note(&dev->box, &note);
}

void pump_begin(struct vpci_dev *dev, enum op op)
{
    if (dev->op == OP_ENDED)
        return;   /* a front that was waiting may only find out now */
    dev->op = op;
    far_tell(dev);
    dev->op_since_ms = op == OP_NONE ? 0 : now_ms();
    dev->op_cancelled = dev->op_given_up = false;
}

/* ---- queues ---- */

/* Once an error, whoever met it: a kick, a look, a used entry, the far thread. */
static void note_ring_error(struct vpci_dev *dev, vpci_queue *q)
{
    if (q->noted_errors == q->ring_errors)
        return;
    q->noted_errors = q->ring_errors;
    pump_note(dev, (vpci_event){.note = VPCI_NOTE_RING_ERROR, .queue = q->index, .a = q->broken, .b = q->broken_head,
                                .c = q->broken_addr});
}

void pump_kick(struct vpci_dev *dev, uint32_t queue_index)
{
    vpci_queue *q = queue_index < dev->n_queues ? dev->queues[queue_index] : NULL;
    if (!q || !q->started) {
        ++*(q ? &q->ignored_kicks : &dev->stats.ignored_kicks);
        return;
    }
    q->kicks++;
    if (q->suspended)
        vpci_ring_break(q, q->far_refused ? VPCI_RING_FAR_MEMORY : VPCI_RING_UNMAPPED, 0,
                        (uint64_t)q->pfn << PAGE_SHIFT);
    q->runnable = !q->broken || q->engine->run;   /* an engine throws away what waits for a broken queue */
}

/* After every change of the memory table: rings are found again; one that is whole again is looked at once, for the
 * driver's kick may have come and gone. */
void pump_remap(struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++) {
        vpci_queue *q = dev->queues[i];
        bool was_suspended = q->suspended;
        if (vpci_queue_remap(q) && was_suspended)
            q->runnable = !q->broken;
    }
}

/* Work that ends after its queue was stopped or broken leaves no trace in the ring. */
void pump_finish_chain(struct vpci_dev *dev, vpci_chain *chain, uint32_t len)
{
    vpci_queue *q = chain->queue;
    if (q->draining || q->broken) {
        vpci_ring_drop(q, chain);
        return;
    }
    /* A far ring may go while work of it is in flight, for nothing points into it: the chain waits for its return. */
    if (far_has(q) || vpci_chain_is_far(chain) || q->suspended) {
        far_finish_chain(dev, chain, len);
        return;
    }
    q->runnable |= q->in_flight == q->size;   /* the queue was full of work: now it can fetch again */
    vpci_ring_push(q, chain, len);
    q->dirty = true;
}

static void publish(struct vpci_dev *dev, vpci_queue *q)
{
    bool wanted = vpci_ring_publish(q);
    q->dirty = q->unwound || q->suspended;   /* then it is published when the ring is there again */
    if (wanted)
        q->interrupts += vpci_irq_raise(&dev->irq, q->vector, VPCI_ISR_QUEUE);
}

bool pump_may_fetch(const struct vpci_dev *dev, const vpci_queue *q)
{
    return q->runnable && !q->draining && !dev->held_by_bus_master && dev->op != OP_UNMAP && dev->op < OP_QUIESCE;
}

/* Fetch until the ring is empty or the look is over. Returns true when it is empty (or can give nothing now). */
static bool fetch(vpci_queue *q)
{
    int64_t until = now_ns() + MAX_NS_A_LOOK;
    uint64_t bytes = 0;
    for (int n = 0; n < MAX_CHAINS_A_LOOK && bytes < MAX_BYTES_A_LOOK; n++) {
        vpci_chain *chain = vpci_ring_pop(q);
        if (!chain)
            return true;
        bytes += (uint64_t)chain->out_len + chain->in_len;
        q->engine->serve(q->engine_state, vpci_host_table(), chain);
        if (n % 8 == 7 && now_ns() > until)
            break;
    }
    return false;
}

/* A look by an engine that takes its chains itself. What makes the queue runnable meanwhile (while a far ring is asked)
 * is not forgotten. */
static void run_engine(struct vpci_dev *dev, vpci_queue *q)
{
    uint32_t wish = VPCI_RUN_QUIET;
    if (pump_may_fetch(dev, q)) {
        q->runnable = false;
        wish = q->engine->run(q->engine_state, vpci_host_table(), q, q->index);
    }
    if (q->dirty && !q->unwound)
        publish(dev, q);
    if (q->unwound || wish == VPCI_RUN_MORE || (wish == VPCI_RUN_KICKS && vpci_ring_starve(q)))
        q->runnable = true;
}

/* One look at a ring, by the thread that has the queue. Stopped in the middle (far memory), it stays runnable. */
void pump_look(struct vpci_dev *dev, vpci_queue *q)
{
    vpci_ring_busy(q);
    if (q->engine->run) {
        run_engine(dev, q);
        return;
    }
    bool empty = pump_may_fetch(dev, q) && fetch(q);
    if (q->dirty && !q->unwound)
        publish(dev, q);
    bool full = q->in_flight == q->size;   /* the next chain to finish makes it runnable */
    if (!empty || q->unwound)
        return;
    q->runnable = false;   /* before idle: a kick that comes while a far ring is asked must not be forgotten */
    if (!full && vpci_ring_idle(q))
        q->runnable = true;
}

static void publish_all(struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (dev->queues[i]->dirty && !far_has(dev->queues[i]))
            publish(dev, dev->queues[i]);
}

static void look_here(struct vpci_dev *dev, vpci_queue *q)
{
    if (pump_may_fetch(dev, q))
        pump_look(dev, q);
    else if (q->dirty)
        publish(dev, q);
    q->unwound = false;   /* set when it met far memory: then it is the far thread's from here on */
}

/* Is there a ring to look at again? Also one that was passed before another's engine asked for it. */
static bool has_more(const struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (pump_may_fetch(dev, dev->queues[i]) && !far_has(dev->queues[i]))
            return true;
    return false;
}

static bool look_at_rings(struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++) {
        vpci_queue *q = dev->queues[i];
        if (!far_has(q))
            look_here(dev, q);
        /* Perhaps since this very look. */
        if (far_has(q) && (pump_may_fetch(dev, q) || q->dirty || q->done))
            far_start(dev);
        note_ring_error(dev, q);
    }
    return has_more(dev);
}

static void finish_chains(struct vpci_dev *dev, vpci_chain *chain)
{
    for (vpci_chain *next; chain; chain = next) {
        next = chain->next;
        pump_finish_chain(dev, chain, chain->used_len);
    }
}

static uint64_t in_flight(const struct vpci_dev *dev, bool draining_only)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (!draining_only || dev->queues[i]->draining)
            n += dev->queues[i]->in_flight;
    return n;
}

/* ---- what Python decided ---- */

/* Stops begin to drain at once; the rest waits until they are done. */
static void begin_drain(struct vpci_dev *dev, struct order *o)
{
    for (uint32_t i = 0; i < o->n_effects; i++)
        if (o->effects[i].op == VPCI_FX_QUEUE_STOP && o->effects[i].queue < dev->n_queues)
            dev->queues[o->effects[i].queue]->draining = true;
        else if (o->effects[i].op == VPCI_FX_BUS_MASTER)
            dev->held_by_bus_master |= !o->effects[i].value;
    dev->answer = o;
    pump_begin(dev, OP_DRAIN);
    far_drop(dev);
}

static void take_orders(struct vpci_dev *dev, struct order *o)
{
    for (struct order *next; o; o = next) {
        next = o->next;
        if (o->is_answer && dev->op == OP_PYTHON) {
            begin_drain(dev, o);
            continue;
        }
        if (dev->answer && o->n_rows)
            dev->answer->n_rows = 0;   /* made later than the answer that waits, and whole */
        effects_apply(dev, o);
        order_free(o);
    }
}

/* ---- the client's eventfds ---- */

int pump_watch(vpci_dev *dev, int fd)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
    return epoll_ctl(dev->epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

void pump_watch_for(vpci_dev *dev, int fd, uint32_t events)
{
    struct epoll_event ev = {.events = events, .data.fd = fd};
    if (epoll_ctl(dev->epoll_fd, EPOLL_CTL_MOD, fd, &ev) < 0 && errno == ENOENT)
        epoll_ctl(dev->epoll_fd, EPOLL_CTL_ADD, fd, &ev);
}

void pump_watch_kick(struct vpci_dev *dev, vpci_queue *q)
{
    q->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (q->kick_fd >= 0 && pump_watch(dev, q->kick_fd) < 0) {
        close(q->kick_fd);
        q->kick_fd = -1;
    }
}

/* The client has these eventfds too: closing ours alone would leave them in the epoll set, and it awake for ever. */
static void forget(struct vpci_dev *dev, int *fd)
{
    if (*fd >= 0)
        epoll_ctl(dev->epoll_fd, EPOLL_CTL_DEL, *fd, NULL);
    *fd = -1;
}

void pump_unwatch_unmask(struct vpci_dev *dev)
{
    forget(dev, &dev->watched_unmask_fd);
}

void pump_watch_unmask(struct vpci_dev *dev)
{
    int fd = dev->irq.unmask_fd;
    if (fd < 0 || fd == dev->watched_unmask_fd)
        return;
    pump_watch(dev, fd);
    dev->watched_unmask_fd = fd;
}

void pump_forget_eventfds(struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++) {
        int fd = dev->queues[i]->kick_fd;
        forget(dev, &dev->queues[i]->kick_fd);
        if (fd >= 0)
            close(fd);
    }
    pump_unwatch_unmask(dev);
    vpci_irq_forget_client(&dev->irq);
    free(dev->multi.writes);
    dev->multi = (struct multi){0};
}

/* ---- operations ---- */

static bool is_at_rest(const struct vpci_dev *dev, bool draining_only)
{
    return !in_flight(dev, draining_only) && far_at_rest(dev, draining_only);
}

/* Does anybody hold memory of this queue? A chain whose used entry waits for the client holds none. */
static bool holds_memory(const vpci_queue *q)
{
    return q->in_flight > q->n_done || q->on_far_thread;
}

static bool range_is_free(const struct vpci_dev *dev, const struct vpci_range *r)
{
    if (!r->hva)
        return far_at_rest(dev, false);   /* nobody points into it */
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (holds_memory(dev->queues[i]) && vpci_queue_touches(dev->queues[i], r))
            return false;
    return !r->users;
}

static bool all_memory_is_free(const struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (holds_memory(dev->queues[i]))
            return false;
    return true;
}

bool pump_unmap_is_ready(struct vpci_dev *dev)
{
    if (dev->unmap.flags & VFU_DMA_UNMAP_ALL)
        return all_memory_is_free(dev);
    struct vpci_range *r = vpci_mem_exact(dev->mem, dev->unmap.addr, dev->unmap.size);
    return !r || range_is_free(dev, r);
}

static bool op_is_ready(struct vpci_dev *dev)
{
    switch (dev->op) {
    case OP_DRAIN: return is_at_rest(dev, !dev->held_by_bus_master);
    case OP_UNMAP: return pump_unmap_is_ready(dev);
    case OP_QUIESCE: return dev->drops ? is_at_rest(dev, false) : pump_unmap_is_ready(dev);
    case OP_CLOSING: return is_at_rest(dev, false);
    case OP_STOPPING: return all_memory_is_free(dev);
    default: return false;
    }
}

static void finish_drain(struct vpci_dev *dev)
{
    struct order *o = dev->answer;
    dev->answer = NULL;
    effects_apply(dev, o);
    dev->conn.versioned |= dev->request.command == VFU_VERSION && !o->error;
    pump_begin(dev, OP_NONE);
    reply(dev, o->error, o->payload, o->len, NULL, 0);
    order_free(o);
}

static void finish_quiesce(struct vpci_dev *dev)
{
    pump_begin(dev, OP_NONE);
    dev->front->at_rest(dev->front_state);
}

/* The client's life is over and nothing of it is in flight: Python is told, and makes the function fresh. */
static void finish_closing(struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        effects_stop_queue(dev->queues[i]);
    vpci_mem_clear(dev->mem);
    pump_forget_eventfds(dev);
    dev->request = (struct vfu_header){.flags = VFU_F_NO_REPLY};
    pump_begin(dev, OP_PYTHON);
    mailbox_message(&dev->box, &(vpci_event){.kind = VPCI_EVENT_CLIENT_GONE, .pid = dev->stats.client_pid});
    dev->stats.client_pid = 0;
}

/* Used entries that only the client could take are dropped: its guest loses the device now. */
static void finish_stopping(struct vpci_dev *dev)
{
    dev->front->drop(dev->front_state);
    for (uint32_t i = 0; i < dev->n_queues; i++)
        dev->queues[i]->draining = true;
    far_drop(dev);
    pump_begin(dev, OP_ENDED);
}

static void op_finish(struct vpci_dev *dev)
{
    static void (*const finish[])(struct vpci_dev *) = {
        [OP_DRAIN] = finish_drain, [OP_UNMAP] = message_finish_unmap, [OP_QUIESCE] = finish_quiesce,
        [OP_CLOSING] = finish_closing, [OP_STOPPING] = finish_stopping,
    };
    publish_all(dev);   /* what was finished is shown while the ring may still be touched */
    finish[dev->op](dev);
}

static void cancel_what_can_be(struct vpci_dev *dev)
{
    dev->op_cancelled = true;
    pump_note(dev, (vpci_event){.note = VPCI_NOTE_CANCEL, .a = in_flight(dev, false)});
    for (uint32_t i = 0; i < dev->n_queues; i++) {
        vpci_queue *q = dev->queues[i];
        bool waited_for = q->draining || dev->op != OP_DRAIN || dev->held_by_bus_master;
        if (waited_for && q->in_flight && q->engine->cancel)
            q->engine->cancel(q->engine_state, q->index);
    }
}

/* The client stops listening after 5 s and would take a late reply for garbage: an honest close is better. */
static void give_up(struct vpci_dev *dev)
{
    dev->op_given_up = true;
    pump_note(dev, (vpci_event){.note = VPCI_NOTE_STUCK, .a = in_flight(dev, false)});
    dev->front->drop(dev->front_state);
    if (dev->op == OP_STOPPING)
        finish_stopping(dev);
}

static bool waits_for_work(const struct vpci_dev *dev)
{
    return dev->op > OP_NONE && dev->op < OP_ENDED;
}

static void watch_the_clock(struct vpci_dev *dev)
{
    if (!waits_for_work(dev))
        return;
    uint64_t waited = now_ms() - dev->op_since_ms;
    if (waited >= dev->cancel_ms && !dev->op_cancelled)
        cancel_what_can_be(dev);
    if (waited >= dev->close_ms && !dev->op_given_up)
        give_up(dev);
}

/* ---- clients, as the front tells of them ---- */

static uint32_t peer_pid(int fd)
{
    struct ucred cred = {0};
    socklen_t len = sizeof(cred);
    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len);
    return (uint32_t)cred.pid;
}

void pump_connected(struct vpci_dev *dev, int fd)
{
    uint32_t pid = peer_pid(fd);
    dev->stats.clients++;
    dev->stats.client_pid = pid;
    pump_note(dev, (vpci_event){.note = VPCI_NOTE_CLIENT, .a = pid});
}

void pump_turned_away(struct vpci_dev *dev, int fd)
{
    dev->stats.refused_clients++;
    pump_note(dev, (vpci_event){.note = VPCI_NOTE_REFUSED, .a = peer_pid(fd), .b = dev->stats.client_pid});
}

static void drop_all_work(struct vpci_dev *dev)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        dev->queues[i]->draining = true;
    far_drop(dev);
}

void pump_begin_closing(struct vpci_dev *dev)
{
    pump_begin(dev, OP_CLOSING);
    drop_all_work(dev);
}

bool pump_quiesce(struct vpci_dev *dev, bool drop)
{
    dev->drops = drop;
    if (drop)
        drop_all_work(dev);
    pump_begin(dev, OP_QUIESCE);
    bool rests = op_is_ready(dev);
    if (rests)
        pump_begin(dev, OP_NONE);
    publish_all(dev);   /* what was finished is shown while the ring may still be touched */
    return rests;
}

/* An unmap is an operation too, but one that is mostly ready at once. */
static void execute_all(struct vpci_dev *dev)
{
    dev->front->execute(dev->front_state);
    while (op_is_ready(dev)) {
        op_finish(dev);
        dev->front->execute(dev->front_state);
    }
}

/* ---- the loop ---- */

static int sleep_ms(const struct vpci_dev *dev, bool more)
{
    if (more)
        return 0;
    if (!waits_for_work(dev) || dev->op_given_up)
        return -1;
    uint64_t waited = now_ms() - dev->op_since_ms, until = dev->op_cancelled ? dev->close_ms : dev->cancel_ms;
    return waited < until ? (int)(until - waited) : 0;
}

/* Take an eventfd's count. Returns false when there was none. It never waits, whatever the client, who has the same
 * eventfd, made of it or took from it since epoll told us. */
static bool take_count(int fd)
{
    uint64_t count;
    struct iovec iov = {&count, sizeof(count)};
    return preadv2(fd, &iov, 1, -1, RWF_NOWAIT) == sizeof(count);
}

static void take_kicks(struct vpci_dev *dev, int fd)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (dev->queues[i]->kick_fd == fd && take_count(fd))
            pump_kick(dev, i);
}

static void take_event(struct vpci_dev *dev, const struct epoll_event *ev)
{
    if (ev->data.fd == dev->box.wake_fd)
        mailbox_woken(&dev->box);
    else if (ev->data.fd == dev->watched_unmask_fd) {
        if (take_count(ev->data.fd))
            vpci_irq_unmask_intx(&dev->irq);
    } else if (!watch_event(dev, ev->data.fd, ev->events) &&
               !dev->front->event(dev->front_state, ev->data.fd, ev->events))
        take_kicks(dev, ev->data.fd);
}

static void take_mail(struct vpci_dev *dev)
{
    struct order *orders;
    vpci_chain *done;
    mailbox_collect(&dev->box, &orders, &done, &dev->stop);
    finish_chains(dev, done);
    take_orders(dev, orders);
}

/* The wish to stop waits its turn: the operation of a message comes to its end first, and its reply goes out. */
static void begin_stopping(struct vpci_dev *dev)
{
    if (dev->stop && dev->op == OP_NONE && !dev->in_front)
        pump_begin(dev, OP_STOPPING);
    else if (dev->stop && dev->op_given_up)
        finish_stopping(dev);
}

/* One turn of the loop, awake. Returns whether there is more to do without sleeping. */
static bool turn(struct vpci_dev *dev)
{
    take_mail(dev);
    watch_the_clock(dev);
    while (op_is_ready(dev))
        op_finish(dev);
    if (!dev->in_front)
        execute_all(dev);
    dev->front->send(dev->front_state);
    begin_stopping(dev);
    bool more = look_at_rings(dev);
    dev->front->settle(dev->front_state);
    more |= op_is_ready(dev);
    far_tell(dev);   /* there may be room for its messages now */
    return more;
}

/* Sleep, without the lock, then a turn. */
static bool sleep_and_turn(struct vpci_dev *dev, bool more)
{
    struct epoll_event events[MAX_EVENTS];
    int timeout_ms = sleep_ms(dev, more);
    pthread_mutex_unlock(&dev->awake);
    int n = epoll_wait(dev->epoll_fd, events, MAX_EVENTS, timeout_ms);
    pthread_mutex_lock(&dev->awake);
    for (int i = 0; i < n; i++)
        take_event(dev, &events[i]);
    return turn(dev);
}

void pump_wait(struct vpci_dev *dev)
{
    dev->in_front = true;
    for (bool more = false; dev->op != OP_NONE && dev->op != OP_ENDED;)
        more = sleep_and_turn(dev, more);
    dev->in_front = false;
}

void *pump_run(void *arg)
{
    struct vpci_dev *dev = arg;
    dev->owner = pthread_self();
    pthread_mutex_lock(&dev->awake);
    for (bool more = false; dev->op != OP_ENDED;)
        more = sleep_and_turn(dev, more);
    pthread_mutex_unlock(&dev->awake);
    mailbox_end(&dev->box);
    return NULL;
}
