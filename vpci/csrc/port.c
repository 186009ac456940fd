/* What is behind a network device: one port a descriptor, one table of operations a kind. net.c calls them on the
 * thread that has the queue; nothing here blocks. What the kernel does not take now, or has not got, is left with it. */
#include "port.h"

#include <arpa/inet.h>
#include <linux/if_tun.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

static bool would_block(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK;
}

/* The chain's memory vanished, or the frame is of a size or form that the backend does not take: nothing is lost but
 * this frame. */
static bool is_of_the_frame(int error)
{
    return error == EFAULT || error == EMSGSIZE || error == EINVAL || error == EIO || error == ENOBUFS ||
           error == ENOMEM;
}

static int fail_one(struct out *out, uint64_t *counter)
{
    ++*counter;
    out->failed = true;
    return 1;
}

/* ---- frames in a row of buffers: datagram sockets and TAP ---- */

static uint8_t *slot(struct port *p, size_t n)
{
    return p->in + n * VPCI_NET_FRAME_MAX;
}

static int next_in_row(struct port *p, struct frame *f)
{
    if (p->in_at == p->in_end)
        return 0;
    *f = (struct frame){.data = slot(p, p->in_at), .len = p->lens[p->in_at], .vnet = p->vnet};
    return 1;
}

static void drop_in_row(struct port *p)
{
    p->in_at++;
}

/* ---- a UNIX datagram socket ---- */

static int receive_batch(struct port *p)
{
    struct mmsghdr msgs[IN_BATCH];
    struct iovec iov[IN_BATCH];
    for (int i = 0; i < IN_BATCH; i++) {
        iov[i] = (struct iovec){slot(p, (size_t)i), VPCI_NET_FRAME_MAX};
        msgs[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &iov[i], .msg_iovlen = 1}};
    }
    int got = recvmmsg(p->fd, msgs, IN_BATCH, MSG_DONTWAIT, NULL);
    p->in_at = p->in_end = 0;
    for (int i = 0; i < got; i++) {
        bool cut = msgs[i].msg_hdr.msg_flags & MSG_TRUNC;
        p->stats->rx_too_long += cut;
        if (cut)
            continue;
        if (p->in_end != (size_t)i)
            memcpy(slot(p, p->in_end), slot(p, (size_t)i), msgs[i].msg_len);
        p->lens[p->in_end++] = msgs[i].msg_len;
    }
    return got;
}

/* An error of the socket only tells that the peer went: it is told once, and what came before is still there. */
static int datagram_next(struct port *p, struct frame *f)
{
    for (int tries = 0; p->in_at == p->in_end && p->readable && tries < IN_BATCH; tries++) {
        int got = receive_batch(p);
        p->readable = got == IN_BATCH || (got < 0 && !would_block());
    }
    return next_in_row(p, f);
}

/* The peer's address is looked up again whenever it was lost: whoever binds it next is the peer. */
static bool find_peer(struct port *p)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (!p->connected && p->peer) {
        strncpy(to.sun_path, p->peer, sizeof(to.sun_path) - 1);
        p->connected = !connect(p->fd, (struct sockaddr *)&to, sizeof(to));
    }
    return p->connected;
}

static int datagram_failed(struct port *p, struct out *out)
{
    if (would_block()) {
        p->blocked = true;
        return 0;
    }
    if (is_of_the_frame(errno))
        return fail_one(out, &p->stats->tx_errors);
    p->connected = false;
    return fail_one(out, &p->stats->tx_no_peer);
}

static int datagram_send(struct port *p, struct out *out, uint32_t n)
{
    struct mmsghdr msgs[OUT_BATCH];
    if (!find_peer(p))
        return fail_one(out, &p->stats->tx_no_peer);
    for (uint32_t i = 0; i < n; i++)
        msgs[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = out[i].iov + 1, .msg_iovlen = out[i].n_iov - 1}};
    int sent = sendmmsg(p->fd, msgs, n, MSG_DONTWAIT | MSG_NOSIGNAL);
    return sent > 0 ? sent : datagram_failed(p, out);
}

/* ---- QEMU's stream ---- */

/* A frame that is whole in the buffer. Returns 1, 0, or -EPROTO: no frame is that long, so this is no such stream. */
static int whole_frame(struct port *p, struct frame *f)
{
    uint32_t len;
    size_t have = p->in_end - p->in_at;
    if (have < sizeof(len))
        return 0;
    memcpy(&len, p->in + p->in_at, sizeof(len));
    len = ntohl(len);
    if (len > VPCI_NET_FRAME_MAX)
        return -EPROTO;
    if (have < sizeof(len) + len)
        return 0;
    *f = (struct frame){.data = p->in + p->in_at + sizeof(len), .len = len};
    return 1;
}

static int receive_more(struct port *p)
{
    memmove(p->in, p->in + p->in_at, p->in_end - p->in_at);
    p->in_end -= p->in_at;
    p->in_at = 0;
    size_t room = STREAM_BYTES - p->in_end;
    ssize_t got = recv(p->fd, p->in + p->in_end, room, MSG_DONTWAIT);
    if (got == 0)
        return -ECONNRESET;
    if (got < 0 && !would_block())
        return errno == EINTR ? 0 : -errno;
    /* Less than asked for: there is no more, and more will be an event of its own; but a hang-up was that already. */
    p->readable = got > 0 && ((size_t)got == room || p->hung_up);
    p->in_end += got > 0 ? (size_t)got : 0;
    return 0;
}

