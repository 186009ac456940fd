/* Interrupts: ISR, the INTx line, MSI-X vectors, and the client's eventfds. The pump hands it SET_IRQS and PCI state;
 * whoever publishes a ring asks it to raise. All under one lock: once a SET_IRQS is answered no thread can still be
 * about to write the eventfd that it replaced. Source: [legacy-header 7], [linux vfio.h]. */
#include "core.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>

int vpci_irq_init(struct vpci_irq *irq, const uint32_t counts[VFU_IRQ_INDICES])
{
    uint32_t n_vectors = counts[VFU_IRQ_MSIX];
    *irq = (struct vpci_irq){.intx_fd = -1, .unmask_fd = -1, .config_vector = VPCI_NO_VECTOR, .n_vectors = n_vectors};
    memcpy(irq->counts, counts, sizeof(irq->counts));
    pthread_mutex_init(&irq->lock, NULL);
    irq->vectors = calloc(n_vectors ? n_vectors : 1, sizeof(*irq->vectors));
    if (!irq->vectors)
        return -ENOMEM;
    for (uint32_t v = 0; v < n_vectors; v++)
        irq->vectors[v].fd = -1;
    return 0;
}

static void replace_fd(int *slot, int fd)
{
    if (*slot >= 0)
        close(*slot);
    *slot = fd;
}

/* A full counter is no loss: then the client has unseen edges enough. An eventfd that would wait for room is asked
 * first, for the client may have made it so and we must never wait. */
static void fire(int fd)
{
    uint64_t one = 1;
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    if (!(fcntl(fd, F_GETFL) & O_NONBLOCK) && poll(&p, 1, 0) <= 0)
        return;
    ssize_t n = write(fd, &one, sizeof(one));
    (void)n;
}

bool vpci_is_eventfd(int fd)
{
    char path[32], name[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, name, sizeof(name) - 1);
    name[n > 0 ? n : 0] = 0;
    return n <= 0 || strstr(name, "[eventfd]");   /* without /proc the client is believed */
}

/* Signal the client: by its eventfd, or by who has it. Returns false when the client has armed none. */
static bool signal_client(struct vpci_irq *irq, int fd, uint32_t vector)
{
    if (irq->trigger)
        return irq->trigger(irq->trigger_state, vector) == 0;
    if (fd >= 0)
        fire(fd);
    return fd >= 0;
}

static bool intx_level(const struct vpci_irq *irq)
{
    return !irq->msix && !irq->intx_disabled && __atomic_load_n(&irq->isr, __ATOMIC_SEQ_CST);
}

/* INTx is a level and travels as an edge: one edge, then masked until the client has seen to it. A front with eventfds
 * of its own does not announce that mask, so there it is one edge each time that the level rises. */
static void intx_update(struct vpci_irq *irq)
{
    irq->intx_signalled &= intx_level(irq);
    if (!intx_level(irq) || irq->intx_masked || irq->intx_signalled || !signal_client(irq, irq->intx_fd, 0))
        return;
    irq->intx_masked = !irq->trigger;
    irq->intx_signalled = irq->trigger;
}

static void vector_update(struct vpci_irq *irq, struct vpci_vector *v)
{
    if (!v->pending || !irq->msix || irq->function_mask || v->masked || v->entry_masked)
        return;
    v->pending = !signal_client(irq, v->fd, (uint32_t)(v - irq->vectors));
}

static void vectors_update(struct vpci_irq *irq)
{
    for (uint32_t i = 0; i < irq->n_vectors; i++)
        vector_update(irq, &irq->vectors[i]);
}

static void update_all(struct vpci_irq *irq)
{
    intx_update(irq);
    vectors_update(irq);
}

bool vpci_irq_raise(struct vpci_irq *irq, uint16_t vector, uint32_t isr_bit)
{
    bool raised = true;
    pthread_mutex_lock(&irq->lock);
    if (!irq->msix) {
        __atomic_fetch_or(&irq->isr, isr_bit, __ATOMIC_SEQ_CST);   /* D5: before the line */
        intx_update(irq);
    } else if (vector < irq->n_vectors) {
        irq->vectors[vector].pending = true;
        vector_update(irq, &irq->vectors[vector]);
    } else {
        raised = false;   /* NO_VECTOR */
    }
    pthread_mutex_unlock(&irq->lock);
    return raised;
}

uint32_t vpci_irq_read_isr(struct vpci_irq *irq)
{
    if (irq->trigger)
        irq->intx_signalled = false;   /* the level falls; all of this is then on the pump's thread */
    return __atomic_exchange_n(&irq->isr, 0, __ATOMIC_SEQ_CST);
}

static void clear(struct vpci_irq *irq)
{
    __atomic_store_n(&irq->isr, 0, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < irq->n_vectors; i++)
        irq->vectors[i].pending = false;
}

