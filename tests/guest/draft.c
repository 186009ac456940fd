/* Drives a virtio disk through the header of the 2011 draft from a program in a Linux guest, for no kernel driver knows
 * feature bit 31. test_draft.py builds it statically, runs it and reads the lines of JSON that it prints.
 *
 *   draft run BITS off|on SECTORS    BITS: of 29, 31, 32 with commas, or none. MSI-X off or on. SECTORS: of the disk.
 *                                    Leaves the device negotiated, to be looked at from the host.
 *   draft release                    resets the device, turns MSI-X and bus mastering off, and prints which it was.
 *
 * Offsets, structures and meanings are typed from the papers: [draft] "[PATCHv2] virtio-spec: 64 bit features,
 * used/avail event", M. S. Tsirkin, 2011-05-04; [v0.9] the virtio specification that it patches; [pci] configuration
 * space and MSI-X. Nothing comes from the device's own tables.
 *
 * A wait has a deadline, and one that passes ends the program. A failed check does not. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ---- what is printed ---- */

static const char *part = "start";
static unsigned n_checks, n_failed;

static void check(const char *what, uint64_t got, uint64_t want)
{
    printf("{\"part\": \"%s\", \"check\": \"%s\", ", part, what);
    printf("\"got\": %" PRIu64 ", \"want\": %" PRIu64 "}\n", got, want);
    n_checks++;
    n_failed += got != want;
}

static void finish(const char *stopped)
{
    printf("{\"end\": true, \"checks\": %u, \"failed\": %u, \"stopped\": \"%s\"}\n", n_checks, n_failed, stopped);
    exit(n_failed || *stopped);
}

/* It cannot go on. */
__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...)
{
    char why[256];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof(why), format, args);
    va_end(args);
    finish(why);
    abort();
}

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

enum { DEADLINE_MS = 20000 };

/* ---- the PCI function, by sysfs ---- */

#define PCI_DEVICES "/sys/bus/pci/devices"
enum { VENDOR = 0x1af4, DEVICE = 0x1001 };   /* [v0.9] a block device in its legacy clothes */
enum {   /* [pci] */
    PCI_COMMAND = 0x04, PCI_STATUS = 0x06, PCI_CAPABILITIES = 0x34, CAP_MSIX = 0x11,
    COMMAND_IO = 1, COMMAND_MEMORY = 2, COMMAND_MASTER = 4, COMMAND_INTX_OFF = 0x400,
    STATUS_INTERRUPT = 8, MSIX_ENABLE = 0x8000, MSIX_FUNCTION_MASK = 0x4000
};

static char function[32];
static int config_fd;
static uint16_t bar0;
static unsigned msix_cap;

static void sysfs_path(char path[512], const char *name, const char *file)
{
    snprintf(path, 512, PCI_DEVICES "/%s/%s", name, file);
}

static int sysfs_open(const char *file, int flags)
{
    char path[512];
    sysfs_path(path, function, file);
    int fd = open(path, flags);
    if (fd < 0)
        die("%s: %s", path, strerror(errno));
    return fd;
}

static unsigned long sysfs_number(const char *name, const char *file)
{
    char path[512], text[32] = "";
    sysfs_path(path, name, file);
    FILE *f = fopen(path, "r");
    if (!f)
        return 0;
    char *got = fgets(text, sizeof(text), f);
    fclose(f);
    return got ? strtoul(text, NULL, 0) : 0;
}

static void find_function(void)
{
    DIR *dir = opendir(PCI_DEVICES);
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (sysfs_number(e->d_name, "vendor") == VENDOR && sysfs_number(e->d_name, "device") == DEVICE)
            snprintf(function, sizeof(function), "%.31s", e->d_name);
    if (dir)
        closedir(dir);
    if (!*function)
        die("no PCI function %04x:%04x", VENDOR, DEVICE);
}

