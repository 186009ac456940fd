/* The block engine: the one parser of blk requests. The pump hands it chains; it works on a disk's backend (disk.c),
 * inline where nothing has to be waited for, else in a pool of threads, straight from and to guest memory.
 * Source: [devices.md 3]; durability as docs/decisions says: FLUSH covers what was completed before it was popped on
 * any queue and what was popped before it on its own. */
#include "core.h"

#include <time.h>

enum { HEADER = 16, ID_BYTES = 20, SEGMENT_UNMAP = 1, ALWAYS = 0xff };
enum { STATUS_OK = 0, STATUS_IOERR = 1, STATUS_UNSUPP = 2 };
#define FLAG_BARRIER 0x80000000u

struct header {
    uint32_t type;
    uint32_t ioprio;
    uint64_t sector;
};

struct segment {
    uint64_t sector;
    uint32_t num_sectors;
    uint32_t flags;
};
_Static_assert(sizeof(struct segment) == 16, "a segment is not as the driver writes it");

struct row;

/* A request lives in its chain's scratch words: only segments are allocated on the way. */
struct request {
    struct vpci_job job;           /* first: the pool's pointer is ours */
    const struct row *row;
    struct vpci_blk *blk;
    vpci_chain *next_ordered;      /* the queue's writes and flushes in the order they were popped */
    union {
        struct vpci_span data;     /* what is left to be moved */
        struct {
            struct segment *list;
            uint32_t n;
        } segments;
    };
    uint32_t written;              /* bytes, before the status byte */
    bool durable;                  /* write-through */
};
_Static_assert(sizeof(struct request) <= sizeof(((vpci_chain *)0)->scratch), "a request must fit into a chain");

typedef int prepare(struct request *r, const struct header *h);   /* a status; OK: go on */
typedef int perform(struct request *r, uint32_t flags);           /* 0 or an errno */
typedef int range(struct vpci_disk *d, uint64_t offset, uint64_t len, uint32_t flags);

/* A type of request. */
struct row {
    uint32_t type;
    uint8_t feature;               /* the bit that must be offered for it, or ALWAYS */
    bool changes;                  /* the disk, so that a later flush waits for it */
    bool is_flush;
    prepare *prepare;
    perform *perform;
    size_t counter;                /* of vpci_blk_stats */
    /* requests of segments: */
    range *range;                  /* what happens to each */
    size_t limits;                 /* of struct vpci_blk */
    uint32_t segment_flags;        /* that are known */
    bool sync;                     /* durable in any case */
    bool even;                     /* Linux' own direction, see segments_span */
};

/* Writes and flushes of one queue that are not finished, oldest first. */
struct flush_order {
    vpci_chain *first, **last;
};

struct vpci_blk {
    struct vpci_disk disk;
    uint64_t sectors;
    uint64_t features;          /* offered */
    bool read_only, may_unmap;
    char serial[ID_BYTES];
    vpci_blk_limits discard, write_zeroes, secure_erase;
    struct vpci_pool *pool;
    uint32_t flush_acked;       /* atomic; the queue owners read them, Python and the pump write them */
    uint32_t writeback;
    uint32_t sync_failed;       /* atomic: data may be lost, so nothing is called durable until a reopen */
    uint32_t told;              /* atomic: of the backend's first error */
    pthread_rwlock_t syncs;     /* the kernel tells of a lost write once, so a flush does not run beside what may hear of it */
    pthread_mutex_t lock;       /* of what follows: pool threads finish requests, the owner pops them */
    pthread_cond_t at_rest;
    struct flush_order *orders; /* one a queue */
    uint64_t in_flight;         /* requests begun and not finished */
    bool paused;
    vpci_chain *held, **last_held;    /* popped while paused, oldest first */
    vpci_blk_stats stats;       /* each word atomic */
};

static struct request *request_of(vpci_chain *chain)
{
    return (struct request *)chain->scratch;
}

static vpci_chain *chain_of(struct request *r)
{
    return (vpci_chain *)((char *)r - offsetof(vpci_chain, scratch));
}

static void bump(uint64_t *counter, uint64_t by)
{
    __atomic_fetch_add(counter, by, __ATOMIC_RELAXED);
}

/* ---- the end of a request ---- */

