/* What blk.c asks of any backend: whole transfers, memory and offsets as the backend wants them, and what it cannot do
 * by itself. blk.c hands it ranges of a disk and pieces of guest memory; it calls the backend's table. */
#include "core.h"

enum { BOUNCE_BYTES = 1 << 20 };

void vpci_disk_init(struct vpci_disk *d, const vpci_disk_ops *ops, void *state, uint32_t align, bool private_memory)
{
    *d = (struct vpci_disk){.ops = ops, .state = state, .align = align, .private_memory = private_memory};
    pthread_rwlock_init(&d->edges, NULL);
}

void vpci_disk_fini(struct vpci_disk *d)
{
    pthread_rwlock_destroy(&d->edges);
}

static uint64_t round_down(const struct vpci_disk *d, uint64_t n) { return n - n % d->align; }
static uint64_t round_up(const struct vpci_disk *d, uint64_t n) { return round_down(d, n + d->align - 1); }

/* ---- one call for the whole ---- */

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

void vpci_span_skip(struct vpci_span *s, uint64_t n)
{
    skip(&s->iov, &s->n_iov, n);
    s->offset += n;
    s->len -= n;
}

static int move(const struct vpci_disk *d, struct vpci_span *s, bool write, uint32_t flags)
{
    while (s->len) {
        int64_t got = (write ? d->ops->write : d->ops->read)(d->state, s->iov, s->n_iov, s->offset, flags);
        if (got < 0)
            return (int)-got;
        if (!got || (uint64_t)got > s->len)
            return EIO;   /* the backend is shorter than the disk */
        vpci_span_skip(s, (uint64_t)got);
    }
    return 0;
}

static int move_private(const struct vpci_disk *d, void *buf, uint64_t offset, uint64_t len, bool write, uint32_t flags)
{
    struct iovec piece = {buf, len};
    struct vpci_span s = {&piece, 1, offset, len};
    return move(d, &s, write, flags);
}

/* ---- memory and offsets that the backend does not take ---- */

static bool needs_copy(const struct vpci_disk *d, const struct vpci_span *s)
{
    if (d->private_memory)
        return true;
    uint64_t odd = s->offset | s->len;
    for (uint32_t i = 0; i < s->n_iov; i++)
        odd |= (uintptr_t)s->iov[i].iov_base | s->iov[i].iov_len;
    return odd & (d->align - 1);
}

struct copy {
    const struct vpci_span *span;
    uint8_t *buf;
    uint64_t len;
    bool to_guest;
};

static void run_copy(void *arg)
{
    struct copy *c = arg;
    uint64_t done = 0;
    for (uint32_t i = 0; done < c->len; i++) {
        uint64_t n = c->span->iov[i].iov_len;
        n = n < c->len - done ? n : c->len - done;
        uint8_t *guest = c->span->iov[i].iov_base;
        memcpy(c->to_guest ? guest : c->buf + done, c->to_guest ? c->buf + done : guest, n);
        done += n;
    }
}

/* The first len bytes of the pieces to or from buf; mem NULL: they are ours. EFAULT when guest memory vanished. */
static int copy(const vpci_mem *mem, const struct vpci_span *s, void *buf, uint64_t len, bool to_guest)
{
    struct copy c = {s, buf, len, to_guest};
    if (!mem) {
        run_copy(&c);
        return 0;
    }
    return vpci_guard(mem, run_copy, &c) ? 0 : EFAULT;
}

bool vpci_span_read(const vpci_mem *mem, const struct vpci_span *s, void *buf)
{
    return !copy(mem, s, buf, s->len, false);
}

/* Read what a write does not cover of its first and last block. */
static int read_edges(const struct vpci_disk *d, uint8_t *buf, uint64_t start, uint64_t end, uint64_t from, uint64_t to)
{
    int error = from > start ? move_private(d, buf, start, d->align, false, 0) : 0;
    bool last_is_read = from > start && end - start == d->align;
    if (!error && to < end && !last_is_read)
        error = move_private(d, buf + (end - start) - d->align, end - d->align, d->align, false, 0);
    return error;
}

static int bounce_in(const struct vpci_disk *d, const vpci_mem *mem, const struct vpci_span *s, uint8_t *buf, uint64_t len)
{
    uint64_t start = round_down(d, s->offset), end = round_up(d, s->offset + len);
    int error = move_private(d, buf, start, end - start, false, 0);
    return error ? error : copy(mem, s, buf + (s->offset - start), len, true);
}