static void unbind(void)
{
    char path[512];
    sysfs_path(path, function, "driver/unbind");
    int fd = open(path, O_WRONLY);
    if (fd < 0)
        return;   /* no driver has it */
    if (write(fd, function, strlen(function)) < 0)
        die("%s: %s", path, strerror(errno));
    close(fd);
}

static uint32_t pci_read(unsigned off, unsigned width)
{
    uint32_t value = 0;
    if (pread(config_fd, &value, width, off) != (ssize_t)width)
        die("configuration space at %#x: %s", off, strerror(errno));
    return value;
}

static void pci_write(unsigned off, unsigned width, uint32_t value)
{
    if (pwrite(config_fd, &value, width, off) != (ssize_t)width)
        die("configuration space at %#x: %s", off, strerror(errno));
}

static unsigned find_capability(uint8_t id)
{
    unsigned off = pci_read(PCI_CAPABILITIES, 1);
    while (off && pci_read(off, 1) != id)
        off = pci_read(off + 1, 1);
    if (!off)
        die("no capability %#x", id);
    return off;
}

static void find_bar0(void)
{
    uint32_t bar = pci_read(0x10, 4);
    if (!(bar & 1))
        die("BAR0 is %#x: wanted I/O space", bar);
    bar0 = (uint16_t)(bar & ~3u);
    if (iopl(3))
        die("iopl: %s", strerror(errno));
}

/* Interrupts as lines are held down: the ISR tells of them, and the kernel has no handler for them. */
static void take_function(void)
{
    find_function();
    unbind();
    config_fd = sysfs_open("config", O_RDWR);
    pci_write(PCI_COMMAND, 2, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF);
    msix_cap = find_capability(CAP_MSIX);
    find_bar0();
}

/* ---- memory: one huge page, whose address the device can be told ---- */

enum { HUGE = 2 << 20, HEADERS_AT = 0x40000, MESSAGES_AT = 0x50000, DATA_AT = 0x80000 };
static uint8_t *memory;
static uint64_t memory_gpa;

static uint64_t physical(const void *p)
{
    int fd = open("/proc/self/pagemap", O_RDONLY);
    uint64_t entry = 0;
    if (fd < 0 || pread(fd, &entry, 8, (off_t)((uintptr_t)p / 4096 * 8)) != 8)
        die("/proc/self/pagemap: %s", strerror(errno));
    close(fd);
    if (!(entry >> 63) || !(entry << 9))
        die("/proc/self/pagemap does not tell the address: %#" PRIx64, entry);
    return (entry & ((1ull << 55) - 1)) * 4096;
}

static void take_memory(void)
{
    memory = mmap(NULL, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        die("a huge page: %s (is hugepages=1 on the kernel's command line?)", strerror(errno));
    memset(memory, 0, HUGE);
    memory_gpa = physical(memory);
    check("the huge page is aligned to its size", memory_gpa % HUGE, 0);
}

/* ---- the header ---- */

enum {   /* [v0.9] "Virtio header", and after it the two fields of MSI-X */
    DEVICE_FEATURES = 0, GUEST_FEATURES = 4, QUEUE_PFN = 8, QUEUE_SIZE = 12, QUEUE_SELECT = 14, QUEUE_NOTIFY = 16,
    DEVICE_STATUS = 18, ISR_STATUS = 19, CONFIG_VECTOR = 20, QUEUE_VECTOR = 22
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, NO_VECTOR = 0xffff };
enum { FLUSH_BIT = 9, USED_EVENT_BIT = 29, HI_BIT = 31, AVAIL_EVENT_BIT = 32 };

/* [draft] the vectors are there while MSI-X is enabled; the features 32:63 follow, and the device's configuration. */
static const struct map { unsigned device_features_hi, guest_features_hi, config; } maps[2][2] = {
    /*            without bit 31   with bit 31 acked */
    /* MSI-X off */ {{0, 0, 20}, {20, 24, 28}},
    /* MSI-X on  */ {{0, 0, 24}, {24, 28, 32}},
};
static bool msix, hi;

static const struct map *map(void) { return &maps[msix][hi]; }
static uint8_t in8(unsigned off) { return inb((uint16_t)(bar0 + off)); }
static uint16_t in16(unsigned off) { return inw((uint16_t)(bar0 + off)); }
static uint32_t in32(unsigned off) { return inl((uint16_t)(bar0 + off)); }
static void out8(unsigned off, uint8_t value) { outb(value, (uint16_t)(bar0 + off)); }
static void out16(unsigned off, uint16_t value) { outw(value, (uint16_t)(bar0 + off)); }
static void out32(unsigned off, uint32_t value) { outl(value, (uint16_t)(bar0 + off)); }

static void set_msix(bool on)
{
    uint32_t control = pci_read(msix_cap + 2, 2) & ~(uint32_t)(MSIX_ENABLE | MSIX_FUNCTION_MASK);
    pci_write(msix_cap + 2, 2, control | (on ? MSIX_ENABLE : 0));
    msix = on;
}

static uint64_t in_config(unsigned off, unsigned n)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < n; i++)   /* byte by byte, as drivers do */
        value |= (uint64_t)in8(map()->config + off + i) << 8 * i;
    return value;
}

