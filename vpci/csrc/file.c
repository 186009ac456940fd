/* The backends on a file descriptor: a file, a block device, memory, nothing at all. blk.c calls them through disk.c;
 * they hand guest memory to system calls only, so memory that vanished is an EFAULT. */
#include "core.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

typedef ssize_t transfer(int, const struct iovec *, int, off_t, int);

enum { MAX_IOV = 1024 };

static int64_t move(struct vpci_file *f, transfer *call, const struct iovec *iov, uint32_t n, uint64_t offset, int how)
{
    ssize_t got;
    do
        got = call(f->fd, iov, n < MAX_IOV ? (int)n : MAX_IOV, (off_t)offset, how);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got;
}

/* A file that cannot say whether it would block is not asked again. */
static int64_t read_now(struct vpci_file *f, const struct iovec *iov, uint32_t n, uint64_t offset)
{
    uint32_t now = __atomic_load_n(&f->now, __ATOMIC_RELAXED);
    if (now == VPCI_NOW_NEVER)
        return -EAGAIN;
    int64_t got = move(f, preadv2, iov, n, offset, now == VPCI_NOW_CACHED ? RWF_NOWAIT : 0);
    if (got == -EOPNOTSUPP || got == -ENOSYS)
        __atomic_store_n(&f->now, VPCI_NOW_NEVER, __ATOMIC_RELAXED);
    return got;
}

static int64_t file_read(void *disk, const struct iovec *iov, uint32_t n, uint64_t offset, uint32_t flags)
{
    return flags & VPCI_DISK_NOW ? read_now(disk, iov, n, offset) : move(disk, preadv2, iov, n, offset, 0);
}

static int64_t file_write(void *disk, const struct iovec *iov, uint32_t n, uint64_t offset, uint32_t flags)
{
    struct vpci_file *f = disk;
    if (flags & VPCI_DISK_NOW && f->now != VPCI_NOW_ALWAYS)
        return -EAGAIN;
    return move(f, pwritev2, iov, n, offset, flags & VPCI_DISK_DURABLE ? RWF_DSYNC : 0);
}

static int file_flush(void *disk)
{
    struct vpci_file *f = disk;
    return fdatasync(f->fd) < 0 ? -errno : 0;
}

static int allocate(int fd, int mode, uint64_t offset, uint64_t len)
{
    int rc;
    do
        rc = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : 0;
}

static int file_discard(void *disk, uint64_t offset, uint64_t len, uint32_t flags)
{
    struct vpci_file *f = disk;
    uint64_t range[] = {offset, len};
    (void)flags;
    if (f->is_block)
        return ioctl(f->fd, BLKDISCARD, range) < 0 ? -errno : 0;
    return allocate(f->fd, FALLOC_FL_PUNCH_HOLE, offset, len);
}

/* The kernel does the same for block devices: a hole is an unmap, and a range of zeroes keeps its blocks. */
static int file_zero(void *disk, uint64_t offset, uint64_t len, uint32_t flags)
{
    struct vpci_file *f = disk;
    int error = -EOPNOTSUPP;
    if (flags & VPCI_DISK_UNMAP)
        error = allocate(f->fd, FALLOC_FL_PUNCH_HOLE, offset, len);
    return error == -EOPNOTSUPP ? allocate(f->fd, FALLOC_FL_ZERO_RANGE, offset, len) : error;
}

static const vpci_disk_ops file_ops = {
    .abi = VPCI_DISK_ABI, .read = file_read, .write = file_write, .flush = file_flush,
    .discard = file_discard, .zero = file_zero,
};

const vpci_disk_ops *vpci_file_disk(void)
{
    return &file_ops;
}

/* ---- null ---- */

static int64_t null_write(void *disk, const struct iovec *iov, uint32_t n, uint64_t offset, uint32_t flags)
{
    (void)flags;
    return move(disk, pwritev2, iov, n, offset, 0);
}

static int null_flush(void *disk)
{
    (void)disk;
    return 0;
}

static int null_range(void *disk, uint64_t offset, uint64_t len, uint32_t flags)
{
    (void)disk, (void)offset, (void)len, (void)flags;
    return 0;
}

static const vpci_disk_ops null_ops = {
    .abi = VPCI_DISK_ABI, .read = file_read, .write = null_write, .flush = null_flush,
    .discard = null_range, .zero = null_range,
};

const vpci_disk_ops *vpci_null_disk(void)
{
    return &null_ops;
}