/* Before the chain is done: with the last one the engine may be freed. */
static void leave(struct vpci_blk *blk)
{
    pthread_mutex_lock(&blk->lock);
    if (!--blk->in_flight && blk->paused)
        pthread_cond_broadcast(&blk->at_rest);
    pthread_mutex_unlock(&blk->lock);
}

/* used.len counts from the first writable byte, so a failed read, whose data was not written, says 0. */
static void finish(struct vpci_blk *blk, vpci_chain *chain, int status, uint32_t written)
{
    vpci_chain_set_last(chain, (uint8_t)status);
    bump(&blk->stats.errors, status == STATUS_IOERR);
    bump(&blk->stats.unsupported, status == STATUS_UNSUPP);
    bool only_status = chain->in_len == 1 && chain->last_in;
    leave(blk);
    vpci_chain_done(chain, status == STATUS_OK ? written + 1 : only_status);
}

static uint64_t first_sector(const struct request *r)
{
    return r->row->range ? r->segments.list[0].sector : r->data.offset / VPCI_SECTOR;
}

/* Memory that vanished and work that was given up are not the backend's fault. */
static void note_error(struct request *r, int error)
{
    struct vpci_blk *blk = r->blk;
    vpci_chain *chain = chain_of(r);
    if (error == EFAULT || error == ECANCELED)
        return;
    bump(&blk->stats.backend_errors, 1);
    if (!__atomic_exchange_n(&blk->told, 1, __ATOMIC_SEQ_CST))
        vpci_chain_note(chain, (vpci_event){.note = VPCI_NOTE_BACKEND, .queue = chain->queue_index, .a = (uint64_t)error,
                                            .b = r->row->type, .c = first_sector(r)});
}

static void end(struct request *r, int error)
{
    if (error)
        note_error(r, error);
    if (r->row->range)
        free(r->segments.list);
    finish(r->blk, chain_of(r), error ? STATUS_IOERR : STATUS_OK, r->written);
}

/* ---- order of writes and flushes ---- */

static void order_add(struct vpci_blk *blk, vpci_chain *chain)
{
    struct flush_order *o = &blk->orders[chain->queue_index];
    request_of(chain)->next_ordered = NULL;
    *o->last = chain;
    o->last = &request_of(chain)->next_ordered;
}

static void order_remove(struct flush_order *o, vpci_chain *chain)
{
    vpci_chain **at = &o->first;
    while (*at != chain)
        at = &request_of(*at)->next_ordered;
    *at = request_of(chain)->next_ordered;
    if (!*at)
        o->last = at;
}

/* Flushes with nothing unfinished before them may begin; each is taken off the list for that. */
static void release_flushes(struct vpci_blk *blk, struct flush_order *o)
{
    while (o->first && request_of(o->first)->row->is_flush) {
        vpci_chain *flush = o->first;
        order_remove(o, flush);
        vpci_pool_submit(blk->pool, &request_of(flush)->job);
    }
}

static void write_ended(struct vpci_blk *blk, vpci_chain *chain)
{
    struct flush_order *o = &blk->orders[chain->queue_index];
    pthread_mutex_lock(&blk->lock);
    order_remove(o, chain);
    release_flushes(blk, o);
    pthread_mutex_unlock(&blk->lock);
}

/* ---- durability ---- */

static bool durability_lost(struct vpci_blk *blk)
{
    return __atomic_load_n(&blk->sync_failed, __ATOMIC_SEQ_CST);
}

/* What the kernel failed to write back it may forget and call clean: nothing is durable from here on. */
static void lose_durability(struct vpci_blk *blk)
{
    __atomic_store_n(&blk->sync_failed, 1, __ATOMIC_SEQ_CST);
}

static bool is_write_through(const struct vpci_blk *blk)
{
    return !__atomic_load_n(&blk->flush_acked, __ATOMIC_RELAXED) || !__atomic_load_n(&blk->writeback, __ATOMIC_RELAXED);
}

static int flush(struct vpci_blk *blk)
{
    pthread_rwlock_wrlock(&blk->syncs);
    int error = durability_lost(blk) ? EIO : vpci_disk_flush(&blk->disk);
    if (error)
        lose_durability(blk);
    pthread_rwlock_unlock(&blk->syncs);
    return error;
}

/* ---- requests by type: what is wrong with them, then what they do ---- */