/* ---- the map ---- */

enum { BAR_BYTES = 128, CONFIG_BYTES = 72, Q_SIZE = 256, SEG_MAX = Q_SIZE - 2 };
static uint64_t capacity;   /* in sectors: what the test says that the disk has */
static uint64_t offered = 1ull << FLUSH_BIT | 1ull << 28 | 1ull << USED_EVENT_BIT | 1ull << HI_BIT;
static uint64_t taken;      /* what was acked and counts */

static bool has(unsigned bit) { return taken >> bit & 1; }

static void check_configuration(void)
{
    check("configuration, capacity", in_config(0, 8), capacity);
    check("configuration, seg_max", in_config(12, 4), SEG_MAX);
    check("configuration, blk_size by one access of 32 bits", in32(map()->config + 20), 512);
    check("configuration, last byte", in8(map()->config + CONFIG_BYTES - 1), 0);
    check("behind the configuration", in8(map()->config + CONFIG_BYTES), 0xff);
}

/* Whatever else moves, these do not. */
static void check_common(void)
{
    check("device_features", in32(DEVICE_FEATURES) & offered, offered);
    check("guest_features", in32(GUEST_FEATURES), (uint32_t)taken);
    check("queue_size of queue 0", in16(QUEUE_SIZE), Q_SIZE);
    check("device_status", in8(DEVICE_STATUS), ACKNOWLEDGE | DRIVER);
}

static void check_map(const char *where)
{
    part = where;
    check_common();
    check_configuration();
    if (msix)
        check("config_vector and queue_vector", in32(CONFIG_VECTOR), 1u << 16);
    if (hi) {
        check("device_features_hi", in32(map()->device_features_hi), 1);
        check("guest_features_hi", in32(map()->guest_features_hi), taken >> 32);
    }
}

/* ---- vectors ---- */

/* A message goes to a word of our own memory: so a program without an interrupt handler sees it arrive. */
enum { CONFIG_MESSAGE = 0xc0f1, QUEUE_MESSAGE = 0x9e0e };
static volatile uint32_t *entries, *pending;

static volatile uint32_t *message(unsigned vector) { return (uint32_t *)(memory + MESSAGES_AT) + vector; }

static void write_entry(unsigned vector, uint32_t data)
{
    uint64_t gpa = memory_gpa + MESSAGES_AT + 4 * vector;
    volatile uint32_t *entry = entries + 4 * vector;   /* [pci] address, upper address, data, control */
    entry[0] = (uint32_t)gpa;
    entry[1] = (uint32_t)(gpa >> 32);
    entry[2] = data;
    entry[3] = 0;
}

