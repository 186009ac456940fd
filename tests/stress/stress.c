/* The whole core under real threads and without Python: a device with two queues on a file, and around it a client, two
 * drivers, a reader of statistics, and a thread that answers what Python would. `stress PHASE ROUNDS SECONDS` ends when
 * either is reached, with 0 if nothing went wrong. Built with -fsanitize=thread, which ends it at the first report.
 *
 * The drivers see guest memory through a mapping of their own, as a guest does. ThreadSanitizer goes by address, so it
 * judges the core's threads among themselves, and what a guest may rewrite at any time by design is no race to it:
 * nothing here has to be exempted. Both sides use atomic accesses for the words of a ring. Python's part is canned: a
 * write to configuration space carries a list of effects, and they are carried out. */
#include "core.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

enum { QUEUES = 2, SIZE = 64, SLOTS = 16, SECTOR = 512, BAR0_BYTES = 128, N_VECTORS = 3, CONFIG_VECTOR = 2 };
enum { RINGS = 0x100000, RING_STRIDE = 0x10000, RINGS_BYTES = QUEUES * RING_STRIDE };
enum { BUFFERS = 0x400000, SLOT_BYTES = 1024, BUFFERS_BYTES = QUEUES * SLOTS * SLOT_BYTES };
enum { MEMORY = RINGS_BYTES + BUFFERS_BYTES };
/* The driver's own arithmetic, for 64 entries ([legacy-header 4]). */
enum { AVAIL_FLAGS = 1024, AVAIL_IDX = 1026, AVAIL_RING = 1028, USED_EVENT = 1156 };
enum { USED_FLAGS = 4096, USED_IDX = 4098, USED_RING = 4100, AVAIL_EVENT = 4612, USED_BYTES = 520 };
enum { NEXT = 1, WRITE = 2, IN = 0, OUT = 1, BLANK = 0xaa };
/* Ours to choose: C knows no register offset. */
enum { NOTIFY = 16, STATUS = 18, ISR = 19 };
enum { STALL_S = 20, GRAVES = 64 };

static uint8_t *guest, *view;            /* the drivers' mapping, and the client's own, for DMA_READ and DMA_WRITE */
static bool far;                         /* no memory is handed over */
static int memory_fd, disk_fd, sock = -1;
static vpci_dev *dev;
static vpci_blk *blk;
static struct sockaddr_un address;
static socklen_t address_len;
static pthread_mutex_t sending = PTHREAD_MUTEX_INITIALIZER;
static bool over;                        /* of the phase: guests and readers end */
static uint16_t next_id;
static uint64_t requests, far_messages, kicks, interrupts, posts, reads_of_stats;

#define CHECK(claim, ...) do { if (!(claim)) fail(__LINE__, __VA_ARGS__); } while (0)

static void __attribute__((noreturn)) fail(int line, const char *what)
{
    printf("FAILED, line %d: %s\n", line, what);
    fflush(stdout);
    _exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint32_t chance(uint32_t *seed, uint32_t n)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    *seed ^= *seed << 5;
    return *seed % n;
}

static void count(uint64_t *what) { __atomic_fetch_add(what, 1, __ATOMIC_RELAXED); }
static bool is_over(void) { return __atomic_load_n(&over, __ATOMIC_RELAXED); }

/* ---- Python's part ---- */

static uint32_t make_rows(vpci_hot_row *rows)
{
    uint32_t n = 0;
    rows[n++] = (vpci_hot_row){0, 8, VPCI_READ_VALUE, VPCI_WRITE_PYTHON, 0};
    rows[n++] = (vpci_hot_row){8, 8, VPCI_READ_VALUE, VPCI_WRITE_PYTHON, 0};
    rows[n++] = (vpci_hot_row){NOTIFY, 2, VPCI_READ_NOTIFY, VPCI_WRITE_KICK, 0};
    rows[n++] = (vpci_hot_row){STATUS, 1, VPCI_READ_VALUE, VPCI_WRITE_PYTHON, 0};
    rows[n++] = (vpci_hot_row){ISR, 1, VPCI_READ_ISR, VPCI_WRITE_PYTHON, 0};
    for (uint32_t off = ISR + 1; off < BAR0_BYTES; off += 4)
        rows[n++] = (vpci_hot_row){off, 4, VPCI_READ_VALUE, VPCI_WRITE_PYTHON, off};
    return n;
}

