/* libvfio-user as a front: the library owns the socket and speaks the protocol; its callbacks end in the core's own
 * functions for accesses, memory and interrupts. The pump hands it events and turns (api/front.h).
 *
 * The library blocks in three places: for the body of a message whose header it has, for room for a reply, and for the
 * VERSION of a client that it has accepted. So it is called only when a whole message waits and there is room, and
 * vfu_attach_ctx has a thread of its own, the only one beside the pump's that ever calls the library, and never at the
 * same time. */
#include "vfu.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

typedef struct vpci_dev vpci_dev;
#include "../api/front.h"

enum { ATTACH_IDLE, ATTACH_RUNNING, ATTACH_ENDED };
enum { MESSAGES_A_TURN = 64, HEADER_BYTES = 16, LARGEST_MESSAGE = 65536, TYPE_MASK = 0xf };
enum { VERSION = 1, DMA_MAP = 2, DMA_UNMAP = 3, SET_IRQS = 8, DEVICE_RESET = 13 };   /* of the protocol's commands */
enum { PERM_READ = 1, PERM_WRITE = 2 };   /* enum vpci_mem_perm */

struct vpci_transport {
    const vpci_core *core;
    vpci_dev *dev;
    vfu_ctx_t *ctx;
    int listen_fd;             /* the library's, like conn_fd: never closed here */
    int conn_fd;               /* -1: no client */
    bool readable;             /* there may be a message now, and room for a reply: epoll tells of changes only */
    bool waits;                /* the library was told that the device is not at rest yet */
    bool dropped;              /* given up: nothing that it sent is executed any more */
    bool unfit;                /* the library would wait for this message, take a part for the whole, or leak its fds */
    bool loses_its_place;      /* it answers this one without reading all of it, and takes the rest for a header */
    bool listening;            /* epoll is asked for clients */
    bool triggers;             /* inside vfu_irq_trigger */
    bool has_asked;            /* the library has asked for rest while it executed the message */
    bool masks;                /* the message masked or unmasked; else a SET_IRQS may have armed something */
    uint16_t command;          /* of the message in execution */
    uint64_t addr, size;       /* if it is an unmap: of one range; else 0 */

    pthread_t attacher;
    uint32_t attach;           /* atomic: ATTACH_RUNNING until the thread has its result */
    int attach_error;

    char *in;                  /* where the data of a read goes */
    uint32_t in_len;
    bool answered;             /* reply() came */
    uint32_t error;
};

/* ---- accesses ---- */

/* A reply to a read begins with a copy of the request, which the library makes itself. */
enum { ACCESS_HEADER = 16 };

static void take_bytes(struct vpci_transport *t, uint32_t *skip, uint32_t *at, const void *data, size_t len)
{
    uint32_t skipped = len < *skip ? (uint32_t)len : *skip;
    uint32_t left = (uint32_t)len - skipped, n = left < t->in_len - *at ? left : t->in_len - *at;
    if (n)
        memcpy(t->in + *at, (const char *)data + skipped, n);
    *skip -= skipped;
    *at += n;
}

static void reply(void *state, uint32_t error, const void *a, size_t a_len, const void *b, size_t b_len)
{
    struct vpci_transport *t = state;
    uint32_t skip = ACCESS_HEADER, at = 0;
    t->answered = true;
    t->error = error;
    if (error || !t->in)
        return;
    take_bytes(t, &skip, &at, a, a_len);
    take_bytes(t, &skip, &at, b, b_len);
}

static int answer(const struct vpci_transport *t)
{
    errno = t->answered ? (int)t->error : EIO;
    return errno ? -1 : 0;
}

static void await(struct vpci_transport *t, char *in, uint32_t in_len)
{
    t->answered = false;
    t->in = in;
    t->in_len = in_len;
}

static ssize_t access_region(vfu_ctx_t *ctx, uint32_t region, char *buf, size_t count, loff_t offset, bool is_write)
{
    struct vpci_transport *t = vfu_get_private(ctx);
    await(t, is_write ? NULL : buf, (uint32_t)count);
    t->core->access(t->dev, region, (uint64_t)offset, (uint32_t)count, is_write ? buf : NULL);
    return answer(t) < 0 ? -1 : (ssize_t)count;
}

#define REGION(n) \
    static ssize_t region_##n(vfu_ctx_t *ctx, char *buf, size_t count, loff_t offset, bool is_write) \
    { \
        return access_region(ctx, n, buf, count, offset, is_write); \
    }
REGION(0) REGION(1) REGION(2) REGION(3) REGION(4) REGION(5) REGION(6) REGION(7) REGION(8)