static bool in_bounds(const struct vpci_blk *blk, uint64_t sector, uint64_t n)
{
    return sector <= blk->sectors && n <= blk->sectors - sector;
}

static bool is_transfer(const struct vpci_blk *blk, uint64_t sector, uint64_t bytes)
{
    return !(bytes % VPCI_SECTOR) && in_bounds(blk, sector, bytes / VPCI_SECTOR);
}

static int prepare_in(struct request *r, const struct header *h)
{
    vpci_chain *chain = chain_of(r);
    struct iovec *in = chain->iov + chain->out_iovs;
    uint32_t bytes = chain->in_len - 1;
    if (!is_transfer(r->blk, h->sector, bytes))
        return STATUS_IOERR;
    in[chain->in_iovs - 1].iov_len--;   /* the status byte is not data */
    r->data = (struct vpci_span){in, chain->in_iovs, h->sector * VPCI_SECTOR, bytes};
    r->written = bytes;
    bump(&r->blk->stats.bytes_read, bytes);
    return STATUS_OK;
}

static int perform_in(struct request *r, uint32_t flags)
{
    return vpci_disk_read(&r->blk->disk, chain_of(r)->queue->mem, &r->data, flags);
}

static int prepare_out(struct request *r, const struct header *h)
{
    vpci_chain *chain = chain_of(r);
    uint32_t bytes = chain->out_len - HEADER;
    if (r->blk->read_only || !is_transfer(r->blk, h->sector, bytes))
        return STATUS_IOERR;
    r->data = (struct vpci_span){chain->iov, chain->out_iovs, 0, chain->out_len};
    vpci_span_skip(&r->data, HEADER);
    r->data.offset = h->sector * VPCI_SECTOR;
    bump(&r->blk->stats.bytes_written, bytes);
    return STATUS_OK;
}

static int write_through(struct request *r, uint32_t flags)
{
    struct vpci_blk *blk = r->blk;
    pthread_rwlock_rdlock(&blk->syncs);
    int error = durability_lost(blk) ? EIO : 0;
    if (!error)
        error = vpci_disk_write(&blk->disk, chain_of(r)->queue->mem, &r->data, flags | VPCI_DISK_DURABLE);
    if (error == EIO)
        lose_durability(blk);
    pthread_rwlock_unlock(&blk->syncs);
    return error || !durability_lost(blk) ? error : EIO;
}

/* A write that must be durable may have to wait for a flush, so it never goes inline. */
static int perform_out(struct request *r, uint32_t flags)
{
    if (r->durable)
        return flags & VPCI_DISK_NOW ? EAGAIN : write_through(r, flags);
    return vpci_disk_write(&r->blk->disk, chain_of(r)->queue->mem, &r->data, flags);
}

static int prepare_nothing(struct request *r, const struct header *h)
{
    (void)r, (void)h;
    return STATUS_OK;
}

static int perform_flush(struct request *r, uint32_t flags)
{
    (void)flags;
    return flush(r->blk);
}

static int perform_get_id(struct request *r, uint32_t flags)
{
    vpci_chain *chain = chain_of(r);
    uint32_t room = chain->in_len - 1;
    (void)flags;
    r->written = vpci_chain_write(chain, 0, r->blk->serial, room < ID_BYTES ? room : ID_BYTES);
    return 0;
}

static const vpci_blk_limits *limits_of(const struct request *r)
{
    return (const vpci_blk_limits *)((const char *)r->blk + r->row->limits);
}

static int judge_segment(const struct request *r, const struct segment *s)
{
    if (s->flags & ~r->row->segment_flags)
        return STATUS_UNSUPP;
    bool fits = s->num_sectors <= limits_of(r)->max_sectors && in_bounds(r->blk, s->sector, s->num_sectors);
    return fits ? STATUS_OK : STATUS_IOERR;
}

/* All segments are judged, on a copy, before anything happens to the first. */
static int judge_segments(struct request *r)
{
    int status = STATUS_OK;
    for (uint32_t i = 0; i < r->segments.n && status == STATUS_OK; i++)
        status = judge_segment(r, &r->segments.list[i]);
    return status;
}

/* Where the segments are. Linux takes the lowest bit of a type for the direction of its data, and SECURE_ERASE has an
 * even number: its segments come among the writable bytes, before the status. Those of far memory are not fetched. */