static void take_vectors(void)
{
    uint32_t table = pci_read(msix_cap + 4, 4), pba = pci_read(msix_cap + 8, 4);
    if ((table & 7) != 1 || (pba & 7) != 1)
        die("MSI-X table %#x, pending bits %#x: wanted both in BAR1", table, pba);
    int fd = sysfs_open("resource1", O_RDWR | O_SYNC);
    uint8_t *bar1 = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bar1 == MAP_FAILED)
        die("resource1: %s", strerror(errno));
    close(fd);
    entries = (uint32_t *)(bar1 + (table & ~7u));
    pending = (uint32_t *)(bar1 + (pba & ~7u));
    write_entry(0, CONFIG_MESSAGE);
    write_entry(1, QUEUE_MESSAGE);
}

static void map_vectors(void)
{
    part = "vectors";
    check("both are unmapped at first", in32(CONFIG_VECTOR), 0xffffffff);
    out16(CONFIG_VECTOR, 0x7ff);
    check("a vector that is not there", in16(CONFIG_VECTOR), NO_VECTOR);
    out16(CONFIG_VECTOR, 0);
    out16(QUEUE_VECTOR, 1);
    check("both are mapped", in32(CONFIG_VECTOR), 1u << 16);
}

/* ---- negotiation ---- */

/* The two steps: ack bit 31, so that the high words are there; then both words, bit 31 still set. */
static void ack_high(uint64_t want)
{
    part = "negotiation";
    out32(GUEST_FEATURES, 1u << HI_BIT);
    hi = true;
    taken = 1ull << HI_BIT;
    check("device_features_hi: bit 32 and no other", in32(map()->device_features_hi), 1);
    check("guest_features_hi at first", in32(map()->guest_features_hi), 0);
    check_map("bit 31 acked");
    part = "negotiation";
    out32(GUEST_FEATURES, (uint32_t)want | 1u << HI_BIT);
    out32(map()->guest_features_hi, 0xffffffff);
    check("guest_features_hi keeps what is offered", in32(map()->guest_features_hi), 1);
    out32(map()->guest_features_hi, (uint32_t)(want >> 32));
    taken = want | 1ull << HI_BIT;
    check_map("both words acked");
}

/* [draft] "If this bit is unset, Device must assume that all feature bits > 31 are unset." */
static void drop_high(void)
{
    unsigned was = map()->guest_features_hi;
    taken = (uint32_t)taken & ~(1u << HI_BIT);
    out32(GUEST_FEATURES, (uint32_t)taken);
    hi = false;
    check_map("bit 31 taken back");
    out32(was, 1);   /* now configuration that cannot be written */
    check_map("written where the high word was");
    part = "negotiation";
    out32(GUEST_FEATURES, (uint32_t)taken | 1u << HI_BIT);
    hi = true;
    check("guest_features_hi was forgotten", in32(map()->guest_features_hi), 0);
    out32(GUEST_FEATURES, (uint32_t)taken);
    hi = false;
}

static void negotiate(uint64_t want)
{
    if (want >> HI_BIT)
        ack_high(want);
    if (want >> HI_BIT && !(want >> HI_BIT & 1))
        drop_high();
    out32(GUEST_FEATURES, (uint32_t)want);
    taken = want >> HI_BIT & 1 ? want : (uint32_t)want;
    check_map("negotiated");
}

/* MSI-X moves what follows the vectors by 4, there and back, whatever bit 31 did; nothing is forgotten. */
static void move_and_back(void)
{
    bool before = msix;
    set_msix(!before);
    if (msix && in32(CONFIG_VECTOR) == 0xffffffff)
        map_vectors();
    check_map("MSI-X turned over");
    set_msix(before);
    check_map("MSI-X turned back");
}

/* ---- the ring ---- */

enum { NEXT = 1, WRITE = 2, NO_INTERRUPT = 1, NO_NOTIFY = 1 };
struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct used_elem { uint32_t id, len; };

static struct {
    unsigned size;
    volatile struct desc *desc;
    volatile uint16_t *avail_flags, *avail_idx, *avail_ring, *used_event;
    volatile uint16_t *used_flags, *used_idx, *avail_event;
    volatile struct used_elem *used_ring;
    uint16_t idx, kicked_idx;   /* avail.idx; what it was when a kick was last thought of */
} ring;

