/* The split virtqueue, device side. The pump (or, for memory that only the client reaches, far.c's thread) asks for
 * chains and gives used entries back; mem.c turns addresses into pointers. Nothing else reads or writes a ring.
 * D and G numbers are the ordering rules of docs/rings.md. */
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

/* A buffer in far memory, or a piece of one: the engine works on a copy. */
struct bounce {
    struct bounce *next;
    uint64_t gpa;
    uint32_t len;
    uint32_t off;                /* of its first byte among the chain's writable bytes */
    bool in;
    uint8_t bytes[];
};

/* A chain and what it holds. The pieces start inline and move to the heap when a chain has many. */
struct chain {
    vpci_chain pub;              /* first: a vpci_chain pointer is a struct chain pointer */
    struct chain *next_free;
    struct vpci_range **held;    /* one a piece, counted in range->users */
    struct vpci_range *last_held;/* the one that pub.last_in points into */
    struct bounce *bounces;
    uint32_t bounced;            /* bytes of them */
    uint32_t n_iov, cap;
    struct iovec inline_iov[INLINE_IOV];
    struct vpci_range *inline_held[INLINE_IOV];
};

/* ---- far memory ---- */

static uint64_t ring_base(const vpci_queue *q)
{
    return (uint64_t)q->pfn << PAGE_SHIFT;
}

/* -ECANCELED leaves everything to be tried again; a refusal by the client breaks the ring like a hole in memory. */
static bool far_done(vpci_queue *q, int rc, uint64_t gpa)
{
    q->unwound |= rc == -ECANCELED;
    if (rc && rc != -ECANCELED)
        vpci_ring_break(q, VPCI_RING_UNMAPPED, 0, gpa);
    return !rc;
}

static bool is_far(const vpci_queue *q, const uint8_t *p)
{
    return q->far_ring && p >= q->shadow && p < q->shadow + ((size_t)q->n_pages << PAGE_SHIFT);
}

/* Can anybody reach far memory? If not, the queue stands still, and its error says why. */
static bool far_is_in_reach(vpci_queue *q, uint16_t head, uint64_t gpa)
{
    if (!q->far)
        vpci_ring_break(q, VPCI_RING_FAR_MEMORY, head, gpa);
    return q->far;
}

/* Is this the thread that may wait for the client? If not, the queue is left to it, and nothing has happened. */
static bool may_go_far(vpci_queue *q)
{
    q->needs_far = true;
    q->unwound |= !q->on_far_thread;
    return q->on_far_thread;
}

/* ---- words of the ring ---- */

static uint8_t *at(const vpci_queue *q, uint32_t off)
{
    return q->pages[off >> PAGE_SHIFT] + (off & (PAGE_SIZE_BYTES - 1));
}

/* The bytes of a word or a descriptor, brought here first if they are far. */
static uint8_t *pull(vpci_queue *q, uint32_t off, uint32_t len)
{
    uint8_t *p = at(q, off);
    if (is_far(q, p) && may_go_far(q) && !q->unwound)
        far_done(q, q->far->read(q->far_arg, q, ring_base(q) + off, p, len), ring_base(q) + off);
    return p;
}

static void push_out(vpci_queue *q, uint32_t off, uint32_t len)
{
    uint8_t *p = at(q, off);
    if (is_far(q, p) && may_go_far(q) && !q->unwound)
        far_done(q, q->far->write(q->far_arg, q, ring_base(q) + off, p, len), ring_base(q) + off);
}

/* D7: single aligned accesses; every offset of a word in the ring is a multiple of its size. */
static uint16_t load16(vpci_queue *q, uint32_t off)
{
    return __atomic_load_n((uint16_t *)pull(q, off, 2), __ATOMIC_RELAXED);
}

static void store16(vpci_queue *q, uint32_t off, uint16_t value)
{
    __atomic_store_n((uint16_t *)at(q, off), value, __ATOMIC_RELAXED);
    push_out(q, off, 2);
}