static struct vpci_span segments_span(const struct request *r, vpci_chain *chain)
{
    struct vpci_span s = {chain->iov, chain->out_iovs, 0, chain->out_len};
    vpci_span_skip(&s, HEADER);
    if (r->row->even && !s.len && !vpci_chain_is_far(chain))
        s = (struct vpci_span){chain->iov + chain->out_iovs, chain->in_iovs, 0, chain->in_len - 1};
    return s;
}

static int prepare_segments(struct request *r, const struct header *h)
{
    vpci_chain *chain = chain_of(r);
    struct vpci_span s = segments_span(r, chain);
    uint64_t n = s.len / sizeof(struct segment);
    (void)h;
    if (r->blk->read_only || !n || s.len % sizeof(struct segment) || n > limits_of(r)->max_seg)
        return STATUS_IOERR;
    r->segments.n = (uint32_t)n;
    r->segments.list = malloc(s.len);
    int status = STATUS_IOERR;
    if (r->segments.list && vpci_span_read(chain->queue->mem, &s, r->segments.list))
        status = judge_segments(r);
    if (status != STATUS_OK)
        free(r->segments.list);
    return status;
}

static int perform_segments(struct request *r, uint32_t flags)
{
    struct vpci_blk *blk = r->blk;
    bool durable = r->durable || r->row->sync;
    int error = flags & VPCI_DISK_NOW ? EAGAIN : durable && durability_lost(blk) ? EIO : 0;
    for (uint32_t i = 0; i < r->segments.n && !error; i++) {
        const struct segment *s = &r->segments.list[i];
        error = r->row->range(&blk->disk, s->sector * VPCI_SECTOR, (uint64_t)s->num_sectors * VPCI_SECTOR,
                              s->flags & SEGMENT_UNMAP && blk->may_unmap ? VPCI_DISK_UNMAP : 0);
    }
    return error || !durable ? error : flush(blk);
}

#define COUNTER(name) offsetof(vpci_blk_stats, name)
#define LIMITS(name) offsetof(struct vpci_blk, name)

static const struct row rows[] = {
    {.type = 0, .feature = ALWAYS, .prepare = prepare_in, .perform = perform_in, .counter = COUNTER(reads)},
    {.type = 1, .feature = ALWAYS, .prepare = prepare_out, .perform = perform_out, .counter = COUNTER(writes),
     .changes = true},
    {.type = 4, .feature = ALWAYS, .prepare = prepare_nothing, .perform = perform_flush, .counter = COUNTER(flushes),
     .is_flush = true},
    {.type = 5, .feature = ALWAYS, .prepare = prepare_nothing, .perform = perform_flush, .counter = COUNTER(flushes),
     .is_flush = true},
    {.type = 8, .feature = ALWAYS, .prepare = prepare_nothing, .perform = perform_get_id, .counter = COUNTER(ids)},
    {.type = 11, .feature = VPCI_BLK_F_DISCARD, .prepare = prepare_segments, .perform = perform_segments,
     .counter = COUNTER(discards), .changes = true, .range = vpci_disk_discard, .limits = LIMITS(discard)},
    {.type = 13, .feature = VPCI_BLK_F_WRITE_ZEROES, .prepare = prepare_segments, .perform = perform_segments,
     .counter = COUNTER(write_zeroes), .changes = true, .range = vpci_disk_zero, .limits = LIMITS(write_zeroes),
     .segment_flags = SEGMENT_UNMAP},
    {.type = 14, .feature = VPCI_BLK_F_SECURE_ERASE, .prepare = prepare_segments, .perform = perform_segments,
     .counter = COUNTER(secure_erases), .changes = true, .range = vpci_disk_erase, .limits = LIMITS(secure_erase),
     .sync = true, .even = true},
};

static const struct row *row_of(const struct vpci_blk *blk, uint32_t type)
{
    for (size_t i = 0; i < ARRAY_LEN(rows); i++)
        if (rows[i].type == type)
            return rows[i].feature == ALWAYS || blk->features >> rows[i].feature & 1 ? &rows[i] : NULL;
    return NULL;
}

/* ---- the life of a request ---- */

static void run(struct vpci_job *job)
{
    struct request *r = (struct request *)job;
    int error = r->row->perform(r, 0);
    if (r->row->changes)
        write_ended(r->blk, chain_of(r));
    end(r, error);
}