static void answer(const vpci_event *e)
{
    vpci_hot_row rows[64];
    uint32_t n_rows = make_rows(rows);
    struct vfu_version version = {0, 1};
    struct vfu_region_access access;
    if (e->kind == VPCI_EVENT_CLIENT_GONE) {
        const vpci_effect fresh[] = {{VPCI_FX_MSIX, 0, 0}, {VPCI_FX_ISR_CLEAR, 0, 0}, {VPCI_FX_NOTIFY_RESET, 0, 0}};
        vpci_dev_answer(dev, 0, NULL, 0, fresh, ARRAY_LEN(fresh), rows, n_rows);
    } else if (e->command == VFU_VERSION) {
        vpci_dev_answer(dev, 0, &version, sizeof(version), NULL, 0, rows, n_rows);
    } else if (e->command == VFU_REGION_WRITE) {
        vpci_effect effects[32];
        uint32_t len = e->len - (uint32_t)sizeof(access);
        CHECK(len <= sizeof(effects), "too many effects");
        memcpy(&access, e->data, sizeof(access));
        memcpy(effects, e->data + sizeof(access), len);
        vpci_dev_answer(dev, 0, &access, sizeof(access), effects, len / (uint32_t)sizeof(effects[0]), rows, n_rows);
    } else if (e->command == VFU_DEVICE_RESET) {
        const vpci_effect reset[] = {{VPCI_FX_QUEUE_STOP, 0, 0}, {VPCI_FX_QUEUE_STOP, 1, 0}, {VPCI_FX_ISR_CLEAR, 0, 0}};
        vpci_dev_answer(dev, 0, NULL, 0, reset, ARRAY_LEN(reset), rows, n_rows);
    } else {
        vpci_dev_answer(dev, ENOTSUP, NULL, 0, NULL, 0, NULL, 0);
    }
}

static void *play_python(void *arg)
{
    (void)arg;
    for (vpci_event e; vpci_dev_next(dev, &e, -1) && e.kind != VPCI_EVENT_STOPPED;) {
        CHECK(e.note != VPCI_NOTE_RING_ERROR || e.kind != VPCI_EVENT_NOTE, "a ring is broken");
        CHECK(e.note != VPCI_NOTE_STUCK || e.kind != VPCI_EVENT_NOTE, "a drain does not end");
        if (e.kind != VPCI_EVENT_NOTE)
            answer(&e);
    }
    return NULL;
}

/* What else may come from outside at any time. */
static void *read_and_post(void *arg)
{
    uint32_t seed = 7;
    (void)arg;
    while (!is_over()) {
        vpci_dev_stats stats;
        vpci_queue_stats queue;
        vpci_blk_stats disk;
        vpci_hot_row rows[64];
        uint8_t pending[N_VECTORS];
        const vpci_effect raise = {VPCI_FX_RAISE_CONFIG, 0, 0};
        vpci_dev_read_stats(dev, &stats);
        vpci_dev_queue_stats(dev, chance(&seed, QUEUES + 1), &queue);
        vpci_dev_pending(dev, pending, sizeof(pending));
        vpci_blk_read_stats(blk, &disk);
        count(&reads_of_stats);
        if (!chance(&seed, 4)) {
            vpci_blk_set_writeback(blk, (int)chance(&seed, 2));
            vpci_dev_post(dev, &raise, 1, rows, make_rows(rows));
            count(&posts);
        }
        if (!chance(&seed, 4) && !vpci_blk_pause(blk, 1000)) {
            vpci_blk_set_sectors(blk, QUEUES * SLOTS);
            vpci_blk_resume(blk);
        }
        usleep(200);
    }
    return NULL;
}

/* ---- the client ---- */

static void put(const void *data, size_t len, int fd)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec iov = {(void *)data, len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof(control);
        struct cmsghdr *cm = CMSG_FIRSTHDR(&msg);
        *cm = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(cm), &fd, sizeof(fd));
    }
    pthread_mutex_lock(&sending);
    /* A client that was closed meanwhile has nothing to say. */
    ssize_t n = sock < 0 ? (ssize_t)len : sendmsg(sock, &msg, MSG_NOSIGNAL);
    pthread_mutex_unlock(&sending);
    CHECK(n == (ssize_t)len || errno == EPIPE || errno == ECONNRESET, "cannot send");
}

static void send_message(uint16_t id, uint16_t command, uint32_t flags, const void *a, size_t a_len, const void *b,
                         size_t b_len, int fd)
{
    uint8_t message[1024];
    struct vfu_header h = {.id = id, .command = command, .size = (uint32_t)(sizeof(h) + a_len + b_len), .flags = flags};
    CHECK(h.size <= sizeof(message), "too long a message");
    memcpy(message, &h, sizeof(h));
    if (a_len)
        memcpy(message + sizeof(h), a, a_len);
    if (b_len)
        memcpy(message + sizeof(h) + a_len, b, b_len);
    put(message, h.size, fd);
}

