/* The split virtqueue, device side. The pump asks for chains and gives used entries back; mem.c turns addresses
 * into pointers. Nothing else reads or writes a ring. D and G numbers are the ordering rules of docs/rings.md. */
#include "core.h"

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
enum { DESC_BYTES = 16, USED_ELEM_BYTES = 8 };
enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };
enum { INLINE_IOV = 20, MAX_QUEUE_SIZE = 32768 };

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

/* A chain and what it holds. The pieces start inline and move to the heap when a chain has many. */
struct chain {
    vpci_chain pub;              /* first: a vpci_chain pointer is a struct chain pointer */
    struct chain *next_free;
    struct vpci_range **held;    /* one a piece, counted in range->users */
    struct vpci_range *last_held;/* the one that pub.last_in points into */
    uint32_t n_iov, cap;
    struct iovec inline_iov[INLINE_IOV];
    struct vpci_range *inline_held[INLINE_IOV];
};

/* ---- words of the ring ---- */

static uint8_t *at(const vpci_queue *q, uint32_t off)
{
    return q->pages[off >> PAGE_SHIFT] + (off & (PAGE_SIZE_BYTES - 1));
}

/* D7: single aligned accesses; every offset of a word in the ring is a multiple of its size. */
static uint16_t load16(const vpci_queue *q, uint32_t off)
{
    return __atomic_load_n((uint16_t *)at(q, off), __ATOMIC_RELAXED);
}

static void store16(const vpci_queue *q, uint32_t off, uint16_t value)
{
    __atomic_store_n((uint16_t *)at(q, off), value, __ATOMIC_RELAXED);
}

static void store32(const vpci_queue *q, uint32_t off, uint32_t value)
{
    __atomic_store_n((uint32_t *)at(q, off), value, __ATOMIC_RELAXED);
}

static uint32_t avail_flags_off(const vpci_queue *q) { return q->size * DESC_BYTES; }
static uint32_t avail_idx_off(const vpci_queue *q) { return avail_flags_off(q) + 2; }
static uint32_t avail_ring_off(const vpci_queue *q, uint16_t idx)
{
    return avail_flags_off(q) + 4 + 2 * (idx & (q->size - 1));
}
static uint32_t used_event_off(const vpci_queue *q) { return avail_flags_off(q) + 4 + 2 * q->size; }
static uint32_t used_idx_off(const vpci_queue *q) { return q->used_off + 2; }
static uint32_t used_elem_off(const vpci_queue *q, uint16_t idx)
{
    return q->used_off + 4 + USED_ELEM_BYTES * (idx & (q->size - 1));
}
static uint32_t avail_event_off(const vpci_queue *q) { return q->used_off + 4 + USED_ELEM_BYTES * q->size; }

static uint32_t page_up(uint32_t off)
{
    return (off + PAGE_SIZE_BYTES - 1) & ~(PAGE_SIZE_BYTES - 1);
}

int vpci_need_event(uint16_t event, uint16_t new_idx, uint16_t old_idx)
{
    return (uint16_t)(new_idx - event - 1) < (uint16_t)(new_idx - old_idx);
}

/* ---- life of a queue ---- */

vpci_queue *vpci_queue_new(vpci_mem *mem, uint32_t size, uint32_t max_sg)
{
    if (!size || size > MAX_QUEUE_SIZE || size & (size - 1))
        return NULL;
    vpci_queue *q = calloc(1, sizeof(*q));
    if (!q)
        return NULL;
    q->mem = mem;
    q->size = size;
    q->max_sg = max_sg;
    q->vector = VPCI_NO_VECTOR;
    q->used_off = page_up(used_event_off(q) + 2);
    q->n_pages = page_up(avail_event_off(q) + 2) >> PAGE_SHIFT;
    q->pages = calloc(q->n_pages, sizeof(*q->pages));
    if (!q->pages) {
        free(q);
        return NULL;
    }
    return q;
}

void vpci_queue_free(vpci_queue *q)
{
    if (!q)
        return;
    for (struct chain *c = q->free_chains, *next; c; c = next) {
        next = c->next_free;
        free(c);
    }
    free(q->pages);
    free(q);
}

