/* The ring's ordering rules against a driver on another processor, without any socket: cases R01, R02 and R04 of the
 * paper, and D6. `litmus CASE ROUNDS` ends with 0 when nothing went wrong, and with 1 at the first round that did.
 *
 * Driver and device see the memory through mappings of their own, as they do in life. In a round of R01 and R02 both
 * meet, and then race with two accesses each: a store, a fence, and a load of what the other one stores. Whoever has
 * no fence lets its load pass its store; that both loads then see old values is what a lost wake-up is. */
#include "core.h"

#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>

enum { SIZE = 64, GPA = 0x100000, MEMORY = 1 << 16, RING_BYTES = 0x3000, PER_BUFFER = 64 };
/* The driver's own arithmetic, for 64 entries ([legacy-header 4]). */
enum { AVAIL_FLAGS = 1024, AVAIL_IDX = 1026, AVAIL_RING = 1028, USED_EVENT = 1156 };
enum { USED_FLAGS = 4096, USED_IDX = 4098, USED_RING = 4100, AVAIL_EVENT = 4612 };
enum { NEXT = 1, WRITE = 2, TABLE = 4 };

static uint8_t *guest;               /* the driver's mapping */
static vpci_queue *queue;
static uint64_t rounds;
/* A line each, so that what is raced for is not delayed by what is waited on. */
static struct { _Alignas(64) uint64_t at; } driver_side, device_side;
static _Alignas(64) int device_result;
static uint64_t failed_at;           /* 0: never */
static bool over;

static uint16_t get16(uint32_t off) { return __atomic_load_n((uint16_t *)(guest + off), __ATOMIC_RELAXED); }
static void put16(uint32_t off, uint16_t v) { __atomic_store_n((uint16_t *)(guest + off), v, __ATOMIC_RELAXED); }
static uint32_t get32(uint32_t off) { return __atomic_load_n((uint32_t *)(guest + off), __ATOMIC_RELAXED); }
static void fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static void set_desc(uint32_t at, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
    uint64_t second = len | (uint64_t)flags << 32 | (uint64_t)next << 48;
    __atomic_store_n((uint64_t *)(guest + at), addr, __ATOMIC_RELAXED);
    __atomic_store_n((uint64_t *)(guest + at + 8), second, __ATOMIC_RELAXED);
}

/* G1: the slot before the index. */
static void offer(uint16_t idx, uint16_t head)
{
    put16(AVAIL_RING + 2 * (idx % SIZE), head);
    __atomic_store_n((uint16_t *)(guest + AVAIL_IDX), (uint16_t)(idx + 1), __ATOMIC_RELEASE);
}

static void rest(uint64_t *spins)
{
    if (++*spins % 256 == 0)
        sched_yield();
    else
        __builtin_ia32_pause();
}

static void meet(uint64_t *me, const uint64_t *other, uint64_t n)
{
    uint64_t spins = 0;
    __atomic_store_n(me, n, __ATOMIC_RELEASE);
    while (__atomic_load_n(other, __ATOMIC_ACQUIRE) < n)
        rest(&spins);
}

/* The two leave a meeting some 50 ns apart: a random delay makes them race anyway. */
static void skew(uint32_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    *seed ^= *seed << 5;
    for (volatile uint32_t n = *seed % 64; n; n--)
        ;
}

/* Two threads of one processor never race. A machine with work of its own puts them there, so the n-th thread is told
 * to stay on the n-th processor that this process may use; where there is one only, the program says so and ends. */
static void stay_on(pthread_t thread, int nth)
{
    cpu_set_t allowed, wanted;
    CPU_ZERO(&wanted);
    if (sched_getaffinity(getpid(), sizeof(allowed), &allowed) || CPU_COUNT(&allowed) < 2) {
        fprintf(stderr, "two processors are needed for a race\n");
        exit(2);
    }
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && nth-- == 0)
            CPU_SET(cpu, &wanted);
    if (pthread_setaffinity_np(thread, sizeof(wanted), &wanted)) {
        fprintf(stderr, "a processor that is allowed cannot be had\n");
        exit(2);
    }
}

static void fail(uint64_t round)
{
    if (!failed_at)
        failed_at = round;
}

/* ---- R01, R02: three meetings a round ---- */

static void complete_one(void)
{
    vpci_chain *chain = vpci_ring_pop(queue);
    if (!chain) {
        fprintf(stderr, "nothing to pop\n");
        exit(2);
    }
    vpci_ring_push(queue, chain, 0);
}

struct race {
    const char *name;
    uint32_t rules;
    void (*device_before)(void);
    int (*device)(void);                 /* did it see, or will it be woken? */
    void (*driver_before)(uint16_t idx);
    int (*driver)(uint16_t idx);
};