static int bounce_out(const struct vpci_disk *d, const vpci_mem *mem, const struct vpci_span *s, uint8_t *buf,
                      uint64_t len, uint32_t flags)
{
    uint64_t start = round_down(d, s->offset), end = round_up(d, s->offset + len);
    int error = read_edges(d, buf, start, end, s->offset, s->offset + len);
    if (!error)
        error = copy(mem, s, buf + (s->offset - start), len, false);
    return error ? error : move_private(d, buf, start, end - start, true, flags);
}

/* Blocks that are written in part are read first: nobody else may write them meanwhile. */
static void lock_edges(struct vpci_disk *d, const struct vpci_span *s)
{
    if ((s->offset | s->len) & (d->align - 1))
        pthread_rwlock_wrlock(&d->edges);
    else
        pthread_rwlock_rdlock(&d->edges);
}

static int copied(struct vpci_disk *d, const vpci_mem *mem, struct vpci_span *s, bool write, uint32_t flags)
{
    void *buf;
    uint64_t most = s->len < BOUNCE_BYTES ? s->len : BOUNCE_BYTES;
    int error = posix_memalign(&buf, d->align < 64 ? 64 : d->align, most + 2 * (size_t)d->align);
    if (error)
        return error;
    while (s->len && !error) {
        uint64_t len = s->len < most ? s->len : most;
        error = write ? bounce_out(d, mem, s, buf, len, flags) : bounce_in(d, mem, s, buf, len);
        if (!error)
            vpci_span_skip(s, len);
    }
    free(buf);
    return error;
}

static int transfer(struct vpci_disk *d, const vpci_mem *mem, struct vpci_span *s, bool write, uint32_t flags)
{
    if (!needs_copy(d, s))
        return move(d, s, write, flags);
    return flags & VPCI_DISK_NOW ? EAGAIN : copied(d, mem, s, write, flags);
}

int vpci_disk_read(struct vpci_disk *d, const vpci_mem *mem, struct vpci_span *s, uint32_t flags)
{
    return transfer(d, mem, s, false, flags);
}

int vpci_disk_write(struct vpci_disk *d, const vpci_mem *mem, struct vpci_span *s, uint32_t flags)
{
    if (d->align <= VPCI_SECTOR)
        return transfer(d, mem, s, true, flags);
    if (flags & VPCI_DISK_NOW)
        return EAGAIN;
    lock_edges(d, s);
    int error = transfer(d, mem, s, true, flags);
    pthread_rwlock_unlock(&d->edges);
    return error;
}

/* ---- ranges ---- */

int vpci_disk_flush(struct vpci_disk *d)
{
    return -d->ops->flush(d->state);
}

/* Discarding is a hint: blocks that are covered in part stay. */
int vpci_disk_discard(struct vpci_disk *d, uint64_t offset, uint64_t len, uint32_t flags)
{
    uint64_t start = round_up(d, offset), end = round_down(d, offset + len);
    int error = d->ops->discard && start < end ? -d->ops->discard(d->state, start, end - start, flags) : 0;
    return error == EOPNOTSUPP ? 0 : error;
}

/* Overwrite with zeroes, where they are. */
int vpci_disk_erase(struct vpci_disk *d, uint64_t offset, uint64_t len, uint32_t flags)
{
    static const uint8_t zeroes[65536] __attribute__((aligned(4096)));
    int error = 0;
    (void)flags;
    for (uint64_t n; len && !error; offset += n, len -= n) {
        n = len < sizeof(zeroes) ? len : sizeof(zeroes);
        struct iovec piece = {(void *)zeroes, n};
        struct vpci_span s = {&piece, 1, offset, n};
        error = vpci_disk_write(d, NULL, &s, 0);
    }
    return error;
}

int vpci_disk_zero(struct vpci_disk *d, uint64_t offset, uint64_t len, uint32_t flags)
{
    bool whole = !((offset | len) & (d->align - 1));
    int error = d->ops->zero && whole && len ? -d->ops->zero(d->state, offset, len, flags) : EOPNOTSUPP;
    return error == EOPNOTSUPP ? vpci_disk_erase(d, offset, len, 0) : error;
}