static void store32(vpci_queue *q, uint32_t off, uint32_t value)
{
    __atomic_store_n((uint32_t *)at(q, off), value, __ATOMIC_RELAXED);
    push_out(q, off, 4);
}

static uint32_t avail_flags_off(const vpci_queue *q) { return q->size * DESC_BYTES; }
static uint32_t avail_idx_off(const vpci_queue *q) { return avail_flags_off(q) + 2; }
static uint32_t avail_ring_off(const vpci_queue *q, uint16_t idx)
{
    return avail_flags_off(q) + 4 + 2 * (idx & (q->size - 1));
}
static uint32_t used_event_off(const vpci_queue *q) { return avail_flags_off(q) + 4 + 2 * q->size; }
/* Where the driver says which interrupts it wants. */
static uint32_t driver_event_off(const vpci_queue *q)
{
    return q->rules & VPCI_RING_USED_EVENT ? used_event_off(q) : avail_flags_off(q);
}
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
    free(q->shadow);
    free(q->block);
    free(q);
}

/* The driver's part is read, ours is written; the used part starts on a page of its own. */
static uint32_t page_perm(const vpci_queue *q, uint32_t page)
{
    return page << PAGE_SHIFT >= q->used_off ? VPCI_MEM_WRITE : VPCI_MEM_READ;
}

/* The page's host pointer; for a far page its place in the shadow; NULL when there is none. */
static uint8_t *find_page(vpci_queue *q, uint32_t page)
{
    struct vpci_piece p;
    uint64_t gpa = ring_base(q) + ((uint64_t)page << PAGE_SHIFT);
    enum vpci_where where = vpci_mem_piece(q->mem, gpa, PAGE_SIZE_BYTES, page_perm(q, page), &p);
    if (where != VPCI_FAR)
        return where == VPCI_HERE ? p.hva : NULL;
    q->far_refused |= !q->far;
    if (!q->shadow && q->far)
        q->shadow = calloc(q->n_pages, PAGE_SIZE_BYTES);
    q->far_ring |= q->shadow != NULL;
    return q->shadow ? q->shadow + ((size_t)page << PAGE_SHIFT) : NULL;
}

int vpci_queue_remap(vpci_queue *q)
{
    bool whole = q->started;
    q->far_ring = q->far_refused = false;
    for (uint32_t i = 0; i < q->n_pages; i++) {
        q->pages[i] = q->started ? find_page(q, i) : NULL;
        whole &= q->pages[i] != NULL;
    }
    q->suspended = q->started && !whole;
    q->needs_far = q->far_ring;
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
    if (q->unwound || q->broken)   /* what was judged may be stale, or was judged before */
        return;
    q->broken = reason;
    q->broken_head = head;
    q->broken_addr = addr;
    q->ring_errors++;
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
    c->bounces = NULL;
    c->bounced = 0;
    c->n_iov = 0;
    c->cap = INLINE_IOV;
    return c;
}

/* The ranges that the chain points into may go. */
static void release(struct chain *c)
{
    for (uint32_t i = 0; i < c->n_iov; i++)
        if (c->held[i])
            c->held[i]->users--;
    c->n_iov = 0;
    if (c->last_held)
        c->last_held->users--;
    c->last_held = NULL;
}

static void chain_put(vpci_queue *q, struct chain *c)
{
    release(c);
    for (struct bounce *b = c->bounces, *next; b; b = next) {
        next = b->next;
        free(b);
    }
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
    if (p->range)
        p->range->users++;
    return VPCI_CHAIN_OK;
}