static int publish(void) { return vpci_ring_publish(queue); }
static int idle(void) { return vpci_ring_idle(queue); }

static void complete_busily(void)
{
    vpci_ring_busy(queue);
    complete_one();
    vpci_ring_publish(queue);
}

static void no_event(uint16_t idx) { put16(USED_EVENT, (uint16_t)(idx - 1)); }
static void no_interrupt(uint16_t idx) { (void)idx, put16(AVAIL_FLAGS, 1); }

/* G4: ask for the interrupt, then look whether it is too late for one. */
static int await_event(uint16_t idx)
{
    put16(USED_EVENT, idx);
    fence();
    return get16(USED_IDX) != idx;
}

static int await_interrupt(uint16_t idx)
{
    put16(AVAIL_FLAGS, 0);
    fence();
    return get16(USED_IDX) != idx;
}

static void nothing(uint16_t idx) { (void)idx; }

/* G2: show one more, then look whether the device wants a kick. */
static int add_and_ask_event(uint16_t idx)
{
    offer((uint16_t)(idx + 1), 0);
    fence();
    return vpci_need_event(get16(AVAIL_EVENT), (uint16_t)(idx + 2), (uint16_t)(idx + 1));
}

static int add_and_ask_flags(uint16_t idx)
{
    offer((uint16_t)(idx + 1), 0);
    fence();
    return !(get16(USED_FLAGS) & 1);
}

static const struct race races[] = {
    {"r01-event", VPCI_RING_USED_EVENT, complete_one, publish, no_event, await_event},
    {"r01-flags", 0, complete_one, publish, no_interrupt, await_interrupt},
    {"r02-event", VPCI_RING_AVAIL_EVENT, complete_busily, idle, nothing, add_and_ask_event},
    {"r02-flags", VPCI_RING_USED_FLAGS, complete_busily, idle, nothing, add_and_ask_flags},
};

/* Chains that a round uses: R02's second one is fetched when the race is over. */
static uint16_t per_round(const struct race *r) { return r->device == idle ? 2 : 1; }

static void *race_device(void *arg)
{
    const struct race *r = arg;
    uint32_t seed = 1;
    for (uint64_t n = 0;; n++) {
        meet(&device_side.at, &driver_side.at, 3 * n + 1);
        if (__atomic_load_n(&over, __ATOMIC_RELAXED))
            break;
        r->device_before();
        meet(&device_side.at, &driver_side.at, 3 * n + 2);
        skew(&seed);
        device_result = r->device();
        meet(&device_side.at, &driver_side.at, 3 * n + 3);
        if (per_round(r) == 2) {
            complete_one();
            vpci_ring_publish(queue);
            vpci_ring_idle(queue);
        }
    }
    return NULL;
}

static void race_driver(const struct race *r)
{
    uint32_t seed = 2;
    uint16_t idx = 0;
    for (uint64_t n = 0;; n++, idx = (uint16_t)(idx + per_round(r))) {
        r->driver_before(idx);
        if (n < rounds && !failed_at)
            offer(idx, 0);
        else
            __atomic_store_n(&over, true, __ATOMIC_RELAXED);
        meet(&driver_side.at, &device_side.at, 3 * n + 1);
        if (over)
            return;
        meet(&driver_side.at, &device_side.at, 3 * n + 2);
        skew(&seed);
        int seen = r->driver(idx);
        meet(&driver_side.at, &device_side.at, 3 * n + 3);
        if (!seen && !device_result)
            fail(n + 1);
    }
}

/* ---- R04: what used.idx shows is there ---- */

static uint64_t word_of(uint64_t n, uint32_t i) { return n * 0x9e3779b97f4a7c15ull + i; }
static uint32_t buffer_off(uint16_t head) { return RING_BYTES + head * PER_BUFFER; }

static void *fill_device(void *arg)
{
    uint64_t data[PER_BUFFER / 8], spins = 0;
    (void)arg;
    for (uint64_t n = 0; n < rounds;) {
        vpci_chain *chain = vpci_ring_pop(queue);
        if (chain) {
            for (uint32_t i = 0; i < ARRAY_LEN(data); i++)
                data[i] = word_of(n, i);
            vpci_chain_write(chain, 0, data, sizeof(data));
            vpci_ring_push(queue, chain, PER_BUFFER);
            n++;
        } else if (__atomic_load_n(&over, __ATOMIC_RELAXED)) {
            return NULL;
        } else {
            rest(&spins);
        }
        if (!chain || n % 5 == 0 || n == rounds)   /* batches of 1 to 5 */
            vpci_ring_publish(queue);
    }
    return NULL;
}

static bool entry_is_there(uint64_t n)
{
    uint32_t at = USED_RING + 8 * (n % SIZE);
    if (get32(at) != n % SIZE || get32(at + 4) != PER_BUFFER)
        return false;
    for (uint32_t i = 0; i < PER_BUFFER / 8; i++)
        if (*(volatile uint64_t *)(guest + buffer_off(n % SIZE) + 8 * i) != word_of(n, i))
            return false;
    return true;
}