static uint64_t ring_base(const vpci_queue *q)
{
    return (uint64_t)q->pfn << PAGE_SHIFT;
}

/* The driver's part is read, ours is written; the used part starts on a page of its own. */
static uint32_t page_perm(const vpci_queue *q, uint32_t page)
{
    return page << PAGE_SHIFT >= q->used_off ? VPCI_MEM_WRITE : VPCI_MEM_READ;
}

int vpci_queue_remap(vpci_queue *q)
{
    bool whole = q->started;
    for (uint32_t i = 0; i < q->n_pages; i++) {
        struct vpci_piece p;
        uint64_t gpa = ring_base(q) + ((uint64_t)i << PAGE_SHIFT);
        bool mapped = q->started && vpci_mem_piece(q->mem, gpa, PAGE_SIZE_BYTES, page_perm(q, i), &p);
        q->pages[i] = mapped ? p.hva : NULL;
        whole &= mapped;
    }
    q->suspended = q->started && !whole;
    return whole;
}

bool vpci_queue_touches(const vpci_queue *q, const struct vpci_range *range)
{
    uint64_t base = ring_base(q), end = base + ((uint64_t)q->n_pages << PAGE_SHIFT) - 1;
    return q->started && base <= range->gpa + (range->size - 1) && range->gpa <= end;
}

void vpci_queue_start(vpci_queue *q, uint32_t pfn)
{
    q->pfn = pfn;
    q->started = true;
    q->last_avail = q->avail_seen = q->used_idx = q->published = 0;
    q->broken = VPCI_RING_OK;
    q->no_notify = false;
    vpci_queue_remap(q);
}

void vpci_queue_stop(vpci_queue *q)
{
    q->pfn = 0;
    q->started = false;
    q->broken = VPCI_RING_OK;
    vpci_queue_remap(q);
}

void vpci_queue_rules(vpci_queue *q, uint32_t rules)
{
    q->rules = rules;
}

void vpci_ring_break(vpci_queue *q, uint16_t reason, uint16_t head, uint64_t addr)
{
    q->broken = reason;
    q->broken_head = head;
    q->broken_addr = addr;
    q->ring_errors++;
}

void vpci_queue_read_stats(const vpci_queue *q, vpci_queue_stats *s)
{
    *s = (vpci_queue_stats){
        .kicks = q->kicks, .chains = q->chains, .used = q->used, .interrupts = q->interrupts,
        .suppressed = q->suppressed, .request_errors = q->request_errors, .zero_len = q->zero_len,
        .ring_errors = q->ring_errors, .ignored_kicks = q->ignored_kicks, .in_flight = q->in_flight,
        .broken = q->broken, .broken_head = q->broken_head, .broken_addr = q->broken_addr,
        .last_avail = q->last_avail, .used_idx = q->used_idx, .started = q->started,
        .suspended = q->suspended, .avail_idx = q->avail_seen, .rules = q->rules,
    };
}

/* ---- chains ---- */

static struct chain *chain_get(vpci_queue *q)
{
    struct chain *c = q->free_chains;
    if (c)
        q->free_chains = c->next_free;
    else if (!(c = malloc(sizeof(*c))))
        return NULL;
    c->pub = (vpci_chain){.queue = q, .queue_index = q->index, .iov = c->inline_iov};
    c->held = c->inline_held;
    c->last_held = NULL;
    c->n_iov = 0;
    c->cap = INLINE_IOV;
    return c;
}

static void chain_put(vpci_queue *q, struct chain *c)
{
    for (uint32_t i = 0; i < c->n_iov; i++)
        c->held[i]->users--;
    if (c->last_held)
        c->last_held->users--;
    if (c->held != c->inline_held) {
        free(c->held);
        free(c->pub.iov);
    }
    c->next_free = q->free_chains;
    q->free_chains = c;
    q->in_flight--;
}

/* A chain may have as many pieces as descriptors, and then some for borders between ranges. */
static uint32_t max_pieces(const vpci_queue *q)
{
    return 2 * q->max_sg + 64;
}

