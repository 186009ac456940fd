/* The backend on an NBD server, by libnbd, which is loaded when it is asked for: nothing of it is needed to build vpci.
 * disk.c calls it with memory of ours only. A lane is one connection: requests on it go one after the other, so there
 * is one a pool thread, where the server takes several. Source: [libnbd nbd_create(3), nbd_pread(3) and their like]. */
#include "core.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/socket.h>
#include <time.h>

enum { FUA = 1, NO_HOLE = 2, MAX_TRANSFER = 32 << 20, MAX_RANGE = 1 << 30, MAX_LANES = 16 };
enum { SIZE_MINIMUM = 0, SIZE_PREFERRED = 1 };

typedef struct nbd_handle handle;   /* libnbd's */

/* What libnbd is used for. The names and types are its public, stable interface. */
#define FUNCTIONS(F) \
    F(handle *, create, (void)) \
    F(void, close, (handle *)) \
    F(const char *, get_error, (void)) \
    F(int, get_errno, (void)) \
    F(int, aio_connect_uri, (handle *, const char *)) \
    F(int, aio_is_connecting, (handle *)) \
    F(int, aio_is_ready, (handle *)) \
    F(int, aio_get_fd, (handle *)) \
    F(int, poll, (handle *, int)) \
    F(int64_t, get_size, (handle *)) \
    F(int64_t, get_block_size, (handle *, int)) \
    F(int, is_read_only, (handle *)) \
    F(int, can_flush, (handle *)) \
    F(int, can_fua, (handle *)) \
    F(int, can_trim, (handle *)) \
    F(int, can_zero, (handle *)) \
    F(int, can_multi_conn, (handle *)) \
    F(int, pread, (handle *, void *, size_t, uint64_t, uint32_t)) \
    F(int, pwrite, (handle *, const void *, size_t, uint64_t, uint32_t)) \
    F(int, flush, (handle *, uint32_t)) \
    F(int, trim, (handle *, uint64_t, uint64_t, uint32_t)) \
    F(int, zero, (handle *, uint64_t, uint64_t, uint32_t))

struct libnbd {
#define MEMBER(type, name, args) type(*name) args;
    FUNCTIONS(MEMBER)
#undef MEMBER
};

static const struct {
    const char *name;
    size_t at;
} functions[] = {
#define ROW(type, name, args) {"nbd_" #name, offsetof(struct libnbd, name)},
    FUNCTIONS(ROW)
#undef ROW
};

struct lane {
    pthread_mutex_t lock;
    handle *h;
    int fd;             /* our own name of its socket: libnbd closes its when a connection breaks */
};

struct vpci_nbd {
    struct libnbd lib;
    vpci_nbd_info info;
    struct lane lanes[MAX_LANES];
    uint32_t n_lanes;
    uint32_t next;      /* atomic: the lane that is waited for when all are taken */
};

/* ---- the library ---- */

/* It stays loaded: threads of its own dependencies may live on. */
static bool load(struct libnbd *lib, const char *library, char *error, uint32_t error_len)
{
    void *so = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    for (size_t i = 0; so && i < ARRAY_LEN(functions); i++) {
        void *found = dlsym(so, functions[i].name);
        memcpy((char *)lib + functions[i].at, &found, sizeof(found));
        if (!found)
            so = NULL;
    }
    if (!so)
        snprintf(error, error_len, "%s", dlerror());
    return so;
}

/* ---- connections ---- */

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

static bool await_ready(const struct libnbd *lib, handle *h, int64_t until)
{
    while (lib->aio_is_connecting(h) > 0) {
        int64_t left = until - now_ms();
        if (left <= 0 || lib->poll(h, (int)left) < 0)
            return false;
    }
    return lib->aio_is_ready(h) > 0;
}

static bool connect_lane(struct vpci_nbd *n, const char *uri, int64_t until, char *error, uint32_t error_len)
{
    struct lane *lane = &n->lanes[n->n_lanes];
    handle *h = n->lib.create();
    if (h && !n->lib.aio_connect_uri(h, uri) && await_ready(&n->lib, h, until)) {
        pthread_mutex_init(&lane->lock, NULL);
        lane->h = h;
        lane->fd = fcntl(n->lib.aio_get_fd(h), F_DUPFD_CLOEXEC, 0);
        n->n_lanes++;
        return true;
    }
    const char *said = now_ms() >= until ? "no answer in time" : n->lib.get_error();
    snprintf(error, error_len, "%s", said ? said : "the connection was refused");
    if (h)
        n->lib.close(h);
    return false;
}

static uint32_t block_size(const struct libnbd *lib, handle *h, int which)
{
    int64_t size = lib->get_block_size(h, which);
    return size > 0 && size <= UINT32_MAX ? (uint32_t)size : 0;
}

static vpci_nbd_info ask(const struct libnbd *lib, handle *h)
{
    return (vpci_nbd_info){
        .size_bytes = lib->get_size(h), .read_only = lib->is_read_only(h) > 0, .can_flush = lib->can_flush(h) > 0,
        .can_fua = lib->can_fua(h) > 0, .can_trim = lib->can_trim(h) > 0, .can_zero = lib->can_zero(h) > 0,
        .multi_conn = lib->can_multi_conn(h) > 0, .minimum_block = block_size(lib, h, SIZE_MINIMUM),
        .preferred_block = block_size(lib, h, SIZE_PREFERRED),
    };
}