/* Without a wait, if that can be: the pool's two wake-ups are saved. Whatever is not clear is left to the pool. */
static bool done_now(struct request *r)
{
    if (r->row->perform(r, VPCI_DISK_NOW))
        return false;
    bump(&r->blk->stats.served_inline, 1);
    end(r, 0);
    return true;
}

static void begin(struct request *r)
{
    struct vpci_blk *blk = r->blk;
    vpci_chain *chain = chain_of(r);
    const struct row *row = r->row;
    if (!row->is_flush && done_now(r))
        return;
    pthread_mutex_lock(&blk->lock);
    if (row->changes || row->is_flush)
        order_add(blk, chain);
    if (row->is_flush)
        release_flushes(blk, &blk->orders[chain->queue_index]);
    else
        vpci_pool_submit(blk->pool, &r->job);
    pthread_mutex_unlock(&blk->lock);
}

static void take(struct vpci_blk *blk, vpci_chain *chain)
{
    struct header h;
    if (chain->error || !chain->in_len || vpci_chain_read(chain, 0, &h, HEADER) < HEADER) {
        finish(blk, chain, STATUS_IOERR, 0);
        return;
    }
    const struct row *row = row_of(blk, h.type & ~FLAG_BARRIER);
    struct request *r = request_of(chain);
    *r = (struct request){.job.run = run, .blk = blk, .row = row, .durable = is_write_through(blk)};
    int status = row ? row->prepare(r, &h) : STATUS_UNSUPP;
    if (status != STATUS_OK) {
        finish(blk, chain, status, 0);
        return;
    }
    bump((uint64_t *)((char *)&blk->stats + row->counter), 1);
    begin(r);
}

static void hold(struct vpci_blk *blk, vpci_chain *chain)
{
    chain->next = NULL;
    *blk->last_held = chain;
    blk->last_held = &chain->next;
}

static void serve(void *state, const vpci_host *host, vpci_chain *chain)
{
    struct vpci_blk *blk = state;
    (void)host;
    pthread_mutex_lock(&blk->lock);
    bool paused = blk->paused;
    if (paused)
        hold(blk, chain);
    else
        blk->in_flight++;
    pthread_mutex_unlock(&blk->lock);
    if (!paused)
        take(blk, chain);
}

static bool is_of_queue(struct vpci_job *job, void *queue_index)
{
    return chain_of((struct request *)job)->queue_index == *(uint32_t *)queue_index;
}

static void give_up(struct request *r)
{
    if (r->row->changes)
        write_ended(r->blk, chain_of(r));
    end(r, ECANCELED);
}

/* What was popped while paused and is of this queue; each counts as in flight from here on. */
static vpci_chain *take_held(struct vpci_blk *blk, uint32_t queue_index)
{
    vpci_chain *out = NULL, **at = &blk->held;
    pthread_mutex_lock(&blk->lock);
    for (vpci_chain *chain; (chain = *at);) {
        if (chain->queue_index != queue_index) {
            at = &chain->next;
            continue;
        }
        *at = chain->next;
        chain->next = out;
        out = chain;
        blk->in_flight++;
    }
    blk->last_held = at;
    pthread_mutex_unlock(&blk->lock);
    return out;
}

/* Ending a write may release a flush, which is then given up in the next round. */
static void cancel(void *state, uint32_t queue_index)
{
    struct vpci_blk *blk = state;
    for (vpci_chain *chain = take_held(blk, queue_index), *next; chain; chain = next) {
        next = chain->next;
        finish(blk, chain, STATUS_IOERR, 0);
    }
    for (struct vpci_job *job; (job = vpci_pool_withdraw(blk->pool, is_of_queue, &queue_index));)
        for (struct vpci_job *next; job; job = next) {
            next = job->next;
            give_up((struct request *)job);
        }
}

static void features(void *state, uint64_t bits)
{
    struct vpci_blk *blk = state;
    __atomic_store_n(&blk->flush_acked, bits >> VPCI_BLK_F_FLUSH & 1, __ATOMIC_RELAXED);
}

static const vpci_engine engine = {.abi = VPCI_ENGINE_ABI, .serve = serve, .cancel = cancel, .features = features};

const vpci_engine *vpci_blk_engine(void)
{
    return &engine;
}