static bool chain_grow(struct chain *c, uint32_t limit)
{
    uint32_t cap = c->cap * 4 < limit ? c->cap * 4 : limit;
    struct iovec *iov = cap > c->cap ? malloc(cap * sizeof(*iov)) : NULL;
    struct vpci_range **held = iov ? malloc(cap * sizeof(struct vpci_range *)) : NULL;
    if (!held) {
        free(iov);
        return false;
    }
    memcpy(iov, c->pub.iov, c->n_iov * sizeof(*iov));
    memcpy(held, c->held, c->n_iov * sizeof(struct vpci_range *));
    if (c->held != c->inline_held) {
        free(c->held);
        free(c->pub.iov);
    }
    c->pub.iov = iov;
    c->held = held;
    c->cap = cap;
    return true;
}

static uint16_t add_piece(vpci_queue *q, struct chain *c, const struct vpci_piece *p)
{
    if (c->n_iov == c->cap && !chain_grow(c, max_pieces(q)))
        return VPCI_CHAIN_TOO_LONG;
    c->pub.iov[c->n_iov] = (struct iovec){p->hva, p->len};
    c->held[c->n_iov++] = p->range;
    p->range->users++;
    return VPCI_CHAIN_OK;
}

/* One descriptor's buffer, cut at the borders of ranges. Returns enum vpci_chain_error. */
static uint16_t add_buffer(vpci_queue *q, struct chain *c, const struct desc *d)
{
    bool in = d->flags & DESC_WRITE;
    uint64_t gpa = d->addr, left = d->len;
    if (gpa + left - 1 < gpa)
        return VPCI_CHAIN_WRAP;
    if (!in && c->pub.in_iovs)
        return VPCI_CHAIN_ORDER;
    if ((uint64_t)c->pub.out_len + c->pub.in_len + left > UINT32_MAX)
        return VPCI_CHAIN_TOO_LONG;
    *(in ? &c->pub.in_len : &c->pub.out_len) += d->len;
    for (struct vpci_piece p; left; gpa += p.len, left -= p.len) {
        if (!vpci_mem_piece(q->mem, gpa, left, in ? VPCI_MEM_WRITE : VPCI_MEM_READ, &p))
            return VPCI_CHAIN_UNMAPPED;
        uint16_t error = add_piece(q, c, &p);
        if (error)
            return error;
        ++*(in ? &c->pub.in_iovs : &c->pub.out_iovs);
    }
    return VPCI_CHAIN_OK;
}

/* ---- the walk ---- */

/* Where descriptors come from: the ring's own table, or an indirect one in guest memory. */
struct walk {
    vpci_queue *q;
    uint16_t head;
    bool indirect;
    uint64_t table;      /* gpa of the indirect table */
    uint32_t entries;    /* of the table in use */
    uint32_t slot;       /* the descriptor to read next */
    uint32_t seen;       /* descriptors read from this table */
    uint32_t total;      /* descriptors of the chain */
    struct desc last_in; /* the last writable descriptor, len 0: none */
};

static bool walk_break(struct walk *w, uint16_t reason, uint64_t addr)
{
    vpci_ring_break(w->q, reason, w->head, addr);
    return false;
}

static uint64_t walk_addr(const struct walk *w)
{
    return (w->indirect ? w->table : ring_base(w->q)) + (uint64_t)w->slot * DESC_BYTES;
}

/* D6: a descriptor is copied once, and the copy is judged; the guest may rewrite the original meanwhile. */
static bool fetch(struct walk *w, struct desc *d)
{
    uint64_t raw[2];
    if (w->indirect) {
        if (vpci_mem_read(w->q->mem, walk_addr(w), raw, sizeof(raw)) < 0)
            return walk_break(w, VPCI_RING_TABLE_UNMAPPED, walk_addr(w));
    } else {
        const uint64_t *p = (const uint64_t *)at(w->q, w->slot * DESC_BYTES);
        raw[0] = __atomic_load_n(p, __ATOMIC_RELAXED);
        raw[1] = __atomic_load_n(p + 1, __ATOMIC_RELAXED);
    }
    *d = (struct desc){raw[0], (uint32_t)raw[1], (uint16_t)(raw[1] >> 32), (uint16_t)(raw[1] >> 48)};
    return true;
}