void vpci_irq_clear(struct vpci_irq *irq)
{
    pthread_mutex_lock(&irq->lock);
    clear(irq);
    pthread_mutex_unlock(&irq->lock);
}

void vpci_irq_set_msix(struct vpci_irq *irq, bool enabled, bool function_mask)
{
    pthread_mutex_lock(&irq->lock);
    if (irq->msix != enabled)
        clear(irq);
    irq->msix = enabled;
    irq->function_mask = function_mask;
    vectors_update(irq);
    pthread_mutex_unlock(&irq->lock);
}

void vpci_irq_set_intx_disable(struct vpci_irq *irq, bool disabled)
{
    pthread_mutex_lock(&irq->lock);
    irq->intx_disabled = disabled;
    intx_update(irq);
    pthread_mutex_unlock(&irq->lock);
}

void vpci_irq_entry_mask(struct vpci_irq *irq, uint32_t vector, bool masked)
{
    pthread_mutex_lock(&irq->lock);
    if (vector < irq->n_vectors) {
        irq->vectors[vector].entry_masked = masked;
        vector_update(irq, &irq->vectors[vector]);
    }
    pthread_mutex_unlock(&irq->lock);
}

/* ---- SET_IRQS ---- */

struct request {
    uint32_t index, start, count, flags;
    const uint8_t *bools;
    int *fds;
    uint32_t n_fds;
};

static void set_intx_fd(struct vpci_irq *irq, int fd)
{
    replace_fd(&irq->intx_fd, fd);
    irq->intx_masked = false;
    intx_update(irq);
}

static void set_vector_fd(struct vpci_irq *irq, uint32_t vector, int fd)
{
    replace_fd(&irq->vectors[vector].fd, fd);
    vector_update(irq, &irq->vectors[vector]);
}

static void set_fd(struct vpci_irq *irq, uint32_t index, uint32_t i, int fd)
{
    if (index == VFU_IRQ_INTX)
        set_intx_fd(irq, fd);
    else if (index == VFU_IRQ_MSIX)
        set_vector_fd(irq, i, fd);
    else if (fd >= 0)
        close(fd);   /* the error interrupt is never raised here */
}

static void set_mask(struct vpci_irq *irq, uint32_t index, uint32_t i, bool masked)
{
    if (index == VFU_IRQ_INTX)
        irq->intx_masked = masked;
    else if (index == VFU_IRQ_MSIX)
        irq->vectors[i].masked = masked;
}

/* A trigger by the client itself (none or bool data) is a loop-back test: it fires and leaves ISR alone. */
static void loop_back(struct vpci_irq *irq, uint32_t index, uint32_t i)
{
    int fd = index == VFU_IRQ_INTX ? irq->intx_fd : index == VFU_IRQ_MSIX ? irq->vectors[i].fd : -1;
    if (fd >= 0)
        fire(fd);
}

static bool selected(const struct request *r, uint32_t n)
{
    return !(r->flags & VFU_IRQ_DATA_BOOL) || r->bools[n];
}

static int trigger(struct vpci_irq *irq, const struct request *r)
{
    if (r->flags & VFU_IRQ_DATA_EVENTFD) {
        for (uint32_t n = 0; n < r->count; n++) {
            set_fd(irq, r->index, r->start + n, r->n_fds ? r->fds[n] : -1);
            if (r->n_fds)
                r->fds[n] = -1;
        }
        return 0;
    }
    for (uint32_t n = 0; n < r->count; n++)
        if (selected(r, n))
            loop_back(irq, r->index, r->start + n);
    return 0;
}

/* The client may unmask INTx by an eventfd; the pump watches it. */
static int set_unmask_fd(struct vpci_irq *irq, const struct request *r)
{
    replace_fd(&irq->unmask_fd, r->n_fds ? r->fds[0] : -1);
    if (r->n_fds)
        r->fds[0] = -1;
    return 0;
}

void vpci_irq_unmask_intx(struct vpci_irq *irq)
{
    pthread_mutex_lock(&irq->lock);
    irq->intx_masked = irq->intx_signalled = false;
    intx_update(irq);
    pthread_mutex_unlock(&irq->lock);
}

static int mask(struct vpci_irq *irq, const struct request *r)
{
    bool masked = r->flags & VFU_IRQ_ACTION_MASK;
    if (r->flags & VFU_IRQ_DATA_EVENTFD)
        return masked || r->index != VFU_IRQ_INTX ? ENOTSUP : set_unmask_fd(irq, r);
    for (uint32_t n = 0; n < r->count; n++)
        if (selected(r, n))
            set_mask(irq, r->index, r->start + n, masked);
    update_all(irq);
    return 0;
}

void vpci_irq_mask(struct vpci_irq *irq, uint32_t index, uint32_t start, uint32_t count, bool masked)
{
    pthread_mutex_lock(&irq->lock);
    for (uint32_t i = start; i < start + count && i < irq->counts[index]; i++)
        set_mask(irq, index, i, masked);
    irq->intx_signalled &= masked || index != VFU_IRQ_INTX;
    update_all(irq);
    pthread_mutex_unlock(&irq->lock);
}