static void take(void *to, size_t len)
{
    for (uint8_t *at = to; len;) {
        ssize_t n = recv(sock, at, len, 0);
        CHECK(n > 0, "the server has closed");
        at += n;
        len -= (size_t)n;
    }
}

static uint8_t *view_of(uint64_t gpa)
{
    return gpa < BUFFERS ? view + (gpa - RINGS) : view + RINGS_BYTES + (gpa - BUFFERS);
}

/* Memory that the server cannot map: the client reads and writes it for it. A word of a ring goes by one access. */
static void serve_memory(const struct vfu_header *h)
{
    struct vfu_dma_access a;
    uint8_t reply[sizeof(*h) + sizeof(a) + 65536], *data = reply + sizeof(*h) + sizeof(a);
    struct vfu_header r = {.id = h->id, .command = h->command, .flags = VFU_F_REPLY};
    take(&a, sizeof(a));
    CHECK(a.count <= 65536, "too much at once");
    bool writes = h->command == VFU_DMA_WRITE;
    if (writes)
        take(data, a.count);
    uint8_t *at = view_of(a.addr);
    if (a.count == 2 && writes)
        __atomic_store_n((uint16_t *)at, *(uint16_t *)data, __ATOMIC_SEQ_CST);
    else if (a.count == 2)
        *(uint16_t *)data = __atomic_load_n((uint16_t *)at, __ATOMIC_SEQ_CST);
    else
        memcpy(writes ? at : data, writes ? data : at, a.count);
    r.size = (uint32_t)(sizeof(r) + sizeof(a) + (writes ? 0 : a.count));
    memcpy(reply, &r, sizeof(r));
    memcpy(reply + sizeof(r), &a, sizeof(a));
    put(reply, r.size, -1);
    count(&far_messages);
}

/* The header of the next reply; what the server asks for meanwhile is done. */
static void take_header(struct vfu_header *h)
{
    for (;;) {
        take(h, sizeof(*h));
        if ((h->flags & VFU_F_TYPE_MASK) == VFU_F_REPLY)
            return;
        CHECK(far && (h->command == VFU_DMA_READ || h->command == VFU_DMA_WRITE), "an unknown request of the server");
        serve_memory(h);
    }
}

/* The client has nothing to say for a while. */
static void listen_for(uint32_t us)
{
    struct vfu_header h;
    double until = now() + us * 1e-6;
    for (struct pollfd p = {.fd = sock, .events = POLLIN}; now() < until;)
        if (poll(&p, 1, 1) > 0) {
            take(&h, sizeof(h));
            CHECK(far && (h.flags & VFU_F_TYPE_MASK) == 0, "a reply that nobody waits for");
            serve_memory(&h);
        }
}

/* The errno of the reply; its payload into reply, which has room for len bytes. */
static uint32_t request(uint16_t command, const void *a, size_t a_len, const void *b, size_t b_len, int fd, void *reply,
                        size_t len)
{
    uint8_t rest[1024];
    struct vfu_header h;
    uint16_t id = ++next_id;
    send_message(id, command, 0, a, a_len, b, b_len, fd);
    take_header(&h);
    CHECK(h.id == id && h.command == command && (h.flags & VFU_F_TYPE_MASK) == VFU_F_REPLY, "not our reply");
    CHECK(h.size - sizeof(h) <= sizeof(rest), "too long a reply");
    take(rest, h.size - sizeof(h));
    if (reply)
        memcpy(reply, rest, len < h.size - sizeof(h) ? len : h.size - sizeof(h));
    return h.error;
}

static void have_effects(const vpci_effect *effects, uint32_t n)
{
    struct vfu_region_access a = {.region = VFU_REGION_CONFIG, .count = n * (uint32_t)sizeof(*effects)};
    CHECK(!request(VFU_REGION_WRITE, &a, sizeof(a), effects, a.count, -1, NULL, 0), "a config write was refused");
}

static void effect(uint32_t op, uint32_t queue, uint64_t value) { have_effects(&(vpci_effect){op, queue, value}, 1); }

static void kick(uint16_t queue)
{
    struct vfu_region_access a = {.offset = NOTIFY, .region = VFU_REGION_BAR0, .count = 2};
    count(&kicks);
    send_message(0, VFU_REGION_WRITE, VFU_F_NO_REPLY, &a, sizeof(a), &queue, sizeof(queue), -1);
}

static uint8_t read_isr(void)
{
    struct vfu_region_access a = {.offset = ISR, .region = VFU_REGION_BAR0, .count = 1};
    uint8_t reply[sizeof(a) + 1] = {0};
    CHECK(!request(VFU_REGION_READ, &a, sizeof(a), NULL, 0, -1, reply, sizeof(reply)), "a read was refused");
    return reply[sizeof(a)];
}