static vfu_region_access_cb_t *const region_callbacks[] = {
    region_0, region_1, region_2, region_3, region_4, region_5, region_6, region_7, region_8,
};

static int reset(vfu_ctx_t *ctx, vfu_reset_type_t type)
{
    struct vpci_transport *t = vfu_get_private(ctx);
    if (type == VFU_RESET_LOST_CONN)
        return 0;   /* the core makes the function fresh when the connection has ended */
    await(t, NULL, 0);
    t->core->reset(t->dev);
    return answer(t);
}

/* ---- memory ---- */

static void dma_register(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
    struct vpci_transport *t = vfu_get_private(ctx);
    uint32_t perm = (info->prot & PROT_READ ? PERM_READ : 0u) | (info->prot & PROT_WRITE ? PERM_WRITE : 0u);
    uint64_t gpa = (uint64_t)(uintptr_t)info->iova.iov_base;
    int rc = t->core->map(t->dev, gpa, info->iova.iov_len, info->vaddr, perm);
    /* The library takes a range that it has for a good one, and has answered that it is there already. */
    if (rc < 0 && rc != -EEXIST)
        t->core->refused(t->dev, t->command, "a range that the device cannot use, although the library answered 0");
}

static void dma_unregister(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
    struct vpci_transport *t = vfu_get_private(ctx);
    t->core->unmap(t->dev, (uint64_t)(uintptr_t)info->iova.iov_base, info->iova.iov_len);
}

/* ---- interrupts ---- */

#define IRQ_STATE(n) \
    static void irq_state_##n(vfu_ctx_t *ctx, uint32_t start, uint32_t count, bool mask) \
    { \
        struct vpci_transport *t = vfu_get_private(ctx); \
        t->masks = true; \
        t->core->mask(t->dev, n, start, count, mask); \
    }
IRQ_STATE(0) IRQ_STATE(2)

static int trigger(void *state, uint32_t vector)
{
    struct vpci_transport *t = state;
    t->triggers = true;
    int rc = vfu_irq_trigger(t->ctx, vector);
    t->triggers = false;
    return rc;
}

/* ---- the library's words ---- */

static void say(vfu_ctx_t *ctx, int level, const char *text)
{
    struct vpci_transport *t = vfu_get_private(ctx);
    if (level <= LOG_ERR && t->dev && !t->triggers)   /* a trigger without an eventfd is pending, no error */
        t->core->refused(t->dev, t->command, text);
}

/* ---- one message ---- */

/* The header, and an unmap's payload. */
struct start {
    uint16_t id, command;
    uint32_t size, flags, error;
    uint32_t argsz, unmap_flags;
    uint64_t unmap_addr, unmap_size;
};
_Static_assert(offsetof(struct start, argsz) == HEADER_BYTES, "struct start is not as the wire has it");
_Static_assert(sizeof(struct start) == HEADER_BYTES + 24, "struct start is not as the wire has it");

static int queued_bytes(int fd)
{
    int n = 0;
    return ioctl(fd, FIONREAD, &n) < 0 ? 0 : n;
}

static bool has(int fd, short event)
{
    struct pollfd p = {.fd = fd, .events = event};
    return poll(&p, 1, 0) > 0 && p.revents & event;
}

/* Is there something that the library can deal with without waiting for more of it? */
static bool message_waits(struct vpci_transport *t)
{
    struct start h = {0};
    /* In this order: what arrives in between is seen by the last. */
    bool has_ended = has(t->conn_fd, POLLRDHUP);
    int queued = queued_bytes(t->conn_fd);
    ssize_t n = recv(t->conn_fd, &h, sizeof(h), MSG_PEEK | MSG_DONTWAIT);
    t->unfit = t->loses_its_place = false;
    t->command = 0;   /* of none: what the library asks for then is not for a message */
    if (n < 0)
        return errno != EAGAIN && errno != EINTR;
    if (n < HEADER_BYTES) {
        t->unfit = n > 0 && (has_ended || queued >= HEADER_BYTES);   /* cut by the end, or where fds are */
        return n == 0 || t->unfit;
    }
    bool is_of_one = h.command == DMA_UNMAP && !h.unmap_flags;
    t->command = h.command;
    t->addr = is_of_one ? h.unmap_addr : 0;
    t->size = is_of_one ? h.unmap_size : 0;
    t->unfit = h.size > LARGEST_MESSAGE;
    t->loses_its_place = h.size < HEADER_BYTES || (h.flags & TYPE_MASK && h.size > HEADER_BYTES);
    return t->unfit || t->loses_its_place || queued >= (int)h.size || has_ended;
}

