/* A network device's frames as a file: net.c hands over frames, a thread writes them, for a disk may block and the pump
 * must not. What comes faster than it can be written is not in the file, and counted.
 * pcap, which every reader knows [pcap-savefile(5)], or pcapng, which also says which way a frame went
 * [draft-ietf-opsawg-pcapng]. */
#include "port.h"

#include <time.h>

enum { HALF_BYTES = 4 << 20, NS_A_US = 1000, NS_A_S = 1000000000 };
enum { MAGIC = 0xa1b2c3d4u, MAJOR = 2, MINOR = 4, ETHERNET = 1 };
enum { SECTION = 0x0a0d0d0a, BYTE_ORDER_MAGIC = 0x1a2b3c4d, INTERFACE = 1, PACKET = 6 };
enum { OPTION_FLAGS = 2, OPTION_TSRESOL = 9, NANOSECONDS = 9, INBOUND = 1, OUTBOUND = 2 };

struct file_header {
    uint32_t magic;
    uint16_t major, minor;
    uint32_t zone, accuracy, snaplen, linktype;
};

struct record {
    uint32_t seconds, us, kept, len;
};

/* The start of a pcapng file: a section of any length, and its one interface, whose times are in ns. */
struct ng_header {
    uint32_t section, section_len, magic;
    uint16_t major, minor;
    uint32_t any_length[2], section_len_again;
    uint32_t interface, interface_len;
    uint16_t linktype, reserved;
    uint32_t snaplen;
    uint16_t tsresol, tsresol_len;
    uint32_t ns, end_of_options, interface_len_again;
};
CHECK_LAYOUT(struct ng_header, 60);

/* Before a frame, and behind it and its padding to 4 bytes. */
struct ng_packet {
    uint32_t packet, block_len, interface, time_high, time_low, kept, len;
};

struct ng_end {
    uint16_t flags, flags_len;
    uint32_t direction, end_of_options, block_len_again;
};
CHECK_LAYOUT(struct ng_end, 16);

struct half {
    uint8_t *bytes;
    size_t n;
};

struct capture {
    int fd, event_fd;
    uint32_t snaplen;          /* of each frame that much is kept */
    bool is_ng;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct half halves[2];
    struct half *filling;      /* the other one is the thread's */
    bool ending;
    int error;                 /* errno; nothing is written any more */
};

/* Returns 0, or the errno with which the disk takes no more. */
static int write_all(int fd, const uint8_t *bytes, size_t n)
{
    for (ssize_t done; n; bytes += done, n -= (size_t)done) {
        done = write(fd, bytes, n);
        if (done < 0 && errno != EINTR)
            return errno;
        done = done < 0 ? 0 : done;
    }
    return 0;
}

static void fail(struct capture *c, int error)
{
    uint64_t one = 1;
    c->error = error;
    ssize_t n = write(c->event_fd, &one, sizeof(one));
    (void)n;
}