/* A new eventfd hears of a line that is up, so INTx gets its edge again; on a level one edge too many is no harm. */
void vpci_irq_armed(struct vpci_irq *irq)
{
    pthread_mutex_lock(&irq->lock);
    irq->intx_signalled = false;
    update_all(irq);
    pthread_mutex_unlock(&irq->lock);
}

/* Trigger, no data, count 0: the client wants nothing of this index any more. */
static int disable(struct vpci_irq *irq, uint32_t index, uint32_t n_irqs)
{
    if (index == VFU_IRQ_INTX)
        replace_fd(&irq->unmask_fd, -1);
    for (uint32_t i = 0; i < n_irqs; i++)
        set_fd(irq, index, i, -1);
    return 0;
}

static bool is_one_bit(uint32_t v)
{
    return v && !(v & (v - 1));
}

enum {
    DATA_FLAGS = VFU_IRQ_DATA_NONE | VFU_IRQ_DATA_BOOL | VFU_IRQ_DATA_EVENTFD,
    ACTION_FLAGS = VFU_IRQ_ACTION_MASK | VFU_IRQ_ACTION_UNMASK | VFU_IRQ_ACTION_TRIGGER
};

static int check(const struct request *r, uint32_t n_irqs, size_t data_len)
{
    if (r->flags & ~(uint32_t)(DATA_FLAGS | ACTION_FLAGS) || !is_one_bit(r->flags & DATA_FLAGS) ||
        !is_one_bit(r->flags & ACTION_FLAGS))
        return EINVAL;
    if (r->start > n_irqs || r->count > n_irqs - r->start)
        return EINVAL;
    if (!r->count && r->flags != (VFU_IRQ_DATA_NONE | VFU_IRQ_ACTION_TRIGGER))
        return EINVAL;
    if ((r->flags & VFU_IRQ_DATA_BOOL) && data_len < r->count)
        return EINVAL;
    if (r->n_fds && (!(r->flags & VFU_IRQ_DATA_EVENTFD) || r->n_fds != r->count))
        return EINVAL;
    for (uint32_t i = 0; i < r->n_fds; i++)
        if (!vpci_is_eventfd(r->fds[i]))
            return EINVAL;
    return 0;
}

int vpci_irq_set(struct vpci_irq *irq, const struct vfu_irq_set *set, const uint8_t *data, size_t data_len,
                 int *fds, uint32_t n_fds)
{
    struct request r = {set->index, set->start, set->count, set->flags, data, fds, n_fds};
    if (r.index >= VFU_IRQ_INDICES)
        return EINVAL;
    int error = check(&r, irq->counts[r.index], data_len);
    if (error)
        return error;
    pthread_mutex_lock(&irq->lock);
    if (!r.count)
        error = disable(irq, r.index, irq->counts[r.index]);
    else
        error = r.flags & VFU_IRQ_ACTION_TRIGGER ? trigger(irq, &r) : mask(irq, &r);
    pthread_mutex_unlock(&irq->lock);
    return error;
}

void vpci_irq_forget_client(struct vpci_irq *irq)
{
    pthread_mutex_lock(&irq->lock);
    replace_fd(&irq->intx_fd, -1);
    replace_fd(&irq->unmask_fd, -1);
    irq->intx_masked = false;
    for (uint32_t i = 0; i < irq->n_vectors; i++) {
        replace_fd(&irq->vectors[i].fd, -1);
        irq->vectors[i] = (struct vpci_vector){.fd = -1};
    }
    pthread_mutex_unlock(&irq->lock);
}

void vpci_irq_fini(struct vpci_irq *irq)
{
    vpci_irq_forget_client(irq);
    free(irq->vectors);
    pthread_mutex_destroy(&irq->lock);
}

/* PCI's Interrupt Status tells of the interrupt whether Interrupt Disable lets it out or not. */
void vpci_irq_read_status(struct vpci_irq *irq, uint32_t *isr, uint32_t *status)
{
    pthread_mutex_lock(&irq->lock);
    *isr = __atomic_load_n(&irq->isr, __ATOMIC_SEQ_CST);
    *status = !irq->msix && *isr;
    pthread_mutex_unlock(&irq->lock);
}

uint32_t vpci_irq_pending(struct vpci_irq *irq, uint8_t *buf, uint32_t len)
{
    uint32_t n = (irq->n_vectors + 7) / 8;
    n = n < len ? n : len;
    memset(buf, 0, n);
    pthread_mutex_lock(&irq->lock);
    for (uint32_t v = 0; v < irq->n_vectors && v / 8 < n; v++)
        buf[v / 8] |= (uint8_t)(irq->vectors[v].pending << v % 8);
    pthread_mutex_unlock(&irq->lock);
    return n;
}
