/* The driver's half of a split virtqueue, fast enough to load a device; vpci/driver/load.py drives it.
 *
 * It includes nothing of the device's side: the ring's arithmetic is written here once more, from the paper. */
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "api/drv.h"

enum { PAGE = 4096, DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4, NO_INTERRUPT = 1, NO_NOTIFY = 1 };
enum { UNWRITTEN = 0xee, SPINS = 256, NS_PER_MS = 1000000, SUB_BITS = 5, SUB = 1 << SUB_BITS, TOP_BIT = 40 };

struct descriptor {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct used_entry {
    uint32_t id;
    uint32_t len;
};

/* One request that may be in flight. */
struct slot {
    uint64_t number;
    uint64_t sent_ns;
    bool busy;
};

struct vpci_drv {
    vpci_drv_setup set;
    vpci_drv_stats stats;
    vpci_drv_piece *pieces;
    struct descriptor *desc;
    uint16_t *avail_flags, *avail_idx, *avail_ring, *used_event;
    uint16_t *used_flags, *used_idx, *avail_event;
    struct used_entry *used_ring;
    uint16_t mask;
    uint16_t avail;           /* chains put into the ring */
    uint16_t published;       /* the avail.idx that the device was shown last */
    uint16_t last_used;
    uint32_t step;            /* descriptors of the table for one slot */
    uint32_t in_flight;
    uint32_t *free;           /* slots that are not busy, a stack */
    uint32_t n_free;
    struct slot *slots;
    uint64_t sent;
    uint64_t state;           /* of the random numbers */
    uint64_t progress_ns;     /* when something last came back, or first went out */
    uint32_t spins;
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint8_t *at(const vpci_drv_place *place, uint32_t slot)
{
    return place->first + slot * place->stride;
}

uint32_t vpci_drv_bucket(uint64_t ns)
{
    if (ns < SUB)
        return (uint32_t)ns;
    uint32_t top = 63 - (uint32_t)__builtin_clzll(ns);
    if (top > TOP_BIT)
        return VPCI_DRV_BUCKETS - 1;
    return (top - SUB_BITS + 1) * SUB + ((uint32_t)(ns >> (top - SUB_BITS)) & (SUB - 1));
}

uint64_t vpci_drv_bucket_ns(uint32_t bucket)
{
    if (bucket < SUB)
        return bucket;
    uint32_t shift = bucket / SUB - 1;
    return ((uint64_t)(SUB + bucket % SUB + 1) << shift) - 1;
}

/* ---- making it ---- */

static bool sensible(const vpci_drv_setup *set)
{
    uint64_t step = set->tables.first ? 1 : set->n_pieces;
    bool size_ok = set->size && set->size <= 32768 && !(set->size & (set->size - 1));
    bool irq_ok = set->wait_rule == VPCI_DRV_POLL || set->irq_fd >= 0;
    return size_ok && irq_ok && set->ring && set->n_pieces && set->depth && set->count && set->depth * step <= set->size;
}

static void find_ring(vpci_drv *drv)
{
    uint32_t n = drv->set.size;
    uint8_t *avail = drv->set.ring + sizeof(struct descriptor) * n;
    size_t driver_part = sizeof(struct descriptor) * n + 2 * (3 + (size_t)n);
    uint8_t *used = drv->set.ring + (driver_part + PAGE - 1) / PAGE * PAGE;
    drv->desc = (struct descriptor *)drv->set.ring;
    drv->avail_flags = (uint16_t *)avail;
    drv->avail_idx = drv->avail_flags + 1;
    drv->avail_ring = drv->avail_flags + 2;
    drv->used_event = drv->avail_ring + n;
    drv->used_flags = (uint16_t *)used;
    drv->used_idx = drv->used_flags + 1;
    drv->used_ring = (struct used_entry *)(used + 4);
    drv->avail_event = (uint16_t *)(drv->used_ring + n);
    drv->mask = (uint16_t)(n - 1);
}

static bool allocate(vpci_drv *drv)
{
    drv->pieces = calloc(drv->set.n_pieces, sizeof(*drv->pieces));
    drv->slots = calloc(drv->set.depth, sizeof(*drv->slots));
    drv->free = calloc(drv->set.depth, sizeof(*drv->free));
    return drv->pieces && drv->slots && drv->free;
}

vpci_drv *vpci_drv_new(const vpci_drv_setup *setup)
{
    vpci_drv *drv = sensible(setup) ? calloc(1, sizeof(*drv)) : NULL;
    if (!drv)
        return NULL;
    drv->set = *setup;
    if (!allocate(drv)) {
        vpci_drv_free(drv);
        return NULL;
    }
    memcpy(drv->pieces, setup->pieces, setup->n_pieces * sizeof(*drv->pieces));
    find_ring(drv);
    drv->step = setup->tables.first ? 1 : setup->n_pieces;
    while (drv->n_free < setup->depth) {
        drv->free[drv->n_free] = setup->depth - 1 - drv->n_free;
        drv->n_free++;
    }
    drv->avail = drv->published = *drv->avail_idx;
    drv->last_used = *drv->used_idx;
    drv->state = setup->random;
    return drv;
}

void vpci_drv_free(vpci_drv *drv)
{
    if (!drv)
        return;
    free(drv->pieces);
    free(drv->slots);
    free(drv->free);
    free(drv);
}

/* ---- to the device ---- */

/* xorshift64*: [Vigna, "An experimental exploration of Marsaglia's xorshift generators"] */
static uint64_t some_number(vpci_drv *drv)
{
    drv->state ^= drv->state >> 12;
    drv->state ^= drv->state << 25;
    drv->state ^= drv->state >> 27;
    return drv->state * 0x2545f4914f6cdd1dull;
}

static uint64_t next_number(vpci_drv *drv)
{
    uint64_t n = drv->set.random ? some_number(drv) >> 11 : drv->sent;
    return drv->set.first + drv->set.step * (n % drv->set.count);
}

static void write_chain(const vpci_drv *drv, struct descriptor *table, uint32_t first, uint32_t slot)
{
    for (uint32_t i = 0; i < drv->set.n_pieces; i++) {
        const vpci_drv_piece *piece = &drv->pieces[i];
        bool last = i + 1 == drv->set.n_pieces;
        table[i].addr = piece->gpa + slot * piece->stride;
        table[i].len = piece->len;
        table[i].flags = (uint16_t)((piece->writable ? DESC_WRITE : 0) | (last ? 0 : DESC_NEXT));
        table[i].next = last ? 0 : (uint16_t)(first + i + 1);
    }
}

static void write_marks(const vpci_drv *drv, uint32_t slot)
{
    uint8_t *mark = drv->set.marks.first ? at(&drv->set.marks, slot) : NULL;
    for (uint32_t i = 0; mark && i < drv->set.n_marks; i++, mark += drv->set.mark_stride) {
        uint64_t word = drv->set.marks_checked ? ~UINT64_C(0) : drv->slots[slot].number + i;
        memcpy(mark, &word, sizeof(word));
    }
}

/* Fill the buffers and descriptors of a slot; returns its head. */
static uint16_t prepare(vpci_drv *drv, uint32_t slot)
{
    uint16_t head = (uint16_t)(slot * drv->step);
    if (drv->set.stamp.first)
        memcpy(at(&drv->set.stamp, slot), &drv->slots[slot].number, sizeof(uint64_t));
    if (drv->set.status.first)
        *at(&drv->set.status, slot) = UNWRITTEN;
    write_marks(drv, slot);
    if (!drv->set.tables.first) {
        write_chain(drv, drv->desc + head, head, slot);
        return head;
    }
    write_chain(drv, (struct descriptor *)at(&drv->set.tables, slot), 0, slot);
    drv->desc[head].addr = drv->set.tables_gpa + slot * drv->set.tables.stride;
    drv->desc[head].len = (uint32_t)sizeof(struct descriptor) * drv->set.n_pieces;
    drv->desc[head].flags = DESC_INDIRECT;
    drv->desc[head].next = 0;
    return head;
}

static bool may_send(const vpci_drv *drv, uint64_t count, uint64_t stop_ns, uint64_t now)
{
    return (!count || drv->sent < count) && (!stop_ns || now < stop_ns);
}

/* Put requests into every free slot, `limit` in all at most; returns how many. */
static uint32_t fill(vpci_drv *drv, uint64_t limit, uint64_t now)
{
    uint32_t put = 0;
    if (!drv->in_flight)
        drv->progress_ns = now;
    for (; drv->n_free && put < limit; put++) {
        uint32_t slot = drv->free[--drv->n_free];
        drv->slots[slot] = (struct slot){ .number = next_number(drv), .sent_ns = now, .busy = true };
        drv->avail_ring[drv->avail++ & drv->mask] = prepare(drv, slot);
        drv->sent++;
        drv->in_flight++;
    }
    return put;
}

/* Show what was filled, and say whether the device asked to be kicked for it. */
static bool publish(vpci_drv *drv)
{
    uint16_t old = drv->published;
    drv->published = drv->avail;
    drv->stats.publications++;
    /* G1: whoever sees the index sees slots, descriptors and buffers */
    __atomic_store_n(drv->avail_idx, drv->avail, __ATOMIC_RELEASE);
    /* G2: else this reads what the device asked for before it went idle, while the device reads the index before this
     * store, and nobody looks at the chain */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (drv->set.kick_rule == VPCI_DRV_KICK_ALWAYS)
        return true;
    if (drv->set.kick_rule == VPCI_DRV_KICK_USED_FLAGS)
        return !(__atomic_load_n(drv->used_flags, __ATOMIC_RELAXED) & NO_NOTIFY);
    uint16_t event = __atomic_load_n(drv->avail_event, __ATOMIC_RELAXED);
    return (uint16_t)(event - old) < (uint16_t)(drv->avail - old);
}

/* ---- from the device ---- */

static void note_fault(vpci_drv *drv, uint32_t fault, uint64_t number, uint64_t got, uint64_t wanted)
{
    if (drv->stats.faults++)
        return;
    drv->stats.fault = fault;
    drv->stats.fault_number = number;
    drv->stats.fault_got = got;
    drv->stats.fault_wanted = wanted;
}

static void check_marks(vpci_drv *drv, uint32_t slot)
{
    uint64_t word, number = drv->slots[slot].number;
    const uint8_t *mark = at(&drv->set.marks, slot);
    for (uint32_t i = 0; i < drv->set.n_marks; i++, mark += drv->set.mark_stride) {
        memcpy(&word, mark, sizeof(word));
        if (word != number + i) {
            note_fault(drv, VPCI_DRV_DATA, number, word, number + i);
            return;
        }
    }
}

static void check(vpci_drv *drv, uint32_t slot, uint32_t len)
{
    uint64_t number = drv->slots[slot].number;
    if (len != drv->set.used_len)
        note_fault(drv, VPCI_DRV_LENGTH, number, len, drv->set.used_len);
    else if (drv->set.status.first && *at(&drv->set.status, slot) != 0)
        note_fault(drv, VPCI_DRV_STATUS, number, *at(&drv->set.status, slot), 0);
    else if (drv->set.marks.first && drv->set.marks_checked)
        check_marks(drv, slot);
}

static bool take(vpci_drv *drv, struct used_entry used, uint64_t now)
{
    uint32_t slot = used.id / drv->step;
    if (used.id % drv->step || slot >= drv->set.depth || !drv->slots[slot].busy) {
        note_fault(drv, VPCI_DRV_HEAD, drv->stats.requests, used.id, drv->set.depth * drv->step);
        return false;
    }
    check(drv, slot, used.len);
    drv->slots[slot].busy = false;
    drv->free[drv->n_free++] = slot;
    drv->in_flight--;
    drv->stats.requests++;
    drv->stats.bytes += drv->set.bytes;
    drv->stats.latency[vpci_drv_bucket(now - drv->slots[slot].sent_ns)]++;
    return true;
}

static uint16_t used_now(const vpci_drv *drv)
{
    /* G3: entries and buffers are read after the index that covers them */
    return __atomic_load_n(drv->used_idx, __ATOMIC_ACQUIRE);
}

/* Take every used entry; returns how many, or -1 when the device broke the ring. */
static int64_t collect(vpci_drv *drv)
{
    uint16_t n = (uint16_t)(used_now(drv) - drv->last_used);
    if (!n)
        return 0;
    if (n > drv->in_flight) {
        note_fault(drv, VPCI_DRV_USED_JUMP, drv->stats.requests, n, drv->in_flight);
        return -1;
    }
    drv->progress_ns = now_ns();
    for (uint16_t i = 0; i < n; i++)
        if (!take(drv, drv->used_ring[drv->last_used++ & drv->mask], drv->progress_ns))
            return -1;
    return n;
}

/* ---- waiting ---- */

/* Ask for an interrupt for the next used entry. Returns false when there is one already. */
static bool arm(vpci_drv *drv)
{
    if (drv->set.wait_rule == VPCI_DRV_USED_EVENT)
        __atomic_store_n(drv->used_event, drv->last_used, __ATOMIC_RELAXED);
    else
        __atomic_store_n(drv->avail_flags, 0, __ATOMIC_RELAXED);
    /* G4: else the device reads the old wish while this reads the old used.idx, and the interrupt never comes */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return used_now(drv) == drv->last_used;
}

static void disarm(vpci_drv *drv)
{
    /* used_event needs nothing: once it was passed it lies behind, for a whole lap of the index */
    if (drv->set.wait_rule != VPCI_DRV_USED_EVENT)
        __atomic_store_n(drv->avail_flags, NO_INTERRUPT, __ATOMIC_RELAXED);
}

static void count_interrupts(vpci_drv *drv)
{
    uint64_t signals;
    if (drv->set.irq_fd >= 0 && read(drv->set.irq_fd, &signals, sizeof(signals)) == sizeof(signals))
        drv->stats.interrupts += signals;
}

static bool is_late(const vpci_drv *drv, uint32_t timeout_ms)
{
    return now_ns() - drv->progress_ns > (uint64_t)timeout_ms * NS_PER_MS;
}

/* Sleep until an interrupt comes, or the caller's fd is readable. When neither comes in time, whatever lies in the ring
 * by now is left there: to take it would hide that its interrupt was lost. */
static int sleep_until_interrupt(vpci_drv *drv, uint32_t timeout_ms)
{
    struct pollfd fds[2] = { { .fd = drv->set.wake_fd, .events = POLLIN }, { .fd = drv->set.irq_fd, .events = POLLIN } };
    int ready = poll(fds, 2, (int)timeout_ms);
    if (ready <= 0)
        return ready < 0 ? VPCI_DRV_DONE : VPCI_DRV_TIMEOUT;
    if (fds[0].revents)
        return VPCI_DRV_WAKE;
    count_interrupts(drv);
    disarm(drv);
    return drv->set.ends_interrupts ? VPCI_DRV_INTERRUPT : VPCI_DRV_DONE;
}

static int wait_polling(vpci_drv *drv, uint32_t timeout_ms)
{
    __builtin_ia32_pause();
    if (++drv->spins % SPINS)
        return VPCI_DRV_DONE;
    if (is_late(drv, timeout_ms))
        return VPCI_DRV_TIMEOUT;
    sched_yield();   /* the device may need this very CPU */
    struct pollfd wake = { .fd = drv->set.wake_fd, .events = POLLIN };
    return poll(&wake, 1, 0) > 0 ? VPCI_DRV_WAKE : VPCI_DRV_DONE;
}

/* DONE: look at the ring again; else what the caller is to do. */
static int wait_for_work(vpci_drv *drv, uint32_t timeout_ms)
{
    if (drv->set.wait_rule == VPCI_DRV_POLL)
        return wait_polling(drv, timeout_ms);
    if (!arm(drv)) {
        disarm(drv);
        return VPCI_DRV_DONE;
    }
    if (is_late(drv, timeout_ms))
        return VPCI_DRV_TIMEOUT;
    return sleep_until_interrupt(drv, timeout_ms);
}

static bool kick(vpci_drv *drv)
{
    const uint64_t one = 1;
    drv->stats.kicks++;
    return drv->set.kick_fd >= 0 && write(drv->set.kick_fd, &one, sizeof(one)) == sizeof(one);
}

/* Leave the queue as it was found. The last requests may have come back before their interrupt was waited for. */
static int finish(vpci_drv *drv)
{
    uint64_t before = drv->stats.interrupts;
    count_interrupts(drv);
    __atomic_store_n(drv->avail_flags, 0, __ATOMIC_RELAXED);
    return drv->set.ends_interrupts && drv->stats.interrupts != before ? VPCI_DRV_INTERRUPT : VPCI_DRV_DONE;
}

int vpci_drv_run(vpci_drv *drv, uint64_t count, uint64_t stop_ns, uint32_t timeout_ms)
{
    disarm(drv);
    for (;;) {
        int64_t got = collect(drv);
        if (got < 0)
            return VPCI_DRV_BROKEN;
        uint64_t now = now_ns();
        bool more = may_send(drv, count, stop_ns, now);
        uint32_t put = more ? fill(drv, count ? count - drv->sent : UINT64_MAX, now) : 0;
        if (put && publish(drv) && !kick(drv))
            return VPCI_DRV_KICK;
        if (!more && !drv->in_flight)
            return finish(drv);
        int why = got || put ? VPCI_DRV_DONE : wait_for_work(drv, timeout_ms);
        if (why != VPCI_DRV_DONE)
            return why;
    }
}

void vpci_drv_read_stats(const vpci_drv *drv, vpci_drv_stats *stats)
{
    *stats = drv->stats;
    stats->in_flight = drv->in_flight;
    stats->not_taken = (uint16_t)(used_now(drv) - drv->last_used);
}