static bool enter_table(struct walk *w, const struct desc *d)
{
    if (!(w->q->rules & VPCI_RING_INDIRECT))
        return walk_break(w, VPCI_RING_INDIRECT_NOT_ACKED, d->addr);
    if (w->indirect)
        return walk_break(w, VPCI_RING_INDIRECT_NESTED, d->addr);
    if (d->flags & DESC_NEXT)
        return walk_break(w, VPCI_RING_INDIRECT_NEXT, d->addr);
    if (!d->len || d->len % DESC_BYTES)
        return walk_break(w, VPCI_RING_TABLE_LENGTH, d->len);
    if (!vpci_mem_whole(w->q->mem, d->addr, d->len, VPCI_MEM_READ))
        return walk_break(w, VPCI_RING_TABLE_UNMAPPED, d->addr);
    w->indirect = true;
    w->table = d->addr;
    w->entries = d->len / DESC_BYTES;
    w->slot = w->seen = 0;
    return true;
}

/* Step to the descriptor that d names. Returns false at the end and when the ring is broken. */
static bool follow(struct walk *w, const struct desc *d)
{
    if (!(d->flags & DESC_NEXT))
        return false;
    if (d->next >= w->entries)
        return walk_break(w, VPCI_RING_NEXT, walk_addr(w));
    w->slot = d->next;
    return true;
}

/* A falling measure bounds the walk: each table is read at most once a slot. */
static bool count(struct walk *w)
{
    if (w->seen++ >= w->entries)
        return walk_break(w, VPCI_RING_LOOP, walk_addr(w));
    return true;
}

static bool add_desc(struct walk *w, struct chain *c, const struct desc *d)
{
    if (w->total++ >= w->q->max_sg)
        return walk_break(w, VPCI_RING_MAX_SG, walk_addr(w));
    if (!d->len) {
        w->q->zero_len++;
        return true;
    }
    if (d->flags & DESC_WRITE)
        w->last_in = *d;
    if (!c->pub.error)
        c->pub.error = add_buffer(w->q, c, d);
    return true;
}

/* Reads one descriptor and moves on; false ends the walk, with q->broken telling why if it was not the end. */
static bool step(struct walk *w, struct chain *c)
{
    struct desc d;
    if (!count(w) || !fetch(w, &d))
        return false;
    if (d.flags & DESC_INDIRECT)
        return enter_table(w, &d);
    return add_desc(w, c, &d) && follow(w, &d);
}

static void find_last_in(struct walk *w, struct chain *c)
{
    struct vpci_piece p;
    const struct desc *d = &w->last_in;
    uint64_t last = d->addr + d->len - 1;
    if (d->len && last >= d->addr && vpci_mem_piece(w->q->mem, last, 1, VPCI_MEM_WRITE, &p)) {
        c->pub.last_in = p.hva;
        c->last_held = p.range;
        p.range->users++;
    }
}

/* D1: avail.idx is loaded (acquire) before the slots it covers, once a batch. */
static bool something_available(vpci_queue *q)
{
    if (q->avail_seen != q->last_avail)
        return true;
    q->avail_seen = __atomic_load_n((uint16_t *)at(q, avail_idx_off(q)), __ATOMIC_ACQUIRE);
    uint16_t n = (uint16_t)(q->avail_seen - q->last_avail);
    if (n > q->size) {
        vpci_ring_break(q, VPCI_RING_AVAIL_JUMP, 0, q->avail_seen);
        return false;
    }
    return n;
}

static bool can_fetch(const vpci_queue *q)
{
    return q->started && !q->suspended && !q->broken && q->in_flight < q->size;
}

vpci_chain *vpci_ring_pop(vpci_queue *q)
{
    if (!can_fetch(q) || !something_available(q))
        return NULL;
    uint16_t head = load16(q, avail_ring_off(q, q->last_avail));
    if (head >= q->size) {
        vpci_ring_break(q, VPCI_RING_HEAD, head, ring_base(q) + avail_ring_off(q, q->last_avail));
        return NULL;
    }
    struct chain *c = chain_get(q);
    if (!c)
        return NULL;
    q->in_flight++;
    c->pub.head = head;
    struct walk w = {.q = q, .head = head, .entries = q->size, .slot = head};
    while (step(&w, c))
        ;
    if (q->broken) {
        chain_put(q, c);
        return NULL;
    }
    find_last_in(&w, c);
    q->request_errors += c->pub.error != VPCI_CHAIN_OK;
    q->chains++;
    q->last_avail++;
    return &c->pub;
}