/* A far piece becomes a bounce buffer. No range is held for it: the client is asked for the address, not a pointer. */
static uint16_t add_far_piece(vpci_queue *q, struct chain *c, uint64_t gpa, uint64_t len, bool in, uint32_t off)
{
    if (!far_is_in_reach(q, c->pub.head, gpa) || !may_go_far(q))
        return VPCI_CHAIN_OK;   /* broken or unwound: nothing of this chain counts */
    struct bounce *b = c->bounced + len <= FAR_CHAIN_MAX ? calloc(1, sizeof(*b) + len) : NULL;
    if (!b)
        return VPCI_CHAIN_TOO_LONG;
    *b = (struct bounce){.next = c->bounces, .gpa = gpa, .len = (uint32_t)len, .off = off, .in = in};
    c->bounces = b;
    c->bounced += (uint32_t)len;
    return add_piece(q, c, &(struct vpci_piece){.hva = b->bytes, .len = len});
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
    uint32_t off = c->pub.in_len - d->len;   /* of its first byte among the writable ones, for a writable buffer */
    for (struct vpci_piece p; left; gpa += p.len, left -= p.len, off += (uint32_t)p.len) {
        enum vpci_where where = vpci_mem_piece(q->mem, gpa, left, in ? VPCI_MEM_WRITE : VPCI_MEM_READ, &p);
        if (where == VPCI_NOWHERE)
            return VPCI_CHAIN_UNMAPPED;
        uint16_t error = where == VPCI_HERE ? add_piece(q, c, &p) : add_far_piece(q, c, gpa, p.len, in, off);
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
    bool far_table;
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

/* Descriptors of a far table come a block at a time; each is still looked at once. */
static bool fetch_far(struct walk *w, uint64_t raw[2])
{
    vpci_queue *q = w->q;
    uint64_t gpa = walk_addr(w), off = gpa - q->block_gpa;
    if (!q->block_len || off >= q->block_len) {
        uint64_t left = w->table + (uint64_t)w->entries * DESC_BYTES - gpa;
        q->block_gpa = gpa;
        q->block_len = left < FAR_BLOCK ? (uint32_t)left : FAR_BLOCK;
        off = 0;
        if (!far_done(q, q->far->read(q->far_arg, q, gpa, q->block, q->block_len), gpa))
            return false;
    }
    memcpy(raw, q->block + off, DESC_BYTES);
    return true;
}

static bool fetch_from_table(struct walk *w, uint64_t raw[2])
{
    if (w->far_table)
        return fetch_far(w, raw);
    if (vpci_mem_read(w->q->mem, walk_addr(w), raw, DESC_BYTES) < 0)
        return walk_break(w, VPCI_RING_TABLE_UNMAPPED, walk_addr(w));
    return true;
}

/* D6: a descriptor is copied once, and the copy is judged; the guest may rewrite the original meanwhile. */
static bool fetch(struct walk *w, struct desc *d)
{
    uint64_t raw[2];
    if (w->indirect) {
        if (!fetch_from_table(w, raw))
            return false;
    } else {
        const uint64_t *p = (const uint64_t *)pull(w->q, w->slot * DESC_BYTES, DESC_BYTES);
        raw[0] = __atomic_load_n(p, __ATOMIC_RELAXED);
        raw[1] = __atomic_load_n(p + 1, __ATOMIC_RELAXED);
    }
    *d = (struct desc){raw[0], (uint32_t)raw[1], (uint16_t)(raw[1] >> 32), (uint16_t)(raw[1] >> 48)};
    return !w->q->unwound && !w->q->broken;
}

static bool enter_far_table(struct walk *w)
{
    vpci_queue *q = w->q;
    if (!far_is_in_reach(q, w->head, w->table) || !may_go_far(q))
        return false;
    if (!q->block && !(q->block = malloc(FAR_BLOCK)))
        return walk_break(w, VPCI_RING_TABLE_UNMAPPED, w->table);
    q->block_len = 0;
    w->far_table = true;
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
    enum vpci_where where = vpci_mem_whole(w->q->mem, d->addr, d->len, VPCI_MEM_READ);
    if (where == VPCI_NOWHERE)
        return walk_break(w, VPCI_RING_TABLE_UNMAPPED, d->addr);
    w->indirect = true;
    w->table = d->addr;
    w->entries = d->len / DESC_BYTES;
    w->slot = w->seen = 0;
    return where == VPCI_HERE || enter_far_table(w);
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

/* The lengths count on behind an error, as far as 32 bits go: the engine wants to know what the driver meant. */
static bool count_bytes(struct chain *c, bool in, uint32_t len)
{
    if ((uint64_t)c->pub.out_len + c->pub.in_len + len > UINT32_MAX)
        return false;
    *(in ? &c->pub.in_len : &c->pub.out_len) += len;
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
    bool in = d->flags & DESC_WRITE;
    if (in)
        w->last_in = *d;
    if (!count_bytes(c, in, d->len) && !c->pub.error)
        c->pub.error = VPCI_CHAIN_TOO_LONG;
    if (!c->pub.error)
        c->pub.error = add_buffer(w->q, c, d);
    return !w->q->unwound;
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

/* The last writable byte: in its bounce buffer when it is far and sound, nowhere when it cannot be told. */
static void find_last_in(struct walk *w, struct chain *c)
{
    struct vpci_piece p;
    const struct desc *d = &w->last_in;
    uint64_t last = d->addr + d->len - 1;
    if (!d->len || last < d->addr)
        return;
    enum vpci_where where = vpci_mem_piece(w->q->mem, last, 1, VPCI_MEM_WRITE, &p);
    if (where == VPCI_HERE) {
        c->pub.last_in = p.hva;
        c->last_held = p.range;
        p.range->users++;
    } else if (where == VPCI_FAR && c->pub.error) {
        if (add_far_piece(w->q, c, last, 1, true, UINT32_MAX) == VPCI_CHAIN_OK && !w->q->unwound)
            c->pub.last_in = c->bounces->bytes;
    } else if (where == VPCI_FAR && c->n_iov) {
        const struct iovec *iov = &c->pub.iov[c->n_iov - 1];
        c->pub.last_in = (uint8_t *)iov->iov_base + iov->iov_len - 1;
    }
}

static bool far_copy_in(vpci_queue *q, struct bounce *b)
{
    for (uint32_t off = 0, n; off < b->len; off += n) {
        n = b->len - off < FAR_PIECE ? b->len - off : FAR_PIECE;
        int rc = q->far->read(q->far_arg, q, b->gpa + off, b->bytes + off, n);
        if (rc) {
            q->unwound |= rc == -ECANCELED;
            return false;
        }
    }
    return true;
}

/* What the device may read is brought here before anybody looks at it. */
static void bring_in(vpci_queue *q, struct chain *c)
{
    for (struct bounce *b = c->bounces; b && !c->pub.error && !q->unwound; b = b->next)
        if (!b->in && !far_copy_in(q, b))
            c->pub.error = VPCI_CHAIN_UNMAPPED;
}

/* Bytes [from, from + n) of a bounce buffer go out. Returns 0 or what the client said. */
static int far_copy_out(vpci_queue *q, struct bounce *b, uint32_t from, uint32_t n)
{
    for (uint32_t now; n; from += now, n -= now) {
        now = n < FAR_PIECE ? n : FAR_PIECE;
        int rc = q->far->write(q->far_arg, q, b->gpa + from, b->bytes + from, now);
        if (rc)
            return rc;
    }
    return 0;
}

/* What the device wrote: the first len bytes, and the last byte where the engine set it by itself. */
static int take_out(vpci_queue *q, struct chain *c, uint32_t len)
{
    int rc = 0;
    for (struct bounce *b = c->bounces; b && !rc; b = b->next) {
        if (!b->in)
            continue;
        uint32_t n = b->off >= len ? 0 : len - b->off < b->len ? len - b->off : b->len;
        rc = far_copy_out(q, b, 0, n);
        bool has_last = c->pub.last_in >= b->bytes && c->pub.last_in < b->bytes + b->len;
        if (!rc && c->pub.last_in_set && has_last && (uint32_t)(c->pub.last_in - b->bytes) >= n)
            rc = far_copy_out(q, b, (uint32_t)(c->pub.last_in - b->bytes), 1);
    }
    return rc;
}

/* D1: avail.idx is loaded (acquire) before the slots it covers, once a batch. */
static bool something_available(vpci_queue *q)
{
    if (q->avail_seen != q->last_avail)
        return true;
    uint16_t seen = __atomic_load_n((uint16_t *)pull(q, avail_idx_off(q), 2), __ATOMIC_ACQUIRE);
    if (q->unwound || q->broken)
        return false;
    q->avail_seen = seen;
    uint16_t n = (uint16_t)(q->avail_seen - q->last_avail);
    if (n > q->size) {
        vpci_ring_break(q, VPCI_RING_AVAIL_JUMP, 0, q->avail_seen);
        return false;
    }
    return n;
}

static bool is_wanted(const vpci_queue *q)
{
    return !q->gated || q->credit > 0;
}

static bool can_fetch(const vpci_queue *q)
{
    return q->started && !q->suspended && !q->broken && q->in_flight < q->size && is_wanted(q);
}

static bool next_head(vpci_queue *q, uint16_t *head)
{
    uint32_t off = avail_ring_off(q, q->last_avail);
    *head = load16(q, off);
    if (*head >= q->size)
        vpci_ring_break(q, VPCI_RING_HEAD, *head, ring_base(q) + off);
    return !q->broken && !q->unwound;
}

static bool walk_chain(vpci_queue *q, struct chain *c)
{
    struct walk w = {.q = q, .head = c->pub.head, .entries = q->size, .slot = c->pub.head};
    while (step(&w, c))
        ;
    if (!q->broken && !q->unwound) {
        find_last_in(&w, c);
        bring_in(q, c);
    }
    return !q->broken && !q->unwound;
}

struct pop {
    vpci_queue *q;
    vpci_chain *chain;
};

static void pop(void *arg)
{
    struct pop *p = arg;
    vpci_queue *q = p->q;
    uint16_t head;
    if (!can_fetch(q) || !something_available(q) || !next_head(q, &head))
        return;
    struct chain *c = q->building = chain_get(q);
    if (!c)
        return;
    q->in_flight++;
    c->pub.head = head;
    bool sound = walk_chain(q, c);
    q->building = NULL;
    if (!sound) {
        chain_put(q, c);
        return;
    }
    q->request_errors += c->pub.error != VPCI_CHAIN_OK;
    q->chains++;
    q->last_avail++;
    p->chain = &c->pub;
}

/* The ring's memory went away in the middle of an access. */
static void memory_vanished(vpci_queue *q)
{
    if (q->building)
        chain_put(q, q->building);
    q->building = NULL;
    vpci_ring_break(q, VPCI_RING_VANISHED, 0, ring_base(q));
}

vpci_chain *vpci_ring_pop(vpci_queue *q)
{
    struct pop p = {.q = q};
    if (!vpci_guard(q->mem, pop, &p))
        memory_vanished(q);
    return p.chain;
}

void vpci_ring_unpop(vpci_queue *q, vpci_chain *chain)
{
    q->request_errors -= chain->error != VPCI_CHAIN_OK;
    q->chains--;
    q->last_avail--;
    chain_put(q, (struct chain *)chain);
}

struct push {
    vpci_queue *q;
    struct chain *chain;
    uint32_t len;
    bool done;
};

static void push(void *arg)
{
    struct push *p = arg;
    vpci_queue *q = p->q;
    uint32_t off = used_elem_off(q, q->used_idx);
    if (p->chain->bounces && !may_go_far(q))
        return;
    int rc = take_out(q, p->chain, p->len);
    if (rc && rc != -ECANCELED)
        p->len = 0;   /* the buffer went away while the request ran */
    q->unwound |= rc == -ECANCELED;
    if (q->unwound)
        return;
    /* Two stores: an element may lie across two pages. */
    store32(q, off, p->chain->pub.head);
    store32(q, off + 4, p->len);
    p->done = !q->unwound;
}

void vpci_chain_release(vpci_chain *chain)
{
    release((struct chain *)chain);
}

bool vpci_chain_is_far(const vpci_chain *chain)
{
    return ((const struct chain *)chain)->bounces;
}

int vpci_ring_push(vpci_queue *q, vpci_chain *chain, uint32_t len)
{
    struct push p = {q, (struct chain *)chain, len, false};
    if (!vpci_guard(q->mem, push, &p))
        memory_vanished(q);
    if (q->broken)
        vpci_ring_drop(q, chain);
    if (q->broken || !p.done)
        return q->broken != 0;
    q->used_idx++;
    q->used++;
    chain_put(q, (struct chain *)chain);
    return 1;
}

void vpci_ring_drop(vpci_queue *q, vpci_chain *chain)
{
    chain_put(q, (struct chain *)chain);
}

/* ---- events ---- */

/* Bit 24: nothing available, nothing in flight. */
static bool ran_empty(vpci_queue *q)
{
    return (q->rules & VPCI_RING_NOTIFY_ON_EMPTY) && !q->in_flight && load16(q, avail_idx_off(q)) == q->last_avail;
}

static bool interrupt_wanted(vpci_queue *q, uint16_t old)
{
    uint16_t asked = q->driver_event = load16(q, driver_event_off(q));
    return q->rules & VPCI_RING_USED_EVENT ? vpci_need_event(asked, q->used_idx, old) : !(asked & AVAIL_NO_INTERRUPT);
}

static bool is_at_work(const vpci_queue *q)
{
    return q->started && !q->suspended && !q->broken;
}

struct drivers_words {
    const vpci_queue *q;
    uint16_t avail_idx, event;
};

/* Work that nobody was told of is seen only here. What is read decides nothing. */
static void read_drivers_words(void *arg)
{
    struct drivers_words *words = arg;
    const vpci_queue *q = words->q;
    words->avail_idx = __atomic_load_n((uint16_t *)at(q, avail_idx_off(q)), __ATOMIC_RELAXED);
    words->event = __atomic_load_n((uint16_t *)at(q, driver_event_off(q)), __ATOMIC_RELAXED);
}

void vpci_queue_read_stats(const vpci_queue *q, vpci_queue_stats *s)
{
    *s = (vpci_queue_stats){
        .kicks = q->kicks, .chains = q->chains, .used = q->used, .interrupts = q->interrupts,
        .suppressed = q->suppressed, .request_errors = q->request_errors, .zero_len = q->zero_len,
        .ring_errors = q->ring_errors, .ignored_kicks = q->ignored_kicks, .in_flight = q->in_flight,
        .broken = q->broken, .broken_head = q->broken_head, .broken_addr = q->broken_addr,
        .last_avail = q->last_avail, .used_idx = q->used_idx, .started = q->started,
        .suspended = q->suspended, .avail_idx = q->avail_seen, .rules = q->rules, .published = q->published,
        .driver_event = q->driver_event, .no_notify = q->no_notify, .remote = q->needs_far,
    };
    struct drivers_words now = {.q = q};
    if (is_at_work(q) && !q->far_ring && vpci_guard(q->mem, read_drivers_words, &now)) {
        s->avail_idx = now.avail_idx;
        s->driver_event = now.event;
    }
}

struct query {
    vpci_queue *q;
    bool yes;
};

static void publish(void *arg)
{
    struct query *query = arg;
    vpci_queue *q = query->q;
    uint16_t old = q->published;
    if (!is_at_work(q) || q->used_idx == old)
        return;
    /* D2: data and elements before the index. */
    __atomic_store_n((uint16_t *)at(q, used_idx_off(q)), q->used_idx, __ATOMIC_RELEASE);
    push_out(q, used_idx_off(q), 2);
    /* D3 with G4: without it our load of flags or used_event passes our store of used.idx, and the driver's load
     * of used.idx passes its store of used_event: both see the old value, and no interrupt ever comes. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    bool wanted = ran_empty(q) || interrupt_wanted(q, old);
    if (q->unwound || q->broken)
        return;   /* asked again later: a second publication of the same index says nothing new */
    q->published = q->used_idx;
    q->suppressed += !wanted;
    query->yes = wanted;
}

static bool guarded(vpci_queue *q, void (*work)(void *))
{
    struct query query = {q, false};
    if (!vpci_guard(q->mem, work, &query))
        memory_vanished(q);
    return query.yes;
}

int vpci_ring_publish(vpci_queue *q)
{
    return guarded(q, publish);
}

static void busy(void *arg)
{
    vpci_queue *q = ((struct query *)arg)->q;
    if (!can_fetch(q) || q->needs_far || q->no_notify || !(q->rules & VPCI_RING_USED_FLAGS))
        return;
    q->no_notify = true;
    store16(q, q->used_off, USED_NO_NOTIFY);
}

void vpci_ring_busy(vpci_queue *q)
{
    guarded(q, busy);
}

/* Ask for a kick when the driver makes the chain at index `from` available, and look once more. */
static bool ask_for_kicks(vpci_queue *q, uint16_t from)
{
    if (q->rules & VPCI_RING_AVAIL_EVENT)
        store16(q, avail_event_off(q), from);
    if (q->no_notify)
        store16(q, q->used_off, 0);
    q->no_notify = false;
    /* D4 with G2: without it our re-read of avail.idx passes the stores above while the driver's load of
     * avail_event or used.flags passes its store of avail.idx: it does not kick and we do not look. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return load16(q, avail_idx_off(q)) != from || q->unwound;
}

static void idle(void *arg)
{
    struct query *query = arg;
    vpci_queue *q = query->q;
    /* Unwanted chains need no kick: whoever wants them looks at the ring (handoff.c). */
    if (is_at_work(q) && is_wanted(q))
        query->yes = ask_for_kicks(q, q->last_avail) || q->avail_seen != q->last_avail;
}

int vpci_ring_idle(vpci_queue *q)
{
    return guarded(q, idle);
}

static void starve(void *arg)
{
    struct query *query = arg;
    if (is_at_work(query->q))
        query->yes = ask_for_kicks(query->q, query->q->avail_seen);
}

int vpci_ring_starve(vpci_queue *q)
{
    return guarded(q, starve);
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

struct copy {
    const struct iovec *iov;
    uint32_t n, off;
    uint8_t *buf;
    uint32_t len;
    bool to_guest;
    uint32_t done;
};

static void run_copy(void *arg)
{
    struct copy *c = arg;
    c->done = copy(c->iov, c->n, c->off, c->buf, c->len, c->to_guest);
}

uint32_t vpci_chain_read(const vpci_chain *chain, uint32_t off, void *buf, uint32_t len)
{
    struct copy c = {chain->iov, chain->out_iovs, off, buf, len, false, 0};
    if (!chain->error)
        vpci_guard(chain->queue->mem, run_copy, &c);
    return c.done;
}

uint32_t vpci_chain_write(const vpci_chain *chain, uint32_t off, const void *buf, uint32_t len)
{
    struct copy c = {chain->iov + chain->out_iovs, chain->in_iovs, off, (uint8_t *)buf, len, true, 0};
    if (!chain->error)
        vpci_guard(chain->queue->mem, run_copy, &c);
    return c.done;
}

void vpci_chain_set_last(vpci_chain *chain, uint8_t value)
{
    struct iovec last = {chain->last_in, 1};
    struct copy c = {&last, 1, 0, &value, 1, true, 0};
    if (!chain->last_in)
        return;
    vpci_guard(chain->queue->mem, run_copy, &c);
    chain->last_in_set = 1;
}