static void fill_driver(void)
{
    uint64_t added = 0, spins = 0;
    for (uint16_t head = 0; head < SIZE; head++)
        set_desc(16 * head, GPA + buffer_off(head), PER_BUFFER, WRITE, 0);
    for (uint64_t n = 0; n < rounds && !failed_at;) {
        for (; added < n + SIZE; added++) {
            memset(guest + buffer_off(added % SIZE), 0xaa, PER_BUFFER);
            memset(guest + USED_RING + 8 * (added % SIZE), 0xaa, 8);
            offer((uint16_t)added, added % SIZE);
        }
        /* G3 */
        uint16_t idx = __atomic_load_n((uint16_t *)(guest + USED_IDX), __ATOMIC_ACQUIRE);
        if (idx == (uint16_t)n)
            rest(&spins);
        for (; idx != (uint16_t)n && n < rounds; n++)
            if (!entry_is_there(n))
                fail(n + 1);
    }
    __atomic_store_n(&over, true, __ATOMIC_RELAXED);
}

/* ---- D6: a descriptor that is rewritten while it is read ---- */

/* Two descriptors that are both right: a table of one entry, and a buffer of 8 bytes, which is no table's length. */
static void *rewrite(void *arg)
{
    (void)arg;
    while (!__atomic_load_n(&over, __ATOMIC_RELAXED)) {
        set_desc(0, GPA + RING_BYTES, 16, TABLE, 0);
        for (volatile int n = 20; n; n--)
            ;
        set_desc(0, GPA + RING_BYTES, 8, WRITE, 0);
        for (volatile int n = 20; n; n--)
            ;
    }
    return NULL;
}

static void read_rewritten(void)
{
    set_desc(RING_BYTES, GPA + RING_BYTES + 64, 16, WRITE, 0);
    for (uint64_t n = 0; n < rounds && !failed_at; n++) {
        offer((uint16_t)n, 0);
        vpci_chain *chain = vpci_ring_pop(queue);
        if (!chain || (chain->in_len != 8 && chain->in_len != 16)) {
            fail(n + 1);
            break;
        }
        vpci_ring_push(queue, chain, 0);
        vpci_ring_publish(queue);
    }
    __atomic_store_n(&over, true, __ATOMIC_RELAXED);
}

/* ---- */

static vpci_mem *make_memory(void)
{
    int fd = memfd_create("litmus", MFD_CLOEXEC);
    vpci_mem *mem = vpci_mem_new();
    if (fd < 0 || !mem || ftruncate(fd, MEMORY) < 0 ||
        vpci_mem_map(mem, GPA, MEMORY, fd, 0, VPCI_MEM_READ | VPCI_MEM_WRITE) < 0)
        return NULL;
    guest = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return guest == MAP_FAILED ? NULL : mem;
}

static int report(const char *name)
{
    if (failed_at)
        printf("%s failed in round %llu\n", name, (unsigned long long)failed_at);
    else
        printf("%s: %llu rounds\n", name, (unsigned long long)rounds);
    return failed_at != 0;
}

static int run(const char *name, uint32_t rules, void *(*other)(void *), void *arg, void (*driver)(void),
               const struct race *race)
{
    pthread_t thread;
    set_desc(0, GPA + RING_BYTES, 8, WRITE, 0);
    vpci_queue_rules(queue, rules);
    vpci_queue_start(queue, GPA >> 12);
    if (pthread_create(&thread, NULL, other, arg))
        return 2;
    stay_on(thread, 1);
    stay_on(pthread_self(), 0);    /* last: it is this thread's processors that are counted */
    if (race)
        race_driver(race);
    else
        driver();
    pthread_join(thread, NULL);
    return report(name);
}

int main(int argc, char **argv)
{
    vpci_mem *mem = make_memory();
    if (argc != 3 || !mem || !(queue = vpci_queue_new(mem, SIZE, 128)))
        return 2;
    rounds = strtoull(argv[2], NULL, 10);
    int status = 2;
    for (size_t i = 0; i < ARRAY_LEN(races); i++)
        if (!strcmp(argv[1], races[i].name))
            status = run(argv[1], races[i].rules, race_device, (void *)&races[i], NULL, &races[i]);
    if (!strcmp(argv[1], "r04"))
        status = run(argv[1], 0, fill_device, NULL, fill_driver, NULL);
    if (!strcmp(argv[1], "d06"))
        status = run(argv[1], VPCI_RING_INDIRECT, rewrite, NULL, read_rewritten, NULL);
    vpci_queue_free(queue);
    vpci_mem_free(mem);
    return status;
}