static void map(uint64_t gpa, uint64_t size, uint64_t offset)
{
    struct vfu_dma_map m = {.argsz = sizeof(m), .flags = VFU_DMA_READABLE | VFU_DMA_WRITABLE, .offset = offset,
                            .addr = gpa, .size = size};
    CHECK(!request(VFU_DMA_MAP, &m, sizeof(m), NULL, 0, far ? -1 : memory_fd, NULL, 0), "a map was refused");
}

static void unmap(uint64_t gpa, uint64_t size, uint32_t flags)
{
    struct vfu_dma_unmap u = {.argsz = sizeof(u), .flags = flags, .addr = gpa, .size = size};
    CHECK(!request(VFU_DMA_UNMAP, &u, sizeof(u), NULL, 0, -1, NULL, 0), "an unmap was refused");
}

static void set_irqs(uint32_t index, uint32_t start, uint32_t n, uint32_t flags, const uint8_t *bools, int fd)
{
    struct vfu_irq_set s = {.argsz = sizeof(s) + (bools ? n : 0), .flags = flags, .index = index, .start = start, .count = n};
    CHECK(!request(VFU_DEVICE_SET_IRQS, &s, sizeof(s), bools, bools ? n : 0, fd, NULL, 0), "SET_IRQS was refused");
}

