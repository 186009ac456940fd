/* The memory table: guest physical addresses to host pointers, with checks that cannot overflow.
 * The pump hands it DMA_MAP and DMA_UNMAP; ring.c takes pointers from it and counts them on the range. */
#include "core.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <linux/magic.h>

#define NFS_MAGIC 0x6969
#define FUSE_MAGIC 0x65735546
#define SMB2_MAGIC 0xfe534d42u
#define CIFS_MAGIC 0xff534d42u

/* By gpa, without overlap. Replaced as a whole when a range comes or goes. */
struct table {
    size_t n;
    struct vpci_range *ranges[];
};

struct vpci_mem {
    struct table *table;
    struct vpci_range *hint;       /* the range of the last look-up */
    bool may_fault;                /* some file of it could not be kept from shrinking */
};

static struct table *table_new(size_t n)
{
    struct table *t = calloc(1, sizeof(*t) + n * sizeof(t->ranges[0]));
    if (t)
        t->n = n;
    return t;
}

vpci_mem *vpci_mem_new(void)
{
    vpci_mem *mem = calloc(1, sizeof(*mem));
    if (mem && !(mem->table = table_new(0))) {
        free(mem);
        return NULL;
    }
    return mem;
}

static void range_free(struct vpci_range *r)
{
    if (r->hva && !r->borrowed)
        munmap(r->hva, r->size);
    free(r);
}

void vpci_mem_clear(vpci_mem *mem)
{
    for (size_t i = 0; i < mem->table->n; i++)
        range_free(mem->table->ranges[i]);
    mem->table->n = 0;
    mem->hint = NULL;
    mem->may_fault = false;
}

bool vpci_mem_may_fault(const vpci_mem *mem)
{
    return mem->may_fault;
}

void vpci_mem_free(vpci_mem *mem)
{
    if (!mem)
        return;
    vpci_mem_clear(mem);
    free(mem->table);
    free(mem);
}

/* Index of the first range that starts above gpa. */
static size_t upper(const struct table *t, uint64_t gpa)
{
    size_t lo = 0, hi = t->n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (t->ranges[mid]->gpa <= gpa)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static bool range_has(const struct vpci_range *r, uint64_t gpa)
{
    return gpa - r->gpa < r->size;   /* unsigned: an address below the range is a huge distance */
}

static struct vpci_range *range_at(vpci_mem *mem, uint64_t gpa)
{
    if (mem->hint && range_has(mem->hint, gpa))
        return mem->hint;
    size_t i = upper(mem->table, gpa);
    if (!i || !range_has(mem->table->ranges[i - 1], gpa))
        return NULL;
    return mem->hint = mem->table->ranges[i - 1];
}

enum vpci_where vpci_mem_piece(vpci_mem *mem, uint64_t gpa, uint64_t len, uint32_t perm, struct vpci_piece *piece)
{
    struct vpci_range *r = range_at(mem, gpa);
    if (!r || (r->perm & perm) != perm)
        return VPCI_NOWHERE;
    uint64_t off = gpa - r->gpa;
    piece->range = r;
    piece->hva = r->hva ? r->hva + off : NULL;
    piece->len = r->size - off < len ? r->size - off : len;
    return r->hva ? VPCI_HERE : VPCI_FAR;
}

struct vpci_range *vpci_mem_exact(vpci_mem *mem, uint64_t gpa, uint64_t size)
{
    struct vpci_range *r = range_at(mem, gpa);
    return r && r->gpa == gpa && r->size == size ? r : NULL;
}

struct vpci_range *vpci_mem_nth(vpci_mem *mem, size_t n)
{
    return n < mem->table->n ? mem->table->ranges[n] : NULL;
}

static bool is_network_fs(int fd)
{
    struct statfs fs;
    if (fstatfs(fd, &fs) < 0)
        return true;
    uint32_t type = (uint32_t)fs.f_type;
    return type == NFS_MAGIC || type == FUSE_MAGIC || type == SMB2_MAGIC || type == CIFS_MAGIC;
}

/* 1: can be mapped, 0: is to be reached by messages, -errno: is wrong. */
static int mappable(int fd, uint64_t offset, uint64_t size)
{
    struct stat st;
    if (fd < 0)
        return 0;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode) || is_network_fs(fd))
        return 0;
    /* A page past the end of the file would be a SIGBUS at first touch. */
    return offset <= (uint64_t)st.st_size && size <= (uint64_t)st.st_size - offset ? 1 : -ERANGE;
}

static bool is_aligned(uint64_t value)
{
    return !(value & (PAGE_SIZE_BYTES - 1));
}

static int check_span(const vpci_mem *mem, uint64_t gpa, uint64_t size, uint64_t offset, uint32_t perm)
{
    if (!size || !is_aligned(gpa) || !is_aligned(size) || !is_aligned(offset) || gpa + size - 1 < gpa ||
        offset + size < offset || perm & ~(uint32_t)(VPCI_MEM_READ | VPCI_MEM_WRITE))
        return -EINVAL;
    size_t i = upper(mem->table, gpa + size - 1);
    if (i && mem->table->ranges[i - 1]->gpa + (mem->table->ranges[i - 1]->size - 1) >= gpa)
        return -EEXIST;
    return mem->table->n < VPCI_MEM_MAX_RANGES ? 0 : -ENOSPC;
}