static int stream_next(struct port *p, struct frame *f)
{
    int rc;
    while (!(rc = whole_frame(p, f)) && p->readable)
        if ((rc = receive_more(p)))
            break;
    return rc;
}

static void stream_drop(struct port *p)
{
    uint32_t len;
    memcpy(&len, p->in + p->in_at, sizeof(len));
    p->in_at += sizeof(len) + ntohl(len);
}

/* Keep what the socket did not take of a frame, so that its chain need not wait: a reset must find none in flight, and
 * a stream that stops in the middle of a frame is none any more. */
static bool keep_rest(struct port *p, const struct out *out, size_t sent)
{
    uint32_t header = out->chain->out_len - out->len;
    size_t total = sizeof(out->prefix) + out->len;
    p->rest = calloc(1, total);
    if (!p->rest)
        return false;
    memcpy(p->rest, out->prefix, sizeof(out->prefix));
    vpci_chain_read(out->chain, header, p->rest + sizeof(out->prefix), out->len);
    if (out->csum)
        memcpy(p->rest + sizeof(out->prefix) + out->vnet.csum_start + out->vnet.csum_offset, &out->csum, 2);
    p->rest_at = sent;
    p->rest_end = total;
    return true;
}

/* Returns 1: nothing is left of it, 0: blocked, < 0: -errno. */
static int send_rest(struct port *p)
{
    while (p->rest) {
        ssize_t sent = send(p->fd, p->rest + p->rest_at, p->rest_end - p->rest_at, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0) {
            p->blocked = would_block();
            return p->blocked ? 0 : -errno;
        }
        p->rest_at += (size_t)sent;
        if (p->rest_at == p->rest_end) {
            free(p->rest);
            p->rest = NULL;
        }
    }
    return 1;
}

/* How many frames `sent` bytes are; the last one may be there in part, and is kept then. */
static int count_sent(struct port *p, struct out *out, uint32_t n, size_t sent)
{
    for (uint32_t i = 0; i < n; i++) {
        size_t total = sizeof(out[i].prefix) + out[i].len;
        if (sent < total) {
            p->blocked = true;
            if (sent && !keep_rest(p, &out[i], sent))
                return -ENOMEM;
            return (int)(i + (sent != 0));
        }
        sent -= total;
    }
    return (int)n;
}

static int stream_send(struct port *p, struct out *out, uint32_t n)
{
    int rc = send_rest(p);
    if (rc <= 0)
        return rc;
    struct msghdr m = {.msg_iov = out[0].iov};
    for (uint32_t i = 0; i < n; i++) {
        uint32_t len = htonl(out[i].len);
        memcpy(out[i].prefix, &len, sizeof(len));
        out[i].iov[0] = (struct iovec){out[i].prefix, sizeof(out[i].prefix)};
        m.msg_iovlen += out[i].n_iov;
    }
    ssize_t sent = sendmsg(p->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && would_block())
        p->blocked = true;
    if (sent < 0 && is_of_the_frame(errno))
        return n > 1 ? stream_send(p, out, 1) : fail_one(out, &p->stats->tx_errors);
    if (sent < 0)
        return p->blocked || errno == EINTR ? 0 : -errno;
    return count_sent(p, out, n, (size_t)sent);
}

/* ---- TAP ---- */

static int tap_receive(struct port *p)
{
    struct iovec iov[] = {{&p->vnet, sizeof(p->vnet)}, {p->in, VPCI_NET_FRAME_MAX}};
    bool vnet = p->ops->has_vnet;
    ssize_t got = readv(p->fd, vnet ? iov : iov + 1, vnet ? 2 : 1);
    if (got < 0) {
        p->readable = !would_block();
        return p->readable && errno != EINTR && errno != EIO ? -errno : 0;
    }
    p->in_at = 0;
    p->in_end = 1;
    p->lens[0] = (uint32_t)got - (vnet ? (uint32_t)sizeof(p->vnet) : 0);
    return 0;
}

static int tap_next(struct port *p, struct frame *f)
{
    int rc = 0;
    if (p->in_at == p->in_end && p->readable)
        rc = tap_receive(p);
    return rc ? rc : next_in_row(p, f);
}

static int tap_send(struct port *p, struct out *out, uint32_t n)
{
    bool vnet = p->ops->has_vnet;
    for (uint32_t i = 0; i < n; i++) {
        out[i].iov[0] = (struct iovec){&out[i].vnet, sizeof(out[i].vnet)};
        ssize_t sent = writev(p->fd, out[i].iov + !vnet, (int)(out[i].n_iov - !vnet));
        if (sent >= 0)
            continue;
        p->blocked = would_block();
        if (p->blocked)
            return (int)i;
        if (!is_of_the_frame(errno))
            return -errno;
        fail_one(&out[i], &p->stats->tx_errors);
    }
    return (int)n;
}

