/* A network device's frames as a pcap file: net.c hands over frames, a thread writes them, for a disk may block and the
 * pump must not. What comes faster than it can be written is not in the file, and counted. [pcap-savefile(5)] */
#include "port.h"

#include <time.h>

enum { HALF_BYTES = 4 << 20, NS_A_US = 1000 };
enum { MAGIC = 0xa1b2c3d4u, MAJOR = 2, MINOR = 4, SNAPLEN = 262144, ETHERNET = 1 };

struct file_header {
    uint32_t magic;
    uint16_t major, minor;
    uint32_t zone, accuracy, snaplen, linktype;
};

struct record {
    uint32_t seconds, us, kept, len;
};

struct half {
    uint8_t *bytes;
    size_t n;
};

struct capture {
    int fd, event_fd;
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
    uint32_t n;
};

static void gather(void *arg)
{
    struct copied *c = arg;
    for (uint32_t i = 0; i < c->n; i++) {
        memcpy(c->to, c->iov[i].iov_base, c->iov[i].iov_len);
        c->to += c->iov[i].iov_len;
    }
}

bool capture_add(struct capture *c, vpci_mem *mem, const struct iovec *iov, uint32_t n, uint32_t len)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct record r = {(uint32_t)now.tv_sec, (uint32_t)(now.tv_nsec / NS_A_US), len, len};
    pthread_mutex_lock(&c->lock);
    struct half *h = c->filling;
    bool fits = !c->error && h->n + sizeof(r) + len <= HALF_BYTES;
    if (fits) {
        memcpy(h->bytes + h->n, &r, sizeof(r));
        vpci_guard(mem, gather, &(struct copied){h->bytes + h->n + sizeof(r), iov, n});
        h->n += sizeof(r) + len;
        pthread_cond_signal(&c->changed);
    }
    pthread_mutex_unlock(&c->lock);
    return fits;
}

int capture_error(struct capture *c)
{
    pthread_mutex_lock(&c->lock);
    int error = c->error;
    pthread_mutex_unlock(&c->lock);
    return error;
}

struct capture *capture_new(int fd, int event_fd)
{
    static const struct file_header header = {MAGIC, MAJOR, MINOR, 0, 0, SNAPLEN, ETHERNET};
    struct capture *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->fd = fd;
    c->event_fd = event_fd;
    c->filling = c->halves;
    c->halves[0].bytes = malloc(HALF_BYTES);
    c->halves[1].bytes = malloc(HALF_BYTES);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    bool made = c->halves[0].bytes && c->halves[1].bytes;
    if (made) {
        memcpy(c->filling->bytes, &header, sizeof(header));
        c->filling->n = sizeof(header);
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