static uint64_t drain(int fd)
{
    uint64_t n = 0;
    return read(fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

/* ---- a driver: one thread a queue ---- */

enum slot_state { FREE, WRITING, WRITTEN, READING };

struct driver {
    pthread_mutex_t lock;            /* held for each step; the client takes it to hold the driver still */
    pthread_t thread;
    uint16_t queue;
    bool live;                       /* the device has our ring */
    bool may_kick;
    bool by_interrupt;               /* sleep until used_event's interrupt comes */
    int irq_fd;
    uint16_t avail, seen, kicked;
    enum slot_state state[SLOTS];
    bool may_fail[SLOTS];            /* its buffers went away while it was in flight */
    uint32_t generation[SLOTS];
    double progress;
    uint32_t seed;
};

static struct driver drivers[QUEUES];

static uint8_t *ring(const struct driver *d) { return guest + d->queue * RING_STRIDE; }
static uint16_t get16(const struct driver *d, uint32_t off)
{
    return __atomic_load_n((uint16_t *)(ring(d) + off), __ATOMIC_ACQUIRE);
}
static void put16(const struct driver *d, uint32_t off, uint16_t value)
{
    __atomic_store_n((uint16_t *)(ring(d) + off), value, __ATOMIC_RELEASE);
}
static uint32_t get32(const struct driver *d, uint32_t off)
{
    return __atomic_load_n((uint32_t *)(ring(d) + off), __ATOMIC_RELAXED);
}
static uint32_t slot_off(const struct driver *d, uint32_t slot) { return (d->queue * SLOTS + slot) * SLOT_BYTES; }
static uint8_t *slot_at(const struct driver *d, uint32_t slot) { return guest + RINGS_BYTES + slot_off(d, slot); }
/* Header at 0, status at 16, data at 512. */
static uint32_t word_of(const struct driver *d, uint32_t slot) { return d->generation[slot] << 8 | d->queue << 5 | slot; }

static void describe(const struct driver *d, uint32_t n, uint64_t gpa, uint32_t len, uint16_t flags, uint16_t next)
{
    memcpy(ring(d) + 16 * n, &gpa, 8);
    memcpy(ring(d) + 16 * n + 8, &len, 4);
    memcpy(ring(d) + 16 * n + 12, &flags, 2);
    memcpy(ring(d) + 16 * n + 14, &next, 2);
}

/* A write of a new word, or a read of what was written. */
static void add(struct driver *d, uint32_t slot)
{
    uint8_t *at = slot_at(d, slot);
    uint64_t gpa = BUFFERS + slot_off(d, slot);
    bool writes = d->state[slot] == FREE;
    d->generation[slot] += writes;
    uint32_t words[SECTOR / 4], header[4] = {writes ? OUT : IN, 0, d->queue * SLOTS + slot, 0};
    for (uint32_t i = 0; i < ARRAY_LEN(words); i++)
        words[i] = writes ? word_of(d, slot) : 0;
    memcpy(at, header, sizeof(header));
    memcpy(at + 512, words, sizeof(words));
    at[16] = BLANK;
    describe(d, 3 * slot, gpa, 16, NEXT, (uint16_t)(3 * slot + 1));
    describe(d, 3 * slot + 1, gpa + 512, SECTOR, writes ? NEXT : NEXT | WRITE, (uint16_t)(3 * slot + 2));
    describe(d, 3 * slot + 2, gpa + 16, 1, WRITE, 0);
    d->state[slot] = writes ? WRITING : READING;
    put16(d, AVAIL_RING + 2 * (d->avail % SIZE), (uint16_t)(3 * slot));
    put16(d, AVAIL_IDX, ++d->avail);
}

static void end(struct driver *d, uint32_t head)
{
    uint32_t slot = head / 3, words[SECTOR / 4];
    CHECK(slot < SLOTS && (d->state[slot] == WRITING || d->state[slot] == READING), "a chain that is not in flight was used");
    bool failed = slot_at(d, slot)[16];
    CHECK(!failed || d->may_fail[slot], "a request has failed");
    d->may_fail[slot] = false;
    if (failed) {
        d->state[slot] = FREE;
        return;
    }
    memcpy(words, slot_at(d, slot) + 512, sizeof(words));
    for (uint32_t i = 0; i < ARRAY_LEN(words); i++)
        CHECK(words[i] == word_of(d, slot), "what was read is not what was written");
    d->state[slot] = d->state[slot] == WRITING ? WRITTEN : FREE;
    count(&requests);
}

static void harvest(struct driver *d)
{
    for (uint16_t idx = get16(d, USED_IDX); d->seen != idx; d->seen++) {
        end(d, get32(d, USED_RING + 8 * (d->seen % SIZE)));
        d->progress = now();
    }
}

static void add_some(struct driver *d)
{
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        if ((d->state[slot] == FREE || d->state[slot] == WRITTEN) && chance(&d->seed, 2))
            add(d, slot);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);   /* G2 */
    if (d->kicked != d->avail && vpci_need_event(get16(d, AVAIL_EVENT), d->avail, d->kicked) && d->may_kick)
        kick(d->queue);
    d->kicked = d->avail;
}

/* Work is in flight: is there to be slept? G4: first ask for the interrupt, then look whether it is too late for it. */
static bool asks_for_interrupt(struct driver *d)
{
    if (!d->by_interrupt || d->seen == d->avail)
        return false;
    put16(d, USED_EVENT, d->seen);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return get16(d, USED_IDX) == d->seen;
}

static void *drive(void *arg)
{
    struct driver *d = arg;
    while (!is_over()) {
        int sleep_on = -1;
        pthread_mutex_lock(&d->lock);
        if (d->live) {
            harvest(d);
            add_some(d);
            CHECK(now() - d->progress < STALL_S, "no progress: a kick or an entry was lost");
            sleep_on = asks_for_interrupt(d) ? d->irq_fd : -1;
        }
        pthread_mutex_unlock(&d->lock);
        if (sleep_on < 0) {
            sched_yield();
            continue;
        }
        struct pollfd p = {.fd = sleep_on, .events = POLLIN};
        double since = now();
        while (!poll(&p, 1, 50) && !is_over())
            CHECK(now() - since < STALL_S, "no interrupt: it was lost");
        if (drain(sleep_on))
            count(&interrupts);
    }
    return NULL;
}

/* ---- a device's life ---- */

static void connect_client(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && !connect(fd, (struct sockaddr *)&address, address_len), "cannot connect");
    pthread_mutex_lock(&sending);
    sock = fd;
    pthread_mutex_unlock(&sending);
    struct vfu_version version = {0, 1};
    CHECK(!request(VFU_VERSION, &version, sizeof(version), "{}", 3, -1, NULL, 0), "VERSION was refused");
    map(RINGS, RINGS_BYTES, 0);
    map(BUFFERS, BUFFERS_BYTES, RINGS_BYTES);
}

static void disconnect(void)
{
    pthread_mutex_lock(&sending);
    close(sock);
    sock = -1;
    pthread_mutex_unlock(&sending);
}

static void hold(void)
{
    for (uint32_t q = 0; q < QUEUES; q++)
        pthread_mutex_lock(&drivers[q].lock);
}

static void let_go(void)
{
    for (uint32_t q = 0; q < QUEUES; q++)
        pthread_mutex_unlock(&drivers[q].lock);
}