static struct { unsigned requests, kicks, interrupts, kicks_saved; } count;

/* [v0.9] descriptors, available ring, padding to a page, used ring; [draft] an event word ends each ring. */
static void lay_out_ring(unsigned size)
{
    uint8_t *avail = memory + 16 * size, *used = memory + (16 * size + 2 * (3 + size) + 4095) / 4096 * 4096;
    ring.size = size;
    ring.desc = (struct desc *)memory;
    ring.avail_flags = (uint16_t *)avail;
    ring.avail_idx = ring.avail_flags + 1;
    ring.avail_ring = ring.avail_flags + 2;
    ring.used_event = ring.avail_ring + size;
    ring.used_flags = (uint16_t *)used;
    ring.used_idx = ring.used_flags + 1;
    ring.used_ring = (struct used_elem *)(used + 4);
    ring.avail_event = (uint16_t *)(used + 4 + 8 * size);
}

enum { POISON = 0xa5a5 };

static void start_queue(void)
{
    part = "queue";
    out16(QUEUE_SELECT, 1);
    check("queue_size of a queue that is not there", in16(QUEUE_SIZE), 0);
    out16(QUEUE_SELECT, 0);
    lay_out_ring(in16(QUEUE_SIZE));
    if (ring.size != Q_SIZE)
        die("queue_size is %u: wanted %u", ring.size, Q_SIZE);
    *ring.avail_event = has(AVAIL_EVENT_BIT) ? 0 : POISON;   /* where the driver reads it, a ring starts zeroed */
    out32(QUEUE_PFN, (uint32_t)(memory_gpa / 4096));
    check("queue_pfn", in32(QUEUE_PFN), memory_gpa / 4096);
    out8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
}

/* [draft] vring_need_event */
static bool crossed(uint16_t event, uint16_t new_idx, uint16_t old_idx)
{
    return (uint16_t)(new_idx - event - 1) < (uint16_t)(new_idx - old_idx);
}

/* Does the device want to hear of what was added? [draft] bit 32: avail_event says so; without it used.flags. */
static bool kick_is_wanted(void)
{
    uint16_t old_idx = ring.kicked_idx;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);   /* avail.idx is seen before the wish is read */
    ring.kicked_idx = ring.idx;
    return has(AVAIL_EVENT_BIT) ? crossed(*ring.avail_event, ring.idx, old_idx) : !(*ring.used_flags & NO_NOTIFY);
}

static void kick_if_wanted(void)
{
    if (!kick_is_wanted()) {
        count.kicks_saved++;
        return;
    }
    count.kicks++;
    out16(QUEUE_NOTIFY, 0);
}

/* ---- requests ---- */

enum { IN = 0, OUT = 1, FLUSH = 4, SECTOR = 512, DESCS = 10, SLOTS = 24 };
struct header { uint32_t type, ioprio; uint64_t sector; uint8_t status, unused[15]; };

/* `len` bytes of memory, and the same again for each one of `more`. */
struct request { uint32_t type; uint64_t sector; uint32_t data_off, len, more; };

static struct header *header_of(unsigned slot) { return (struct header *)(memory + HEADERS_AT) + slot; }

static void add_desc(unsigned n, const void *at, uint32_t len, uint16_t flags)
{
    uint64_t gpa = memory_gpa + (uint64_t)((const uint8_t *)at - memory);
    ring.desc[n].addr = gpa;
    ring.desc[n].len = len;
    ring.desc[n].flags = flags;
    ring.desc[n].next = (uint16_t)(n + 1);
}

