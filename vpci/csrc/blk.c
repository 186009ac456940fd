/* The block engine: the one parser of blk requests. The pump hands it chains; it works on a file descriptor, inline
 * where the page cache answers, else in a pool of threads, straight from and to guest memory.
 * Source: [devices.md 3]; durability as docs/decisions says: FLUSH covers what was completed before it was popped on
 * any queue and what was popped before it on its own. */
#include "core.h"


enum { SECTOR = 512, HEADER = 16, ID_BYTES = 20, MAX_IOV = 1024 };
enum { STATUS_OK = 0, STATUS_IOERR = 1, STATUS_UNSUPP = 2 };
enum { TYPE_IN = 0, TYPE_OUT = 1, TYPE_FLUSH = 4, TYPE_FLUSH_OUT = 5, TYPE_GET_ID = 8 };
#define FLAG_BARRIER 0x80000000u

struct header {
    uint32_t type;
    uint32_t ioprio;
    uint64_t sector;
};

/* A request lives in its chain's scratch words: nothing is allocated on the way. */
struct request {
    struct vpci_job job;           /* first: the pool's pointer is ours */
    uint64_t offset;               /* in the file, bytes */
    uint32_t total;                /* data bytes */
    uint32_t done;                 /* of them */
    struct iovec *iov;             /* what is left of the data */
    uint32_t n_iov;
    uint8_t is_flush, write_through, reserved[2];
    struct vpci_blk *blk;
    vpci_chain *next_ordered;      /* the queue's writes and flushes in the order they were popped */
};
_Static_assert(sizeof(struct request) <= sizeof(((vpci_chain *)0)->scratch), "a request must fit into a chain");

/* Writes and flushes of one queue that are not finished, oldest first. */
struct flush_order {
    vpci_chain *first, **last;
};