void vpci_ring_push(vpci_queue *q, vpci_chain *chain, uint32_t len)
{
    uint32_t off = used_elem_off(q, q->used_idx);
    /* Two stores: an element may lie across two pages. */
    store32(q, off, chain->head);
    store32(q, off + 4, len);
    q->used_idx++;
    q->used++;
    chain_put(q, (struct chain *)chain);
}

void vpci_ring_drop(vpci_queue *q, vpci_chain *chain)
{
    chain_put(q, (struct chain *)chain);
}

/* ---- events ---- */

/* Bit 24: nothing available, nothing in flight. */
static bool ran_empty(const vpci_queue *q)
{
    return (q->rules & VPCI_RING_NOTIFY_ON_EMPTY) && !q->in_flight && load16(q, avail_idx_off(q)) == q->last_avail;
}

static bool interrupt_wanted(const vpci_queue *q, uint16_t old)
{
    if (q->rules & VPCI_RING_USED_EVENT)
        return vpci_need_event(load16(q, used_event_off(q)), q->published, old);
    return !(load16(q, avail_flags_off(q)) & AVAIL_NO_INTERRUPT);
}

int vpci_ring_publish(vpci_queue *q)
{
    uint16_t old = q->published;
    if (!q->started || q->suspended || q->broken || q->used_idx == old)
        return 0;
    /* D2: data and elements before the index. */
    __atomic_store_n((uint16_t *)at(q, used_idx_off(q)), q->used_idx, __ATOMIC_RELEASE);
    q->published = q->used_idx;
    /* D3 with G4: without it our load of flags or used_event passes our store of used.idx, and the driver's load
     * of used.idx passes its store of used_event: both see the old value, and no interrupt ever comes. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    bool wanted = ran_empty(q) || interrupt_wanted(q, old);
    q->suppressed += !wanted;
    return wanted;
}

void vpci_ring_busy(vpci_queue *q)
{
    if (!can_fetch(q) || q->no_notify || !(q->rules & VPCI_RING_USED_FLAGS))
        return;
    q->no_notify = true;
    store16(q, q->used_off, USED_NO_NOTIFY);
}

int vpci_ring_idle(vpci_queue *q)
{
    if (!q->started || q->suspended || q->broken)
        return 0;
    if (q->rules & VPCI_RING_AVAIL_EVENT)
        store16(q, avail_event_off(q), q->last_avail);
    if (q->no_notify)
        store16(q, q->used_off, 0);
    q->no_notify = false;
    /* D4 with G2: without it our re-read of avail.idx passes the stores above while the driver's load of
     * avail_event or used.flags passes its store of avail.idx: it does not kick and we do not look. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return q->avail_seen != q->last_avail || load16(q, avail_idx_off(q)) != q->last_avail;
}

/* ---- copies by byte position ---- */

static uint32_t copy(const struct iovec *iov, uint32_t n, uint32_t off, uint8_t *buf, uint32_t len, bool to_guest)
{
    uint32_t done = 0;
    for (uint32_t i = 0; i < n && done < len; i++) {
        if (off >= iov[i].iov_len) {
            off -= (uint32_t)iov[i].iov_len;
            continue;
        }
        uint8_t *guest = (uint8_t *)iov[i].iov_base + off;
        uint32_t now = (uint32_t)(iov[i].iov_len - off);
        now = now < len - done ? now : len - done;
        memcpy(to_guest ? guest : buf + done, to_guest ? buf + done : guest, now);
        done += now;
        off = 0;
    }
    return done;
}

uint32_t vpci_chain_read(const vpci_chain *chain, uint32_t off, void *buf, uint32_t len)
{
    return chain->error ? 0 : copy(chain->iov, chain->out_iovs, off, buf, len, false);
}

uint32_t vpci_chain_write(const vpci_chain *chain, uint32_t off, const void *buf, uint32_t len)
{
    return chain->error ? 0 : copy(chain->iov + chain->out_iovs, chain->in_iovs, off, (uint8_t *)buf, len, true);
}