static void tap_offload(struct port *p, uint64_t bits)
{
    static const struct {
        int bit;
        unsigned long flag;
    } flags[] = {{VPCI_NET_F_GUEST_CSUM, TUN_F_CSUM}, {VPCI_NET_F_GUEST_TSO4, TUN_F_TSO4},
                 {VPCI_NET_F_GUEST_TSO6, TUN_F_TSO6}, {VPCI_NET_F_GUEST_ECN, TUN_F_TSO_ECN},
                 {VPCI_NET_F_GUEST_UFO, TUN_F_UFO}};
    unsigned long word = 0;
    for (size_t i = 0; i < ARRAY_LEN(flags); i++)
        word |= bits >> flags[i].bit & 1 ? flags[i].flag : 0;
    if (!(word & TUN_F_CSUM))
        word = 0;   /* the kernel segments and sums then */
    ioctl(p->fd, TUNSETOFFLOAD, word);   /* what this kernel refuses was not offered */
}

/* ---- loop and null ---- */

struct kept {
    struct kept *next;
    uint32_t len;
    uint8_t bytes[];
};

static int loop_next(struct port *p, struct frame *f)
{
    if (!p->first)
        return 0;
    *f = (struct frame){.data = p->first->bytes, .len = p->first->len};
    return 1;
}

static void loop_drop(struct port *p)
{
    struct kept *k = p->first;
    if (!(p->first = k->next))
        p->last = &p->first;
    p->n_kept--;
    free(k);
}

static void gather(uint8_t *to, const struct iovec *iov, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        memcpy(to, iov[i].iov_base, iov[i].iov_len);
        to += iov[i].iov_len;
    }
}

struct copy_out {
    struct kept *to;
    const struct out *from;
};

static void copy_out(void *arg)
{
    struct copy_out *c = arg;
    gather(c->to->bytes, c->from->iov + 1, c->from->n_iov - 1);
}

static void keep(struct port *p, struct out *out)
{
    struct kept *k = p->n_kept < VPCI_NET_BACKLOG ? calloc(1, sizeof(*k) + out->len) : NULL;
    if (!k) {
        p->stats->rx_backlog++;
        return;
    }
    k->len = out->len;
    vpci_guard(out->chain->queue->mem, copy_out, &(struct copy_out){k, out});
    *p->last = k;
    p->last = &k->next;
    p->n_kept++;
}

static int loop_send(struct port *p, struct out *out, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        keep(p, &out[i]);
    return (int)n;
}

static int null_next(struct port *p, struct frame *f)
{
    (void)p, (void)f;
    return 0;
}

static int null_send(struct port *p, struct out *out, uint32_t n)
{
    (void)p, (void)out;
    return (int)n;
}

/* ---- all of them ---- */

static const struct port_ops kinds[VPCI_PORT_KINDS] = {
    [VPCI_PORT_NULL] = {.next = null_next, .drop = drop_in_row, .send = null_send},
    [VPCI_PORT_LOOP] = {.next = loop_next, .drop = loop_drop, .send = loop_send},
    [VPCI_PORT_DATAGRAM] = {.has_fd = true, .next = datagram_next, .drop = drop_in_row, .send = datagram_send},
    [VPCI_PORT_STREAM] = {.has_fd = true, .next = stream_next, .drop = stream_drop, .send = stream_send,
                          .flush = send_rest},
    [VPCI_PORT_TAP] = {.has_fd = true, .next = tap_next, .drop = drop_in_row, .send = tap_send},
    [VPCI_PORT_TAP_VNET] = {.has_fd = true, .has_vnet = true, .next = tap_next, .drop = drop_in_row,
                            .send = tap_send, .offload = tap_offload},
};

static size_t in_bytes(uint32_t kind)
{
    static const size_t sizes[VPCI_PORT_KINDS] = {
        [VPCI_PORT_DATAGRAM] = (size_t)IN_BATCH * VPCI_NET_FRAME_MAX, [VPCI_PORT_STREAM] = STREAM_BYTES,
        [VPCI_PORT_TAP] = VPCI_NET_FRAME_MAX, [VPCI_PORT_TAP_VNET] = VPCI_NET_FRAME_MAX,
    };
    return sizes[kind];
}

int port_init(struct port *p, uint32_t kind, const char *peer, vpci_net_stats *stats)
{
    *p = (struct port){.ops = &kinds[kind], .stats = stats, .fd = -1};
    p->last = &p->first;
    p->in = in_bytes(kind) ? malloc(in_bytes(kind)) : NULL;
    p->peer = peer ? strdup(peer) : NULL;
    return (in_bytes(kind) && !p->in) || (peer && !p->peer) ? -ENOMEM : 0;
}

void port_clear(struct port *p)
{
    p->life++;
    p->readable = p->hung_up = p->blocked = p->connected = false;
    p->in_at = p->in_end = 0;
    free(p->rest);
    p->rest = NULL;
}

void port_fini(struct port *p)
{
    while (p->first)
        loop_drop(p);
    port_clear(p);
    if (p->fd >= 0)
        close(p->fd);
    free(p->in);
    free(p->peer);
}