static int insert(vpci_mem *mem, struct vpci_range *r)
{
    struct table *old = mem->table, *t = table_new(old->n + 1);
    if (!t)
        return -ENOMEM;
    size_t i = upper(old, r->gpa);
    memcpy(t->ranges, old->ranges, i * sizeof(r));
    t->ranges[i] = r;
    memcpy(t->ranges + i + 1, old->ranges + i, (old->n - i) * sizeof(r));
    mem->table = t;
    free(old);
    return 0;
}

/* A file that shrinks under a mapping is a SIGBUS at the next touch. QEMU's RAM comes sealed against that; what is not
 * gets the seal from us, and what cannot have one is touched under a guard. */
static bool cannot_shrink(int fd)
{
    int seals = fcntl(fd, F_GET_SEALS);
    return seals >= 0 && (seals & F_SEAL_SHRINK || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
}

static int map_fd(struct vpci_range *r, int fd, uint64_t offset)
{
    int prot = (r->perm & VPCI_MEM_WRITE) ? PROT_READ | PROT_WRITE : PROT_READ;
    void *p = mmap(NULL, r->size, prot, MAP_SHARED, fd, (off_t)offset);
    if (p == MAP_FAILED)
        return -errno;
    madvise(p, r->size, MADV_DONTFORK);
    r->hva = p;
    return 0;
}

static struct vpci_range *range_new(uint64_t gpa, uint64_t size, uint32_t perm)
{
    struct vpci_range *r = calloc(1, sizeof(*r));
    if (r)
        *r = (struct vpci_range){.gpa = gpa, .size = size, .perm = perm};
    return r;
}

static void guard(vpci_mem *mem)
{
    mem->may_fault = true;
    vpci_guard_install();
}

int vpci_mem_map(vpci_mem *mem, uint64_t gpa, uint64_t size, int fd, uint64_t offset, uint32_t perm)
{
    int rc = check_span(mem, gpa, size, offset, perm);
    if (rc < 0)
        return rc;
    /* Sealed first, then measured: the other way round it could shrink in between. */
    bool is_safe = fd < 0 || cannot_shrink(fd);
    int can = mappable(fd, offset, size);
    if (can < 0)
        return can;
    struct vpci_range *r = range_new(gpa, size, perm);
    if (!r)
        return -ENOMEM;
    if ((can && (rc = map_fd(r, fd, offset)) < 0) || (rc = insert(mem, r)) < 0)
        range_free(r);
    else if (can && !is_safe)
        guard(mem);
    return rc;
}

int vpci_mem_borrow(vpci_mem *mem, uint64_t gpa, uint64_t size, void *hva, uint32_t perm)
{
    int rc = check_span(mem, gpa, size, 0, perm);
    struct vpci_range *r = rc < 0 ? NULL : range_new(gpa, size, perm);
    if (!r)
        return rc < 0 ? rc : -ENOMEM;
    r->hva = hva;
    r->borrowed = true;
    if ((rc = insert(mem, r)) < 0)
        range_free(r);
    else if (hva)
        guard(mem);
    return rc;
}

int vpci_mem_unmap(vpci_mem *mem, uint64_t gpa, uint64_t size)
{
    struct vpci_range *r = vpci_mem_exact(mem, gpa, size);
    if (!r)
        return -ENOENT;
    if (r->users)
        return -EBUSY;
    struct table *old = mem->table, *t = table_new(old->n - 1);
    if (!t)
        return -ENOMEM;
    size_t i = upper(old, gpa) - 1;
    memcpy(t->ranges, old->ranges, i * sizeof(r));
    memcpy(t->ranges + i, old->ranges + i + 1, (old->n - i - 1) * sizeof(r));
    mem->table = t;
    mem->hint = NULL;
    free(old);
    range_free(r);
    return 0;
}

enum vpci_where vpci_mem_whole(vpci_mem *mem, uint64_t gpa, uint64_t len, uint32_t perm)
{
    struct vpci_piece p;
    enum vpci_where whole = VPCI_HERE;
    if (len && gpa + len - 1 < gpa)
        return VPCI_NOWHERE;
    for (; len; gpa += p.len, len -= p.len) {
        enum vpci_where where = vpci_mem_piece(mem, gpa, len, perm, &p);
        if (where != VPCI_HERE)
            whole = where;
        if (where == VPCI_NOWHERE)
            break;
    }
    return whole;
}

int vpci_mem_read(vpci_mem *mem, uint64_t gpa, void *buf, uint64_t len)
{
    struct vpci_piece p;
    if (vpci_mem_whole(mem, gpa, len, VPCI_MEM_READ) != VPCI_HERE)
        return -EFAULT;
    for (uint8_t *to = buf; len; gpa += p.len, to += p.len, len -= p.len) {
        vpci_mem_piece(mem, gpa, len, VPCI_MEM_READ, &p);
        memcpy(to, p.hva, p.len);
    }
    return 0;
}

int vpci_mem_write(vpci_mem *mem, uint64_t gpa, const void *buf, uint64_t len)
{
    struct vpci_piece p;
    if (vpci_mem_whole(mem, gpa, len, VPCI_MEM_WRITE) != VPCI_HERE)
        return -EFAULT;
    for (const uint8_t *from = buf; len; gpa += p.len, from += p.len, len -= p.len) {
        vpci_mem_piece(mem, gpa, len, VPCI_MEM_WRITE, &p);
        memcpy(p.hva, from, p.len);
    }
    return 0;
}