/* Slot s has the descriptors from DESCS * s on: header, data if there is any, status. */
static void add(unsigned slot, const struct request *r)
{
    struct header *h = header_of(slot);
    unsigned n = DESCS * slot;
    *h = (struct header){.type = r->type, .sector = r->sector, .status = 0xff};
    add_desc(n++, h, 16, NEXT);
    for (unsigned i = 0; r->len && i <= r->more; i++)
        add_desc(n++, memory + DATA_AT + r->data_off, r->len, NEXT | (r->type == IN ? WRITE : 0));
    add_desc(n, &h->status, 1, WRITE);
    ring.avail_ring[ring.idx % ring.size] = (uint16_t)(DESCS * slot);
    __atomic_thread_fence(__ATOMIC_RELEASE);   /* descriptors and slot before the index that tells of them */
    *ring.avail_idx = ++ring.idx;
    count.requests++;
}

static void wait_used(uint16_t until)
{
    for (uint64_t began = now_ms(); *ring.used_idx != until;)
        if (now_ms() - began > DEADLINE_MS)
            die("%s: used.idx is %u and stays there: wanted %u", part, *ring.used_idx, until);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);   /* the index before the entries that it covers */
}

/* Messages are answered in order: once these are, the device has told of what it published before, and is idle. */
static void settle(void)
{
    in8(DEVICE_STATUS);
    in8(DEVICE_STATUS);
}

/* Returns its slot, which is another one each time. */
static unsigned one_request(const struct request *r)
{
    unsigned slot = ring.idx % SLOTS;
    add(slot, r);
    kick_if_wanted();
    wait_used(ring.idx);
    settle();
    return slot;
}

static void check_of(const char *what, const char *of, uint64_t got, uint64_t want)
{
    char name[64];
    snprintf(name, sizeof(name), "%s, %s", what, of);
    check(name, got, want);
}

static void check_request(const char *what, const struct request *r, uint32_t used_len)
{
    unsigned slot = one_request(r);
    volatile struct used_elem *e = &ring.used_ring[(uint16_t)(ring.idx - 1) % ring.size];
    check_of(what, "id of the used entry", e->id, DESCS * slot);
    check_of(what, "len of the used entry", e->len, used_len);
    check_of(what, "status", header_of(slot)->status, 0);
}

enum { PATTERN_BYTES = 64 << 10, PATTERN_SECTOR = 2048 };

/* Bytes that tell each run from the others. */
static void write_read_compare(uint8_t seed)
{
    uint8_t *written = memory + DATA_AT, *back = written + PATTERN_BYTES;
    for (unsigned i = 0; i < PATTERN_BYTES; i++)
        written[i] = (uint8_t)(seed + i + i / 251);
    memset(back, 0, PATTERN_BYTES);
    check_request("write", &(struct request){OUT, PATTERN_SECTOR, 0, PATTERN_BYTES, 0}, 1);
    check_request("flush", &(struct request){.type = FLUSH}, 1);
    check_request("read", &(struct request){IN, PATTERN_SECTOR, PATTERN_BYTES, PATTERN_BYTES, 0}, PATTERN_BYTES + 1);
    check("bytes that differ", (uint64_t)(memcmp(written, back, PATTERN_BYTES) != 0), 0);
}

/* ---- interrupts: is the driver obeyed? ---- */