/* ---- from outside ---- */

void vpci_blk_set_writeback(vpci_blk *blk, int writeback)
{
    __atomic_store_n(&blk->writeback, writeback, __ATOMIC_RELAXED);
}

static struct timespec deadline_in(int timeout_ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t ns = t.tv_nsec + timeout_ms * 1000000ll;
    return (struct timespec){t.tv_sec + ns / 1000000000, ns % 1000000000};
}

int vpci_blk_pause(vpci_blk *blk, int timeout_ms)
{
    struct timespec until = deadline_in(timeout_ms);
    int rc = 0;
    pthread_mutex_lock(&blk->lock);
    blk->paused = true;
    while (blk->in_flight && rc != ETIMEDOUT)
        rc = pthread_cond_clockwait(&blk->at_rest, &blk->lock, CLOCK_MONOTONIC, &until);
    bool at_rest = !blk->in_flight;
    pthread_mutex_unlock(&blk->lock);
    if (!at_rest)
        vpci_blk_resume(blk);
    return at_rest ? 0 : -ETIMEDOUT;
}

/* In the order in which they were popped, and before whatever is popped from now on. */
void vpci_blk_resume(vpci_blk *blk)
{
    pthread_mutex_lock(&blk->lock);
    for (vpci_chain *chain; (chain = blk->held);) {
        blk->held = chain->next;
        if (!blk->held)
            blk->last_held = &blk->held;
        blk->in_flight++;
        pthread_mutex_unlock(&blk->lock);
        take(blk, chain);
        pthread_mutex_lock(&blk->lock);
    }
    blk->paused = false;
    pthread_mutex_unlock(&blk->lock);
}

void vpci_blk_set_sectors(vpci_blk *blk, uint64_t sectors)
{
    blk->sectors = sectors;
}

void vpci_blk_reopened(vpci_blk *blk, const vpci_disk_ops *ops, void *disk, uint32_t align)
{
    blk->disk.ops = ops;
    blk->disk.state = disk;
    blk->disk.align = align;
    __atomic_store_n(&blk->sync_failed, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&blk->told, 0, __ATOMIC_SEQ_CST);
}

void vpci_blk_read_stats(vpci_blk *blk, vpci_blk_stats *stats)
{
    const uint64_t *from = (const uint64_t *)&blk->stats;
    for (size_t i = 0; i < sizeof(*stats) / sizeof(*from); i++)
        ((uint64_t *)stats)[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
    stats->durability_lost = durability_lost(blk);
}

vpci_blk *vpci_blk_new(const vpci_blk_setup *setup)
{
    vpci_blk *blk = calloc(1, sizeof(*blk));
    if (!blk)
        return NULL;
    vpci_disk_init(&blk->disk, setup->ops, setup->disk, setup->align, setup->private_memory);
    blk->sectors = setup->sectors;
    blk->features = setup->features;
    blk->read_only = setup->read_only;
    blk->may_unmap = setup->may_unmap;
    blk->writeback = setup->writeback;
    blk->discard = setup->discard;
    blk->write_zeroes = setup->write_zeroes;
    blk->secure_erase = setup->secure_erase;
    memcpy(blk->serial, setup->serial, strnlen(setup->serial, ID_BYTES));
    pthread_rwlock_init(&blk->syncs, NULL);
    pthread_mutex_init(&blk->lock, NULL);
    pthread_cond_init(&blk->at_rest, NULL);
    blk->last_held = &blk->held;
    blk->orders = calloc(setup->n_queues, sizeof(*blk->orders));
    blk->pool = blk->orders ? vpci_pool_new(setup->n_threads, "vpci-blk") : NULL;
    if (!blk->pool) {
        vpci_blk_free(blk);
        return NULL;
    }
    for (uint32_t i = 0; i < setup->n_queues; i++)
        blk->orders[i].last = &blk->orders[i].first;
    return blk;
}

void vpci_blk_free(vpci_blk *blk)
{
    if (!blk)
        return;
    if (blk->pool)
        vpci_pool_free(blk->pool);
    free(blk->orders);
    pthread_cond_destroy(&blk->at_rest);
    pthread_mutex_destroy(&blk->lock);
    pthread_rwlock_destroy(&blk->syncs);
    vpci_disk_fini(&blk->disk);
    free(blk);
}