/* New rings, with the drivers held. */
static void start_queues(void)
{
    memset(guest, 0, RINGS_BYTES);
    for (uint32_t q = 0; q < QUEUES; q++) {
        struct driver *d = &drivers[q];
        d->avail = d->seen = d->kicked = 0;
        memset(d->state, 0, sizeof(d->state));
        memset(d->may_fail, 0, sizeof(d->may_fail));
        d->progress = now();
        d->live = d->may_kick = true;
    }
    const vpci_effect effects[] = {
        {VPCI_FX_RING_RULES, 0, VPCI_RING_USED_EVENT | VPCI_RING_AVAIL_EVENT | VPCI_RING_INDIRECT},
        {VPCI_FX_FEATURES, 0, 1u << VPCI_BLK_F_FLUSH},
        {VPCI_FX_MSIX, 0, 1}, {VPCI_FX_CONFIG_VECTOR, 0, CONFIG_VECTOR},
        {VPCI_FX_QUEUE_VECTOR, 0, 0}, {VPCI_FX_QUEUE_VECTOR, 1, 1},
        {VPCI_FX_QUEUE_START, 0, RINGS >> 12}, {VPCI_FX_QUEUE_START, 1, (RINGS + RING_STRIDE) >> 12},
    };
    have_effects(effects, ARRAY_LEN(effects));
}

static int give_eventfd(uint32_t vector)
{
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(fd >= 0, "no eventfd");
    set_irqs(VFU_IRQ_MSIX, vector, 1, VFU_IRQ_DATA_EVENTFD | VFU_IRQ_ACTION_TRIGGER, NULL, fd);
    return fd;
}

static pthread_t python, reader;
static int listener;

static void begin_life(bool by_interrupt)
{
    static vpci_file file;
    file = (vpci_file){.fd = disk_fd, .now = VPCI_NOW_CACHED};
    blk = vpci_blk_new(&(vpci_blk_setup){.ops = vpci_file_disk(), .disk = &file, .align = 1, .sectors = QUEUES * SLOTS,
                                         .serial = "stress", .writeback = 1, .n_queues = QUEUES, .n_threads = 2});
    const vpci_queue_setup queue = {SIZE, vpci_blk_engine(), blk};
    const vpci_queue_setup queues[QUEUES] = {queue, queue};
    vpci_dev_setup setup = {.n_queues = QUEUES, .queues = queues, .max_sg = 128, .cancel_ms = 8000, .close_ms = 16000};
    setup.region_sizes[VFU_REGION_BAR0] = BAR0_BYTES;
    setup.region_sizes[VFU_REGION_CONFIG] = 4096;
    setup.irq_counts[VFU_IRQ_INTX] = 1;
    setup.irq_counts[VFU_IRQ_MSIX] = N_VECTORS;
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    address = (struct sockaddr_un){.sun_family = AF_UNIX};
    address_len = sizeof(address);
    CHECK(!bind(listener, (struct sockaddr *)&address, sizeof(sa_family_t)) && !listen(listener, 4) &&
          !getsockname(listener, (struct sockaddr *)&address, &address_len), "cannot listen");
    CHECK(blk && (dev = vpci_dev_new(&setup)) && !vpci_dev_start(dev, listener), "no device");
    pthread_create(&python, NULL, play_python, NULL);
    connect_client();
    over = false;
    for (uint32_t q = 0; q < QUEUES; q++) {
        drivers[q] = (struct driver){.queue = (uint16_t)q, .by_interrupt = by_interrupt, .seed = q + 1};
        pthread_mutex_init(&drivers[q].lock, NULL);
        drivers[q].irq_fd = give_eventfd(q);
    }
    hold();
    start_queues();
    let_go();
    for (uint32_t q = 0; q < QUEUES; q++)
        pthread_create(&drivers[q].thread, NULL, drive, &drivers[q]);
    pthread_create(&reader, NULL, read_and_post, NULL);
}

/* In the middle of the traffic: by a stop, or by the client's end and then a stop. */
static void end_life(bool client_first)
{
    if (client_first)
        disconnect();
    vpci_dev_stop(dev);
    pthread_join(python, NULL);
    __atomic_store_n(&over, true, __ATOMIC_RELAXED);
    pthread_join(reader, NULL);
    for (uint32_t q = 0; q < QUEUES; q++) {
        pthread_join(drivers[q].thread, NULL);
        close(drivers[q].irq_fd);
        pthread_mutex_destroy(&drivers[q].lock);
    }
    if (!client_first)
        disconnect();
    vpci_dev_free(dev);
    vpci_blk_free(blk);
    close(listener);
}

/* ---- phases ---- */

/* Whatever the device does, it does in the turns of these messages or right after them. */
static void settle(void)
{
    read_isr();
    effect(VPCI_FX_OPS, 0, 0);
    read_isr();
}