vpci_nbd *vpci_nbd_open(const char *library, const char *uri, uint32_t n_lanes, int timeout_ms, vpci_nbd_info *info,
                        char *error, uint32_t error_len)
{
    int64_t until = now_ms() + timeout_ms;
    vpci_nbd *n = calloc(1, sizeof(*n));
    bool ok = n && load(&n->lib, library, error, error_len) && connect_lane(n, uri, until, error, error_len);
    if (ok)
        n->info = *info = ask(&n->lib, n->lanes[0].h);
    n_lanes = n_lanes < MAX_LANES ? n_lanes : MAX_LANES;
    while (ok && n->info.multi_conn && n->n_lanes < n_lanes)
        ok = connect_lane(n, uri, until, error, error_len);
    if (!ok && n)
        vpci_nbd_close(n);
    return ok ? n : NULL;
}

void vpci_nbd_interrupt(vpci_nbd *n)
{
    for (uint32_t i = 0; i < n->n_lanes; i++)
        shutdown(n->lanes[i].fd, SHUT_RDWR);
}

void vpci_nbd_close(vpci_nbd *n)
{
    for (uint32_t i = 0; i < n->n_lanes; i++) {
        n->lib.close(n->lanes[i].h);
        close(n->lanes[i].fd);
        pthread_mutex_destroy(&n->lanes[i].lock);
    }
    free(n);
}

/* ---- operations ---- */

static struct lane *take_lane(struct vpci_nbd *n)
{
    for (uint32_t i = 0; i < n->n_lanes; i++)
        if (!pthread_mutex_trylock(&n->lanes[i].lock))
            return &n->lanes[i];
    struct lane *lane = &n->lanes[__atomic_fetch_add(&n->next, 1, __ATOMIC_RELAXED) % n->n_lanes];
    pthread_mutex_lock(&lane->lock);
    return lane;
}

/* What a call's result means; the lane goes back. libnbd's errno is 0 where no server or system call failed. */
static int leave_lane(struct vpci_nbd *n, struct lane *lane, int result)
{
    int error = result < 0 ? n->lib.get_errno() : 0;
    pthread_mutex_unlock(&lane->lock);
    return result < 0 ? -(error ? error : EIO) : 0;
}

static int64_t nbd_read(void *disk, const struct iovec *iov, uint32_t n_iov, uint64_t offset, uint32_t flags)
{
    struct vpci_nbd *n = disk;
    size_t len = iov->iov_len < MAX_TRANSFER ? iov->iov_len : MAX_TRANSFER;
    (void)n_iov;
    if (flags & VPCI_DISK_NOW)
        return -EAGAIN;
    struct lane *lane = take_lane(n);
    int error = leave_lane(n, lane, n->lib.pread(lane->h, iov->iov_base, len, offset, 0));
    return error ? error : (int64_t)len;
}

static int nbd_flush(void *disk)
{
    struct vpci_nbd *n = disk;
    if (!n->info.can_flush)
        return 0;   /* a server without a volatile cache */
    struct lane *lane = take_lane(n);
    return leave_lane(n, lane, n->lib.flush(lane->h, 0));
}

static int64_t nbd_write(void *disk, const struct iovec *iov, uint32_t n_iov, uint64_t offset, uint32_t flags)
{
    struct vpci_nbd *n = disk;
    size_t len = iov->iov_len < MAX_TRANSFER ? iov->iov_len : MAX_TRANSFER;
    bool durable = flags & VPCI_DISK_DURABLE;
    (void)n_iov;
    if (flags & VPCI_DISK_NOW)
        return -EAGAIN;
    struct lane *lane = take_lane(n);
    int error = leave_lane(n, lane, n->lib.pwrite(lane->h, iov->iov_base, len, offset,
                                                  durable && n->info.can_fua ? FUA : 0));
    if (!error && durable && !n->info.can_fua)
        error = nbd_flush(n);
    return error ? error : (int64_t)len;
}

typedef int range(handle *, uint64_t, uint64_t, uint32_t);

static int each(struct vpci_nbd *n, range *call, uint64_t offset, uint64_t len, uint32_t flags)
{
    struct lane *lane = take_lane(n);
    int result = 0;
    for (uint64_t now; len && result >= 0; offset += now, len -= now) {
        now = len < MAX_RANGE ? len : MAX_RANGE;
        result = call(lane->h, now, offset, flags);
    }
    return leave_lane(n, lane, result);
}

static int nbd_trim(void *disk, uint64_t offset, uint64_t len, uint32_t flags)
{
    struct vpci_nbd *n = disk;
    (void)flags;
    return n->info.can_trim ? each(n, n->lib.trim, offset, len, 0) : -EOPNOTSUPP;
}

static int nbd_zero(void *disk, uint64_t offset, uint64_t len, uint32_t flags)
{
    struct vpci_nbd *n = disk;
    return n->info.can_zero ? each(n, n->lib.zero, offset, len, flags & VPCI_DISK_UNMAP ? 0 : NO_HOLE) : -EOPNOTSUPP;
}

static const vpci_disk_ops nbd_ops = {
    .abi = VPCI_DISK_ABI, .read = nbd_read, .write = nbd_write, .flush = nbd_flush, .discard = nbd_trim, .zero = nbd_zero,
};

const vpci_disk_ops *vpci_nbd_disk(void)
{
    return &nbd_ops;
}