static void ask_for_no_interrupts(void)
{
    *ring.avail_flags = NO_INTERRUPT;
    *ring.used_event = (uint16_t)(ring.idx + 0x4000);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static bool message_came(bool awaited)
{
    for (uint64_t began = now_ms(); awaited && !*message(1) && now_ms() - began < DEADLINE_MS;)
        ;
    uint32_t got = *message(1);
    *message(1) = 0;
    return got == QUEUE_MESSAGE;
}

/* The ISR has bit 0 for a queue, and reading clears it; [pci] the status register shows the line behind it. */
static bool line_was_raised(void)
{
    bool line = pci_read(PCI_STATUS, 2) & STATUS_INTERRUPT;
    uint8_t isr = in8(ISR_STATUS);
    check("the line and the ISR agree", line, isr);
    check("the ISR after it was read", in8(ISR_STATUS), 0);
    return isr == 1;
}

static bool interrupted(bool awaited)
{
    bool came = msix ? message_came(awaited) : line_was_raised();
    count.interrupts += came;
    return came;
}

/* By avail.flags alone without bit 29, by used_event alone with it; the dead word says something else wherever it can.
 * `event` counts from the entry that the request will use. */
static const struct trial { const char *what; uint16_t flags; int event; bool by_flags, by_event; } trials[] = {
    {"flags 0, used_event far ahead", 0, 0x4000, true, false},
    {"flags 1, used_event at the entry", NO_INTERRUPT, 0, false, true},
    {"flags 0, used_event at the entry", 0, 0, true, true},
    {"flags 1, used_event far ahead", NO_INTERRUPT, 0x4000, false, false},
    {"flags 0, used_event one ahead", 0, 1, true, false},
    {"flags 0, used_event one behind", 0, -1, true, false},
    {"flags 1, used_event one behind", NO_INTERRUPT, -1, false, false},
    {"flags 0xfffe, used_event far behind", 0xfffe, -0x4000, true, false},
    {"flags 0xffff, used_event at the entry", 0xffff, 0, false, true},
};

static void try_interrupt(const struct trial *t)
{
    bool want = has(USED_EVENT_BIT) ? t->by_event : t->by_flags;
    *ring.avail_flags = t->flags;
    *ring.used_event = (uint16_t)(ring.idx + t->event);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    one_request(&(struct request){IN, PATTERN_SECTOR, PATTERN_BYTES, SECTOR, 0});
    check(t->what, interrupted(want), want);
    ask_for_no_interrupts();
}

/* One kick for four requests, the third of which the driver waits for. How often flags are looked at is not said. */
static void try_batch(void)
{
    *ring.used_event = (uint16_t)(ring.idx + 2);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (unsigned slot = 0; slot < 4; slot++)
        add(slot, &(struct request){IN, PATTERN_SECTOR, PATTERN_BYTES, SECTOR, 0});
    kick_if_wanted();
    wait_used(ring.idx);
    settle();
    check("used_event in the middle of four", interrupted(true), true);
    ask_for_no_interrupts();
}

static void mask_entry(unsigned vector, bool masked) { entries[4 * vector + 3] = masked; }

/* A masked vector pends, and fires once when it is unmasked. It is masked before MSI-X is enabled: QEMU 11 takes over
 * the vectors that were once in use, and then neither it nor the device shows them as pending. */
static void try_mask(void)
{
    set_msix(false);
    mask_entry(1, true);
    set_msix(true);
    *ring.avail_flags = 0;
    *ring.used_event = ring.idx;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    one_request(&(struct request){IN, PATTERN_SECTOR, PATTERN_BYTES, SECTOR, 0});
    check("pending bits of a masked vector", *pending, 1 << 1);
    check("its message", *message(1), 0);
    mask_entry(1, false);
    check("it comes when the vector is unmasked", interrupted(true), true);
    check("pending bits after that", *pending, 0);
    ask_for_no_interrupts();
}

static void try_interrupts(void)
{
    part = "interrupts";
    for (size_t i = 0; i < sizeof(trials) / sizeof(*trials); i++)
        try_interrupt(&trials[i]);
    if (has(USED_EVENT_BIT))
        try_batch();
    if (msix) {
        try_mask();
        check("the ISR with MSI-X", in8(ISR_STATUS), 0);
    }
}

/* ---- kicks: does the device say what it wants? ---- */

/* A device that has nothing to do must want the next kick, in the word that counts; without 29 and 32 avail_event is
 * nobody's word and stays what it was. With 29 alone both words tell the truth: later texts read it as bit 32 too. */
static void check_idle_wish(void)
{
    bool either = has(USED_EVENT_BIT) || has(AVAIL_EVENT_BIT);
    check("used.flags of an idle device", *ring.used_flags, 0);
    check("avail_event of an idle device", *ring.avail_event, either ? ring.idx : POISON);
}

enum { FIRST = SLOTS / 2, LOAD_BYTES = 1 << 20, LOAD_MORE = 7 };

/* Give it enough to be at work for milliseconds, where a kick takes a tenth of one; then more, one by one. Returns how
 * many of those it did not want to hear of. */
static unsigned add_while_it_works(void)
{
    for (unsigned slot = 0; slot < FIRST; slot++)
        add(slot, &(struct request){IN, PATTERN_SECTOR, 0, LOAD_BYTES, LOAD_MORE});
    kick_if_wanted();
    unsigned saved = count.kicks_saved;
    for (unsigned slot = FIRST; slot < SLOTS; slot++) {
        add(slot, &(struct request){IN, PATTERN_SECTOR, 0, SECTOR, 0});
        kick_if_wanted();
    }
    return count.kicks_saved - saved;
}

static unsigned statuses_wrong(void)
{
    unsigned n = 0;
    for (unsigned slot = 0; slot < SLOTS; slot++)
        n += header_of(slot)->status != 0;
    return n;
}

/* A request whose kick was not wanted is served all the same: the device looks again by itself. A host may have to read
 * its file first, or keep this CPU from running until all is done: it is tried until one was not wanted. */
static void try_kicks(void)
{
    part = "kicks";
    unsigned saved = 0, wrong = 0;
    check_idle_wish();
    for (uint64_t began = now_ms(); !saved && now_ms() - began < DEADLINE_MS;) {
        ask_for_no_interrupts();
        saved += add_while_it_works();
        wait_used(ring.idx);
        settle();
        wrong += statuses_wrong();
    }
    check("some kicks were not wanted while it worked", saved > 0, true);
    check("requests that failed", wrong, 0);
    check_idle_wish();
    check("interrupts that nobody wanted", interrupted(false), false);
}

/* ---- what the program does ---- */

static void reset_device(void)
{
    set_msix(false);
    hi = false;
    taken = 0;
    out8(DEVICE_STATUS, 0);
    check("device_status after reset", in8(DEVICE_STATUS), 0);
    out8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER);
}