/* D8: neither guest memory changes nor an eventfd fires. The drivers are held, or only what the device writes is compared. */
static void check_silence(bool whole)
{
    static uint8_t before[MEMORY], used[QUEUES][USED_BYTES];
    if (whole)
        memcpy(before, guest, MEMORY);
    for (uint32_t q = 0; q < QUEUES; q++) {
        memcpy(used[q], ring(&drivers[q]) + USED_FLAGS, USED_BYTES);
        drain(drivers[q].irq_fd);
    }
    settle();
    for (uint32_t q = 0; q < QUEUES; q++) {
        CHECK(!memcmp(used[q], ring(&drivers[q]) + USED_FLAGS, USED_BYTES), "a used ring was written after the answer");
        CHECK(!drain(drivers[q].irq_fd), "an eventfd was signalled after the answer");
    }
    CHECK(!whole || !memcmp(before, guest, MEMORY), "guest memory was written after the answer");
}

static void traffic_round(uint64_t n, uint32_t *seed)
{
    (void)n, (void)seed;
    usleep(20000);
}

/* R05. In every second round the drivers go on adding and kicking until the check is over. */
static void reset_round(uint64_t n, uint32_t *seed)
{
    bool still = n % 2;
    usleep(chance(seed, 300));
    if (still)
        hold();
    if (n % 3) {
        const vpci_effect stop[] = {{VPCI_FX_QUEUE_STOP, 0, 0}, {VPCI_FX_QUEUE_STOP, 1, 0}, {VPCI_FX_ISR_CLEAR, 0, 0},
                                    {VPCI_FX_NOTIFY_RESET, 0, 0}};
        have_effects(stop, ARRAY_LEN(stop));
    } else {
        CHECK(!request(VFU_DEVICE_RESET, NULL, 0, NULL, 0, -1, NULL, 0), "DEVICE_RESET was refused");
    }
    check_silence(still);
    if (!still)
        hold();
    start_queues();
    let_go();
}

/* The ring or the buffers go away under work in flight, and come back; what was added meanwhile is found without a
 * kick. A request whose buffers are away when it is fetched fails, and is made again. */
static void remap_round(uint64_t n, uint32_t *seed)
{
    bool all = n % 3 == 2, rings = all || n % 3 == 1, buffers = all || n % 3 == 0;
    usleep(chance(seed, 300));
    hold();
    if (all)
        unmap(0, 0, VFU_DMA_UNMAP_ALL);
    else
        unmap(rings ? RINGS : BUFFERS, rings ? RINGS_BYTES : BUFFERS_BYTES, 0);
    if (rings)
        check_silence(true);
    for (uint32_t q = 0; q < QUEUES; q++) {
        drivers[q].may_kick = false;
        for (uint32_t slot = 0; buffers && slot < SLOTS; slot++)
            drivers[q].may_fail[slot] = drivers[q].state[slot] == WRITING || drivers[q].state[slot] == READING;
    }
    if (!buffers) {
        let_go();
        usleep(chance(seed, 200));
        hold();
    }
    if (buffers)
        map(BUFFERS, BUFFERS_BYTES, RINGS_BYTES);
    if (rings)
        map(RINGS, RINGS_BYTES, 0);
    for (uint32_t q = 0; q < QUEUES; q++)
        drivers[q].may_kick = true;
    let_go();
}

/* Rings and buffers that only messages reach: the device's far thread works beside the pump. The answer to a reset does
 * not wait for what the client has not served, and nothing is asked of it afterwards. */
static void far_round(uint64_t n, uint32_t *seed)
{
    listen_for(chance(seed, 30000));
    reset_round(n, seed);
}

/* The same, mapped anew under work that was fetched before. */
static void far_remap_round(uint64_t n, uint32_t *seed)
{
    listen_for(chance(seed, 30000));
    if (n % 2)
        remap_round(n / 2, seed);
    else
        reset_round(n / 2, seed);
}

static int graves[GRAVES];
static uint32_t n_graves;

/* An eventfd that was replaced is watched for a while: nobody may signal it any more. */
static void bury(int fd)
{
    int *grave = &graves[n_graves++ % GRAVES];
    drain(fd);
    if (*grave) {
        CHECK(!drain(*grave), "an eventfd was signalled after its replacement was answered");
        close(*grave);
    }
    *grave = fd;
}

static void clear_graves(void)
{
    for (uint32_t i = 0; i < GRAVES; i++)
        if (graves[i])
            close(graves[i]);
    memset(graves, 0, sizeof(graves));
}