static void *run(void *arg)
{
    struct capture *c = arg;
    pthread_mutex_lock(&c->lock);
    while (!c->ending || c->filling->n) {
        if (!c->filling->n) {
            pthread_cond_wait(&c->changed, &c->lock);
            continue;
        }
        struct half *full = c->filling;
        c->filling = full == c->halves ? c->halves + 1 : c->halves;
        pthread_mutex_unlock(&c->lock);
        int error = c->error ? 0 : write_all(c->fd, full->bytes, full->n);
        pthread_mutex_lock(&c->lock);
        full->n = 0;
        if (error)
            fail(c, error);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

struct copied {
    uint8_t *to;
    const struct iovec *iov;
    uint32_t kept;
};

static void gather(void *arg)
{
    struct copied *c = arg;
    for (size_t left = c->kept, i = 0; left; i++) {
        size_t now = c->iov[i].iov_len < left ? c->iov[i].iov_len : left;
        memcpy(c->to, c->iov[i].iov_base, now);
        c->to += now;
        left -= now;
    }
}

/* What goes before the frame; returns its size. */
static size_t put_head(const struct capture *c, uint8_t *to, uint32_t kept, uint32_t len, uint32_t total)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t ns = (uint64_t)now.tv_sec * NS_A_S + (uint64_t)now.tv_nsec;
    struct record old = {(uint32_t)now.tv_sec, (uint32_t)(now.tv_nsec / NS_A_US), kept, len};
    struct ng_packet new = {PACKET, total, 0, (uint32_t)(ns >> 32), (uint32_t)ns, kept, len};
    memcpy(to, c->is_ng ? (void *)&new : (void *)&old, c->is_ng ? sizeof(new) : sizeof(old));
    return c->is_ng ? sizeof(new) : sizeof(old);
}

static void put_end(uint8_t *to, uint32_t padding, bool outbound, uint32_t total)
{
    struct ng_end end = {OPTION_FLAGS, sizeof(end.direction), outbound ? OUTBOUND : INBOUND, 0, total};
    memset(to, 0, padding);
    memcpy(to + padding, &end, sizeof(end));
}

bool capture_add(struct capture *c, vpci_mem *mem, const struct iovec *iov, uint32_t len, bool outbound)
{
    uint32_t kept = len < c->snaplen ? len : c->snaplen, padding = -kept & 3;
    size_t ng = sizeof(struct ng_packet) + padding + sizeof(struct ng_end);
    size_t total = kept + (c->is_ng ? ng : sizeof(struct record));
    pthread_mutex_lock(&c->lock);
    struct half *h = c->filling;
    bool fits = !c->error && h->n + total <= HALF_BYTES;
    if (fits) {
        uint8_t *to = h->bytes + h->n;
        to += put_head(c, to, kept, len, (uint32_t)total);
        vpci_guard(mem, gather, &(struct copied){to, iov, kept});
        if (c->is_ng)
            put_end(to + kept, padding, outbound, (uint32_t)total);
        h->n += total;
        pthread_cond_signal(&c->changed);
    }
    pthread_mutex_unlock(&c->lock);
    return fits;
}

static size_t put_header(const struct capture *c, uint8_t *to)
{
    struct file_header old = {MAGIC, MAJOR, MINOR, 0, 0, c->snaplen, ETHERNET};
    struct ng_header new = {
        .section = SECTION, .section_len = 28, .magic = BYTE_ORDER_MAGIC, .major = 1, .any_length = {~0u, ~0u},
        .section_len_again = 28, .interface = INTERFACE, .interface_len = 32, .linktype = ETHERNET,
        .snaplen = c->snaplen, .tsresol = OPTION_TSRESOL, .tsresol_len = 1, .ns = NANOSECONDS,
        .interface_len_again = 32,
    };
    memcpy(to, c->is_ng ? (void *)&new : (void *)&old, c->is_ng ? sizeof(new) : sizeof(old));
    return c->is_ng ? sizeof(new) : sizeof(old);
}

int capture_error(struct capture *c)
{
    pthread_mutex_lock(&c->lock);
    int error = c->error;
    pthread_mutex_unlock(&c->lock);
    return error;
}

struct capture *capture_new(const vpci_net_setup *setup, int event_fd)
{
    struct capture *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->fd = setup->capture;
    c->snaplen = setup->snaplen;
    c->is_ng = setup->pcapng;
    c->event_fd = event_fd;
    c->filling = c->halves;
    c->halves[0].bytes = malloc(HALF_BYTES);
    c->halves[1].bytes = malloc(HALF_BYTES);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    bool made = c->halves[0].bytes && c->halves[1].bytes;
    if (made) {
        c->filling->n = put_header(c, c->filling->bytes);
        made = !vpci_thread_start(&c->thread, run, c, "vpci-capture");
    }
    if (made)
        return c;
    free(c->halves[0].bytes);
    free(c->halves[1].bytes);
    free(c);
    return NULL;
}

void capture_free(struct capture *c)
{
    if (!c)
        return;
    pthread_mutex_lock(&c->lock);
    c->ending = true;
    pthread_cond_signal(&c->changed);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
    free(c->halves[0].bytes);
    free(c->halves[1].bytes);
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->lock);
    close(c->fd);
    free(c);
}
