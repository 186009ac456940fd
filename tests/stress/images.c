/* Case Q20: random ring images. `images COUNT SEED` fills guest memory at random around what a ring may hold, lets the
 * core fetch and complete whatever it makes of that, and compares all of guest memory with what it was: only the
 * writable buffers of the chains that came out, and the used ring, may differ. Ends with 0, or with 1 at the first
 * image that shows a fault; sanitizers end it with a status of their own.
 *
 * What a chain may write is found by a walk of our own over the image, which shares nothing with ring.c. */
#include "core.h"

#include <stdio.h>
#include <sys/mman.h>

enum { PAGE = 4096, MEMORY = 6 * PAGE, MAX_SG = 40, SIZES = 6, MAX_STEPS = 64, MAX_SIZE = 32, TABLES = 24, BLOCK = 64 };
enum { NEXT = 1, WRITE = 2, TABLE = 4 };
#define BASE 0x100000ull
#define TOP (~0ull - PAGE + 1)       /* the last page there is */

/* Neighbours lie apart in the file; one cannot be written, one ends where addresses end. */
static const struct { uint64_t gpa, size, off; uint32_t perm; } ranges[] = {
    {BASE, 3 * PAGE, 3 * PAGE, 3},   /* the driver's part of the ring; the used part; tables and buffers */
    {BASE + 3 * PAGE, PAGE, 0, 3},
    {BASE + 4 * PAGE, PAGE, PAGE, VPCI_MEM_READ},
    {TOP, PAGE, 2 * PAGE, 3},
};

static uint8_t *guest;               /* the whole file */
static uint8_t image[MEMORY], allowed[MEMORY];
static uint64_t state, n_image, n_chains, n_broken;

static inline uint32_t rnd(uint32_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)((state >> 20) % below);
}

/* Where a guest address is in the file; -1: nowhere. */
static int64_t place(uint64_t gpa)
{
    for (size_t i = 0; i < ARRAY_LEN(ranges); i++)
        if (gpa - ranges[i].gpa < ranges[i].size)
            return (int64_t)(ranges[i].off + (gpa - ranges[i].gpa));
    return -1;
}

/* Only ever in the first range. */
static void put(uint64_t gpa, uint64_t value, int bytes)
{
    memcpy(guest + ranges[0].off + (gpa - BASE), &value, bytes);
}

/* A descriptor as it was; false when it is not all in memory. */
static bool get(uint64_t gpa, uint8_t desc[16])
{
    int64_t at = place(gpa), end = place(gpa + 15);
    if (at >= 0 && end == at + 15)
        memcpy(desc, image + at, 16);
    else if (at >= 0 && end >= 0)
        for (int i = 0; i < 16; i++)
            desc[i] = image[place(gpa + i)];
    return at >= 0 && end >= 0;
}

/* ---- an image ---- */

static uint64_t some_addr(void)
{
    static const uint64_t edges[] = {
        BASE, BASE + 3 * PAGE, BASE + 4 * PAGE, BASE + 5 * PAGE, TOP, ~0ull, 0, 1ull << 63, BASE + (1ull << 32),
    };
    if (rnd(8))
        return BASE + 2 * PAGE + rnd(3 * PAGE);
    if (rnd(2))
        return BASE + rnd(2 * PAGE);
    return edges[rnd(ARRAY_LEN(edges))] + rnd(64) - 32;
}

static uint32_t some_len(void)
{
    static const uint32_t odd[] = {0, 1, 16, PAGE, 3 * PAGE, 0x7fffffff, 0x80000000u, 0xffffffffu};
    return rnd(8) ? rnd(200) : odd[rnd(ARRAY_LEN(odd))];
}

static void some_desc(uint64_t at, uint32_t entries)
{
    static const uint16_t likely[] = {0, NEXT, NEXT, NEXT | WRITE, WRITE, WRITE, WRITE, TABLE};
    uint16_t flags = rnd(32) ? likely[rnd(ARRAY_LEN(likely))] : (uint16_t)rnd(1 << 16);
    uint64_t addr = some_addr();
    uint32_t len = some_len();
    if (flags & TABLE && rnd(8)) {   /* a table where tables are */
        addr = BASE + 2 * PAGE + 16 * rnd(TABLES);
        len = 16 * (1 + rnd(rnd(8) ? 6 : 60));
    }
    put(at, addr, 8);
    put(at + 8, len, 4);
    put(at + 12, flags, 2);
    put(at + 14, rnd(32) ? rnd(entries) : rnd(1 << 16), 2);
}

static void some_image(uint32_t q)
{
    uint16_t idx = (uint16_t)(rnd(32) ? rnd(q + 1) : rnd(1 << 16));
    for (uint32_t i = 0; i < q; i++)
        some_desc(BASE + 16 * i, q);
    for (uint32_t i = 0; i < TABLES + 8; i++)
        some_desc(BASE + 2 * PAGE + 16 * i, 7);
    put(BASE + 16 * q, rnd(4), 2);
    put(BASE + 16 * q + 2, idx, 2);
    for (uint32_t i = 0; i < q; i++)
        put(BASE + 16 * q + 4 + 2 * i, rnd(64) ? rnd(q) : rnd(1 << 16), 2);
    put(BASE + 16 * q + 4 + 2 * q, rnd(1 << 16), 2);
    memset(guest + ranges[0].off + PAGE, rnd(256), 6 + 8 * q);
}

/* ---- what may be written ---- */