struct vpci_blk {
    int fd;
    uint64_t sectors;
    bool read_only;
    char serial[ID_BYTES];
    struct vpci_pool *pool;
    uint32_t flush_acked;       /* atomic; the queue owners read them, Python and the pump write them */
    uint32_t writeback;
    uint32_t sync_failed;       /* atomic: data may be lost, so nothing is called durable until a reopen */
    uint32_t no_nowait;         /* the file cannot say whether it would block */
    pthread_mutex_t lock;       /* of orders: pool threads finish writes, the owner pops them */
    struct flush_order *orders;       /* one a queue */
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

/* used.len counts from the first writable byte, so a failed read, whose data was not written, says 0. */
static void finish(struct vpci_blk *blk, vpci_chain *chain, uint8_t status, uint32_t written)
{
    vpci_chain_set_last(chain, status);
    bump(&blk->stats.errors, status == STATUS_IOERR);
    bump(&blk->stats.unsupported, status == STATUS_UNSUPP);
    bool only_status = chain->in_len == 1 && chain->last_in;
    vpci_chain_done(chain, status == STATUS_OK ? written + 1 : only_status);
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
    while (o->first && request_of(o->first)->is_flush) {
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

/* ---- input and output ---- */

/* Cut n bytes off the front of pieces. */
static void skip(struct iovec **iov, uint32_t *n_iov, uint64_t n)
{
    for (; n && *n_iov; ++*iov, --*n_iov) {
        if (n < (*iov)->iov_len) {
            (*iov)->iov_base = (char *)(*iov)->iov_base + n;
            (*iov)->iov_len -= n;
            return;
        }
        n -= (*iov)->iov_len;
    }
}

typedef ssize_t transfer(int, const struct iovec *, int, off_t, int);

/* Move on until all is done. Returns 0 or an errno (EAGAIN: it would block); r->done tells how far it came, and the
 * pieces are cut to what is left, so that another call goes on from there. */
static int move(struct request *r, transfer *call, int flags)
{
    while (r->done < r->total) {
        int n = r->n_iov < MAX_IOV ? (int)r->n_iov : MAX_IOV;
        ssize_t got = call(r->blk->fd, r->iov, n, (off_t)(r->offset + r->done), flags);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno;
        if (!got)
            return EIO;   /* the file is shorter than the disk it was */
        r->done += (uint32_t)got;
        skip(&r->iov, &r->n_iov, (uint64_t)got);
    }
    return 0;
}

static void read_job(struct vpci_job *job)
{
    struct request *r = (struct request *)job;
    int error = move(r, preadv2, 0);
    finish(r->blk, chain_of(r), error ? STATUS_IOERR : STATUS_OK, r->total);
}

static bool durability_lost(struct vpci_blk *blk)
{
    return __atomic_load_n(&blk->sync_failed, __ATOMIC_SEQ_CST);
}

/* What the kernel failed to write back it may forget and call clean: nothing is durable from here on. */
static void lose_durability(struct vpci_blk *blk)
{
    __atomic_store_n(&blk->sync_failed, 1, __ATOMIC_SEQ_CST);
}

static int write_through(struct request *r)
{
    if (durability_lost(r->blk))
        return EIO;
    int error = move(r, pwritev2, RWF_DSYNC);
    if (error == EIO)
        lose_durability(r->blk);
    return error;
}

static void write_job(struct vpci_job *job)
{
    struct request *r = (struct request *)job;
    int error = r->write_through ? write_through(r) : move(r, pwritev2, 0);
    write_ended(r->blk, chain_of(r));
    finish(r->blk, chain_of(r), error ? STATUS_IOERR : STATUS_OK, 0);
}

static void flush_job(struct vpci_job *job)
{
    struct request *r = (struct request *)job;
    if (!durability_lost(r->blk) && fdatasync(r->blk->fd) < 0)
        lose_durability(r->blk);
    finish(r->blk, chain_of(r), durability_lost(r->blk) ? STATUS_IOERR : STATUS_OK, 0);
}

/* ---- requests by type ---- */

static bool in_bounds(const struct vpci_blk *blk, uint64_t sector, uint32_t bytes)
{
    uint64_t n = bytes / SECTOR;
    return !(bytes % SECTOR) && sector <= blk->sectors && n <= blk->sectors - sector;
}

/* Does the page cache have it? Then the pool's two wake-ups are saved. What it has not is left to the pool. */
static bool read_inline(struct vpci_blk *blk, struct request *r)
{
    if (__atomic_load_n(&blk->no_nowait, __ATOMIC_RELAXED))
        return false;
    int error = move(r, preadv2, RWF_NOWAIT);
    if (error == EOPNOTSUPP || error == ENOSYS)
        __atomic_store_n(&blk->no_nowait, 1, __ATOMIC_RELAXED);
    return !error;
}

static void do_in(struct vpci_blk *blk, vpci_chain *chain, const struct header *h)
{
    struct request *r = request_of(chain);
    struct iovec *in = chain->iov + chain->out_iovs;
    uint32_t bytes = chain->in_len - 1;
    if (!in_bounds(blk, h->sector, bytes)) {
        finish(blk, chain, STATUS_IOERR, 0);
        return;
    }
    in[chain->in_iovs - 1].iov_len--;   /* the status byte is not data */
    *r = (struct request){.job.run = read_job, .blk = blk, .offset = h->sector * SECTOR, .total = bytes,
                          .iov = in, .n_iov = chain->in_iovs};
    bump(&blk->stats.reads, 1);
    bump(&blk->stats.bytes_read, bytes);
    if (!read_inline(blk, r)) {
        vpci_pool_submit(blk->pool, &r->job);
        return;
    }
    bump(&blk->stats.served_inline, 1);
    finish(blk, chain, STATUS_OK, bytes);
}

static bool is_write_through(const struct vpci_blk *blk)
{
    return !__atomic_load_n(&blk->flush_acked, __ATOMIC_RELAXED) || !__atomic_load_n(&blk->writeback, __ATOMIC_RELAXED);
}

static void do_out(struct vpci_blk *blk, vpci_chain *chain, const struct header *h)
{
    struct request *r = request_of(chain);
    uint32_t bytes = chain->out_len - HEADER;
    if (blk->read_only || !in_bounds(blk, h->sector, bytes)) {
        finish(blk, chain, STATUS_IOERR, 0);
        return;
    }
    *r = (struct request){.job.run = write_job, .blk = blk, .offset = h->sector * SECTOR, .total = bytes,
                          .iov = chain->iov, .n_iov = chain->out_iovs, .write_through = is_write_through(blk)};
    skip(&r->iov, &r->n_iov, HEADER);
    bump(&blk->stats.writes, 1);
    bump(&blk->stats.bytes_written, bytes);
    pthread_mutex_lock(&blk->lock);
    order_add(blk, chain);
    pthread_mutex_unlock(&blk->lock);
    vpci_pool_submit(blk->pool, &r->job);
}

static void do_flush(struct vpci_blk *blk, vpci_chain *chain, const struct header *h)
{
    (void)h;
    *request_of(chain) = (struct request){.job.run = flush_job, .blk = blk, .is_flush = 1};
    bump(&blk->stats.flushes, 1);
    pthread_mutex_lock(&blk->lock);
    order_add(blk, chain);
    release_flushes(blk, &blk->orders[chain->queue_index]);
    pthread_mutex_unlock(&blk->lock);
}

static void do_get_id(struct vpci_blk *blk, vpci_chain *chain, const struct header *h)
{
    (void)h;
    uint32_t room = chain->in_len - 1;
    bump(&blk->stats.ids, 1);
    uint32_t n = vpci_chain_write(chain, 0, blk->serial, room < ID_BYTES ? room : ID_BYTES);
    finish(blk, chain, STATUS_OK, n);
}

typedef void operation(struct vpci_blk *blk, vpci_chain *chain, const struct header *h);

static const struct {
    uint32_t type;
    operation *run;
} operations[] = {
    {TYPE_IN, do_in}, {TYPE_OUT, do_out}, {TYPE_FLUSH, do_flush}, {TYPE_FLUSH_OUT, do_flush}, {TYPE_GET_ID, do_get_id},
};

static operation *operation_of(uint32_t type)
{
    for (size_t i = 0; i < ARRAY_LEN(operations); i++)
        if (operations[i].type == type)
            return operations[i].run;
    return NULL;
}

static void serve(void *state, const vpci_host *host, vpci_chain *chain)
{
    struct vpci_blk *blk = state;
    struct header h;
    if (chain->error || !chain->in_len || host->read(chain, 0, &h, HEADER) < HEADER) {
        finish(blk, chain, STATUS_IOERR, 0);
        return;
    }
    operation *run = operation_of(h.type & ~FLAG_BARRIER);
    if (run)
        run(blk, chain, &h);
    else
        finish(blk, chain, STATUS_UNSUPP, 0);
}

static bool is_of_queue(struct vpci_job *job, void *queue_index)
{
    return chain_of((struct request *)job)->queue_index == *(uint32_t *)queue_index;
}

static void give_up(struct request *r)
{
    vpci_chain *chain = chain_of(r);
    if (r->job.run == write_job)
        write_ended(r->blk, chain);
    finish(r->blk, chain, STATUS_IOERR, 0);
}

/* Ending a write may release a flush, which is then given up in the next round. */
static void cancel(void *state, uint32_t queue_index)
{
    struct vpci_blk *blk = state;
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

void vpci_blk_set_writeback(vpci_blk *blk, int writeback)
{
    __atomic_store_n(&blk->writeback, writeback, __ATOMIC_RELAXED);
}

void vpci_blk_read_stats(vpci_blk *blk, vpci_blk_stats *stats)
{
    const uint64_t *from = (const uint64_t *)&blk->stats;
    for (size_t i = 0; i < sizeof(*stats) / sizeof(*from); i++)
        ((uint64_t *)stats)[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
}

vpci_blk *vpci_blk_new(int fd, uint64_t sectors, int read_only, const char *serial, uint32_t n_queues,
                       uint32_t n_threads)
{
    vpci_blk *blk = calloc(1, sizeof(*blk));
    if (!blk)
        return NULL;
    blk->fd = fd;
    blk->sectors = sectors;
    blk->read_only = read_only;
    blk->writeback = 1;
    memcpy(blk->serial, serial, strnlen(serial, ID_BYTES));
    pthread_mutex_init(&blk->lock, NULL);
    blk->orders = calloc(n_queues, sizeof(*blk->orders));
    blk->pool = blk->orders ? vpci_pool_new(n_threads, "vpci-blk") : NULL;
    if (!blk->pool) {
        vpci_blk_free(blk);
        return NULL;
    }
    for (uint32_t i = 0; i < n_queues; i++)
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
    pthread_mutex_destroy(&blk->lock);
    free(blk);
}