/* The end of the stream, for whoever reads next. */
static void discard(int fd)
{
    char bytes[4096];
    while (recv(fd, bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
        continue;
}

/* The library has closed a connection when its fd to wait on is the listening one again. */
static void look_whether_gone(struct vpci_transport *t)
{
    if (vfu_get_poll_fd(t->ctx) == t->conn_fd)
        return;
    t->conn_fd = -1;
    t->core->disconnected(t->dev);
}

static void drop(void *state);

static void run(struct vpci_transport *t)
{
    if (t->unfit && !t->dropped) {
        t->core->refused(t->dev, t->command, "not to be received as a whole by the library; connection closed");
        drop(t);
    }
    if (t->dropped)
        discard(t->conn_fd);
    t->masks = t->has_asked = false;
    bool failed = vfu_run_ctx(t->ctx) < 0 && errno != ENOTCONN && errno != EBUSY;
    look_whether_gone(t);
    if (failed || t->loses_its_place)
        drop(t);
    if (t->command == SET_IRQS && !t->masks)
        t->core->armed(t->dev);
}

/* Bring work to its end, as the own front does for each message: for new memory none, for memory that goes the work on
 * it, for a reset or a lost connection all, without a trace. */
static int quiesce(vfu_ctx_t *ctx)
{
    struct vpci_transport *t = vfu_get_private(ctx);
    bool is_for_message = t->command == DMA_MAP || t->command == DMA_UNMAP || t->command == DEVICE_RESET;
    bool is_lost = t->dropped || t->has_asked || !is_for_message || has(t->conn_fd, POLLHUP);
    t->has_asked = true;   /* once for the message; again when it cannot be answered */
    if (!is_lost && t->command == DMA_MAP)
        return 0;
    t->waits = !t->core->quiesce(t->dev, is_lost || t->command == DEVICE_RESET, t->addr, t->size);
    errno = EBUSY;
    return t->waits ? -1 : 0;
}

static void at_rest(void *state)
{
    struct vpci_transport *t = state;
    if (!t->waits)
        return;
    t->waits = false;
    vfu_device_quiesced(t->ctx, 0);
    look_whether_gone(t);
}

/* ---- clients ---- */

static void *attach(void *arg)
{
    struct vpci_transport *t = arg;
    t->attach_error = vfu_attach_ctx(t->ctx) < 0 ? errno : 0;
    __atomic_store_n(&t->attach, ATTACH_ENDED, __ATOMIC_SEQ_CST);
    t->core->wake(t->dev);
    return NULL;
}

static void begin_attach(struct vpci_transport *t)
{
    t->command = VERSION;
    t->attach = ATTACH_RUNNING;
    if (pthread_create(&t->attacher, NULL, attach, t))
        t->attach = ATTACH_IDLE;
}

static void finish_attach(struct vpci_transport *t)
{
    if (__atomic_load_n(&t->attach, __ATOMIC_SEQ_CST) != ATTACH_ENDED)
        return;
    pthread_join(t->attacher, NULL);
    t->attach = ATTACH_IDLE;
    if (t->attach_error)
        return;   /* the library has told the client, and the log */
    t->conn_fd = vfu_get_poll_fd(t->ctx);
    t->readable = true;
    t->dropped = false;
    fcntl(t->conn_fd, F_SETFD, FD_CLOEXEC);
    t->core->watch(t->dev, t->conn_fd, EPOLLIN | EPOLLOUT | EPOLLET);
    t->core->connected(t->dev, t->conn_fd);
}

/* A client that says nothing holds the thread; again, until it has ended, for it may be about to accept. */
static void end_attach(struct vpci_transport *t)
{
    while (__atomic_load_n(&t->attach, __ATOMIC_SEQ_CST) == ATTACH_RUNNING) {
        shutdown(vfu_get_poll_fd(t->ctx), SHUT_RDWR);
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    finish_attach(t);
}

static void turn_away(struct vpci_transport *t)
{
    int fd = has(t->conn_fd, POLLHUP) ? -1 : accept4(t->listen_fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    t->core->turned_away(t->dev, fd);
    close(fd);
}

/* ---- what the pump asks for ---- */

static int event(void *state, int fd, uint32_t events)
{
    struct vpci_transport *t = state;
    (void)events;
    if (fd == t->conn_fd)
        t->readable = true;
    else if (fd == t->listen_fd && t->conn_fd >= 0)
        turn_away(t);
    else if (fd == t->listen_fd && t->attach == ATTACH_IDLE && t->core->may_execute(t->dev))
        begin_attach(t);
    return fd == t->conn_fd || fd == t->listen_fd;
}

static void execute(void *state)
{
    struct vpci_transport *t = state;
    finish_attach(t);
    for (int n = 0; t->conn_fd >= 0 && t->readable && t->core->may_execute(t->dev); n++) {
        if (n == MESSAGES_A_TURN) {
            t->core->wake(t->dev);
            return;
        }
        t->readable = t->dropped || (message_waits(t) && has(t->conn_fd, POLLOUT));
        if (t->readable)
            run(t);
    }
}

static void send_replies(void *state)
{
    (void)state;   /* the library has */
}

static void settle(void *state)
{
    struct vpci_transport *t = state;
    bool listening = t->conn_fd >= 0 ? !has(t->conn_fd, POLLHUP)
                                     : t->attach == ATTACH_IDLE && t->core->may_execute(t->dev);
    if (listening != t->listening)
        t->core->watch(t->dev, t->listen_fd, listening ? EPOLLIN : 0);
    t->listening = listening;
}

static void drop(void *state)
{
    struct vpci_transport *t = state;
    end_attach(t);
    if (t->conn_fd < 0)
        return;
    t->dropped = t->readable = true;
    shutdown(t->conn_fd, SHUT_RDWR);
}

static const vpci_front front = {
    .abi = VPCI_FRONT_ABI, .event = event, .execute = execute, .send = send_replies, .settle = settle,
    .reply = reply, .drop = drop, .at_rest = at_rest, .trigger = trigger,
};

const void *vpci_transport_front(void)
{
    return &front;
}

/* ---- life ---- */

static int set_up_regions(vfu_ctx_t *ctx, const vpci_transport_setup *setup)
{
    int rc = 0;
    for (int i = 0; i < VFU_PCI_DEV_NUM_REGIONS && !rc; i++) {
        int kind = i == VFU_PCI_DEV_CFG_REGION_IDX ? VFU_REGION_FLAG_ALWAYS_CB
                   : setup->io_regions >> i & 1 ? 0 : VFU_REGION_FLAG_MEM;
        if (setup->region_sizes[i])
            rc = vfu_setup_region(ctx, i, setup->region_sizes[i], region_callbacks[i], VFU_REGION_FLAG_RW | kind,
                                  NULL, 0, -1, 0);
    }
    return rc;
}

static int set_up_irqs(vfu_ctx_t *ctx, const vpci_transport_setup *setup)
{
    int rc = 0;
    for (int i = 0; i < VFU_DEV_NUM_IRQS && !rc; i++)
        rc = vfu_setup_device_nr_irqs(ctx, (enum vfu_dev_irq_type)i, setup->irq_counts[i]);
    rc = rc ? rc : vfu_setup_irq_state_callback(ctx, VFU_DEV_INTX_IRQ, irq_state_0);
    return rc ? rc : vfu_setup_irq_state_callback(ctx, VFU_DEV_MSIX_IRQ, irq_state_2);
}

static int set_up(vfu_ctx_t *ctx, const vpci_transport_setup *setup)
{
    vfu_setup_device_quiesce_cb(ctx, quiesce);
    if (vfu_setup_log(ctx, say, LOG_ERR) < 0 || vfu_setup_device_reset_cb(ctx, reset) < 0 ||
        vfu_setup_device_dma(ctx, setup->max_ranges, dma_register, dma_unregister) < 0 ||
        set_up_regions(ctx, setup) < 0 || set_up_irqs(ctx, setup) < 0)
        return -1;
    return vfu_realize_ctx(ctx);
}

vpci_transport *vpci_transport_new(const char *path, const vpci_transport_setup *setup, const void *core, int *error)
{
    struct vpci_transport *t = calloc(1, sizeof(*t));
    if (t) {
        *t = (struct vpci_transport){.core = core, .conn_fd = -1};
        t->ctx = vfu_create_ctx(VFU_TRANS_SOCK, path, LIBVFIO_USER_FLAG_ATTACH_NB, t, VFU_DEV_TYPE_PCI);
    }
    if (t && t->ctx && set_up(t->ctx, setup) == 0) {
        t->listen_fd = vfu_get_poll_fd(t->ctx);
        fcntl(t->listen_fd, F_SETFD, FD_CLOEXEC);
        return t;
    }
    *error = errno;
    vpci_transport_free(t);
    return NULL;
}

void vpci_transport_bind(vpci_transport *t, void *dev)
{
    t->dev = dev;
    t->listening = true;
    t->core->watch(t->dev, t->listen_fd, EPOLLIN);
}

void vpci_transport_free(vpci_transport *t)
{
    if (!t)
        return;
    vfu_destroy_ctx(t->ctx);   /* quiesce is not asked any more */
    free(t);
}