static void allow(uint64_t gpa, uint64_t len)
{
    for (size_t i = 0; i < ARRAY_LEN(ranges); i++) {
        uint64_t last = gpa + len - 1 < gpa ? ~0ull : gpa + len - 1, end = ranges[i].gpa + (ranges[i].size - 1);
        uint64_t from = gpa > ranges[i].gpa ? gpa : ranges[i].gpa, to = last < end ? last : end;
        if (len && from <= to && ranges[i].perm & VPCI_MEM_WRITE)
            memset(allowed + ranges[i].off + (from - ranges[i].gpa), 1, to - from + 1);
    }
}

/* Every descriptor that a chain reaches, whether or not the chain is a good one. */
static void walk(uint64_t table, uint16_t at, int depth)
{
    for (int steps = 0; steps < MAX_STEPS; steps++) {
        uint8_t desc[16];
        uint64_t addr;
        uint32_t len;
        uint16_t flags;
        if (!get(table + 16ull * at, desc))
            return;
        memcpy(&addr, desc, 8);
        memcpy(&len, desc + 8, 4);
        memcpy(&flags, desc + 12, 2);
        if (flags & TABLE) {
            if (!depth)
                walk(addr, 0, 1);
        } else if (flags & WRITE) {
            allow(addr, len);
        }
        if (!(flags & NEXT))
            return;
        memcpy(&at, desc + 14, 2);
    }
}

static int fault(const char *what)
{
    printf("images: image %llu: %s\n", (unsigned long long)n_image, what);
    return 1;
}

static bool was_written_outside(void)
{
    for (uint32_t block = 0; block < MEMORY; block += BLOCK)
        if (memcmp(image + block, guest + block, BLOCK))
            for (uint32_t i = block; i < block + BLOCK; i++)
                if (image[i] != guest[i] && !allowed[i])
                    return true;
    return false;
}

/* ---- a turn of the device on it ---- */

static void complete(vpci_queue *queue, vpci_chain *chain)
{
    static const uint8_t junk[300] = {[0 ... 299] = 0xd7};
    uint32_t written = 0;
    if (!chain->error) {
        uint8_t read[300];
        vpci_chain_read(chain, rnd(64), read, rnd(sizeof(read)));
        written = vpci_chain_write(chain, rnd(2) ? 0 : rnd(64), junk, rnd(sizeof(junk)));
    }
    vpci_chain_set_last(chain, 0x5d);
    vpci_ring_push(queue, chain, written);
}

static int one(vpci_queue *queue, uint32_t q)
{
    vpci_chain *held[MAX_SIZE];
    uint32_t n = 0;
    vpci_queue_stats stats;

    some_image(q);
    memcpy(image, guest, MEMORY);
    memset(allowed, 0, MEMORY);
    allow(BASE + PAGE, 6 + 8 * q);
    vpci_queue_rules(queue, rnd(32));
    vpci_queue_start(queue, BASE >> 12);
    if (rnd(2))
        vpci_ring_busy(queue);
    while (n < MAX_SIZE && (held[n] = vpci_ring_pop(queue)))
        n++;
    vpci_queue_read_stats(queue, &stats);
    if (n > q)
        return fault("more chains than the ring has entries");
    if (!n && memcmp(image + place(BASE + PAGE) + 2, guest + place(BASE + PAGE) + 2, PAGE - 2))
        return fault("a fetch wrote the used ring");
    for (uint32_t i = 0; i < n; i++)
        walk(BASE, held[i]->head, 0);
    n_chains += n;
    n_broken += stats.broken != 0;
    while (n) {                      /* in any order */
        uint32_t pick = rnd(n);
        complete(queue, held[pick]);
        held[pick] = held[--n];
        if (!rnd(4))
            vpci_ring_publish(queue);
    }
    vpci_ring_publish(queue);
    vpci_ring_idle(queue);
    vpci_queue_stop(queue);
    return was_written_outside() ? fault("memory outside writable buffers and the used ring was written") : 0;
}

static vpci_mem *make_memory(void)
{
    int fd = memfd_create("images", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    vpci_mem *mem = vpci_mem_new();
    if (fd < 0 || !mem || ftruncate(fd, MEMORY) < 0)
        return NULL;
    guest = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    for (size_t i = 0; i < ARRAY_LEN(ranges); i++)
        if (vpci_mem_map(mem, ranges[i].gpa, ranges[i].size, fd, ranges[i].off, ranges[i].perm) < 0)
            return NULL;
    close(fd);
    return guest == MAP_FAILED ? NULL : mem;
}

int main(int argc, char **argv)
{
    vpci_mem *mem = make_memory();
    vpci_queue *queues[SIZES];
    if (argc != 3 || !mem)
        return 2;
    uint64_t count = strtoull(argv[1], NULL, 10);
    state = strtoull(argv[2], NULL, 10) | 1ull << 40;
    for (uint32_t i = 0; i < SIZES; i++)
        if (!(queues[i] = vpci_queue_new(mem, 1u << i, MAX_SG)))
            return 2;
    int status = 0;
    for (n_image = 1; n_image <= count && !status; n_image++) {
        uint32_t i = rnd(SIZES);
        status = one(queues[i], 1u << i);
    }
    for (uint32_t i = 0; i < SIZES; i++)
        vpci_queue_free(queues[i]);
    vpci_mem_free(mem);
    munmap(guest, MEMORY);
    if (!status)
        printf("images: %llu images, %llu chains, %llu broken\n", (unsigned long long)count,
               (unsigned long long)n_chains, (unsigned long long)n_broken);
    return status;
}