static void irqs_round(uint64_t n, uint32_t *seed)
{
    uint32_t vector = chance(seed, QUEUES);
    uint8_t bools[N_VECTORS] = {(uint8_t)chance(seed, 2), (uint8_t)chance(seed, 2), (uint8_t)chance(seed, 2)};
    (void)n;
    switch (chance(seed, 12)) {
    case 0: set_irqs(VFU_IRQ_MSIX, 0, N_VECTORS, VFU_IRQ_DATA_BOOL | VFU_IRQ_ACTION_MASK, bools, -1); break;
    case 1: set_irqs(VFU_IRQ_MSIX, 0, N_VECTORS, VFU_IRQ_DATA_NONE | VFU_IRQ_ACTION_UNMASK, NULL, -1); break;
    case 2: set_irqs(VFU_IRQ_MSIX, vector, 1, VFU_IRQ_DATA_NONE | VFU_IRQ_ACTION_TRIGGER, NULL, -1); break;
    case 3: effect(VPCI_FX_VECTOR_MASK, vector, chance(seed, 2)); break;
    case 4: effect(VPCI_FX_MSIX, 0, chance(seed, 4)); break;
    case 5: effect(VPCI_FX_INTX_DISABLE, 0, chance(seed, 2)); break;
    case 6: effect(VPCI_FX_QUEUE_VECTOR, vector, chance(seed, 2) ? vector : VPCI_NO_VECTOR); break;
    case 7: set_irqs(VFU_IRQ_INTX, 0, 1, VFU_IRQ_DATA_NONE | VFU_IRQ_ACTION_UNMASK, NULL, -1); break;
    case 8: effect(VPCI_FX_RAISE_CONFIG, 0, 0); break;
    case 9: read_isr(); break;
    default: {
        int old = drivers[vector].irq_fd, new = give_eventfd(vector);
        pthread_mutex_lock(&drivers[vector].lock);
        drivers[vector].irq_fd = new;
        pthread_mutex_unlock(&drivers[vector].lock);
        bury(old);
    }
    }
}

/* Lives of some milliseconds; every second one has two clients. */
static void lives_round(uint64_t n, uint32_t *seed)
{
    begin_life(false);
    usleep(1000 + chance(seed, 20000));
    if (n % 2) {
        hold();
        for (uint32_t q = 0; q < QUEUES; q++)
            drivers[q].live = false;
        let_go();
        disconnect();
        connect_client();
        hold();
        start_queues();
        let_go();
        usleep(chance(seed, 5000));
    }
    end_life(n % 3);
}

static const struct phase {
    const char *name;
    void (*round)(uint64_t n, uint32_t *seed);
    bool by_interrupt, lives, far;
} phases[] = {
    {"traffic", traffic_round, true, false, false}, {"reset", reset_round, false, false, false},
    {"remap", remap_round, false, false, false},
    {"irqs", irqs_round, false, false, false}, {"lives", lives_round, false, true, false},
    {"far", far_round, false, false, true},    {"farmap", far_remap_round, false, false, true},
};

static uint32_t open_fds(void)
{
    uint32_t n = 0;
    for (int fd = 0; fd < 1024; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static void run(const struct phase *p, uint64_t rounds, double seconds)
{
    uint32_t seed = 99, fds = open_fds();
    uint64_t n = 0;
    double begun = now();
    far = p->far;
    if (!p->lives)
        begin_life(p->by_interrupt);
    for (; n < rounds && now() - begun < seconds; n++)
        p->round(n, &seed);
    if (!p->lives)
        end_life(false);
    clear_graves();
    CHECK(open_fds() == fds, "descriptors stay open");
    printf("%s: %llu rounds, %llu requests, %llu kicks, %llu sleeps ended by an interrupt, "
           "%llu reads of statistics, %llu posts, %llu DMA messages, %.1f s\n", p->name, (unsigned long long)n, (unsigned long long)requests,
           (unsigned long long)kicks, (unsigned long long)interrupts, (unsigned long long)reads_of_stats,
           (unsigned long long)posts, (unsigned long long)far_messages, now() - begun);
}

int main(int argc, char **argv)
{
    memory_fd = memfd_create("stress", MFD_CLOEXEC);
    disk_fd = memfd_create("disk", MFD_CLOEXEC);
    CHECK(memory_fd >= 0 && !ftruncate(memory_fd, MEMORY) && !ftruncate(disk_fd, QUEUES * SLOTS * SECTOR), "no memory");
    guest = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    view = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    CHECK(guest != MAP_FAILED && view != MAP_FAILED, "no memory");
    for (size_t i = 0; argc == 4 && i < ARRAY_LEN(phases); i++)
        if (!strcmp(argv[1], phases[i].name)) {
            run(&phases[i], strtoull(argv[2], NULL, 10), strtod(argv[3], NULL));
            return 0;
        }
    fprintf(stderr, "stress traffic|reset|remap|irqs|lives|far|farmap ROUNDS SECONDS\n");
    return 2;
}