static uint64_t parse_bits(const char *text)
{
    uint64_t bits = 0;
    for (char *end; *text >= '0' && *text <= '9'; text = *end == ',' ? end + 1 : end)
        bits |= 1ull << strtoul(text, &end, 10) % 64;
    return bits;
}

static void run(const char *bits, bool with_msix)
{
    reset_device();
    check_map("reset");
    take_vectors();
    if (with_msix) {
        set_msix(true);
        map_vectors();
        check_map("MSI-X enabled");
    }
    negotiate(parse_bits(bits) | 1ull << FLUSH_BIT);
    move_and_back();
    start_queue();
    ask_for_no_interrupts();
    part = "data";
    write_read_compare((uint8_t)(parse_bits(bits) >> 29 | (unsigned)with_msix << 6));
    try_interrupts();
    try_kicks();
    printf("{\"counts\": {\"requests\": %u, \"kicks\": %u, \"interrupts\": %u, \"kicks_saved\": %u}}\n",
           count.requests, count.kicks, count.interrupts, count.kicks_saved);
}

static void release(void)
{
    set_msix(false);
    out8(DEVICE_STATUS, 0);
    check("device_status after reset", in8(DEVICE_STATUS), 0);
    pci_write(PCI_COMMAND, 2, COMMAND_IO | COMMAND_MEMORY);
    printf("{\"function\": \"%s\"}\n", function);
}

int main(int argc, char **argv)
{
    bool runs = argc == 5 && !strcmp(argv[1], "run"), releases = argc == 2 && !strcmp(argv[1], "release");
    if (!runs && !releases) {
        fprintf(stderr, "usage: draft run BITS off|on SECTORS, or: draft release\n");
        return 2;
    }
    take_function();
    if (releases) {
        release();
    } else {
        capacity = strtoull(argv[4], NULL, 0);
        take_memory();
        run(argv[2], !strcmp(argv[3], "on"));
    }
    finish("");
    return 0;
}
