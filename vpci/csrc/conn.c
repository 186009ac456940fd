/* The client's socket: bytes and fds in, whole messages out to messages.c; replies gathered and sent with one call.
 * Nothing here blocks, and nothing looks into a message beyond its header. */
#include "pump.h"

#include <sys/socket.h>

void conn_init(struct conn *c)
{
    *c = (struct conn){.fd = -1};
}

void conn_open(struct conn *c, int fd)
{
    c->fd = fd;
    c->versioned = c->hung_up = c->gone = false;
    c->rx_at = c->rx_end = c->tx_at = c->tx_end = 0;
    c->n_tx_fds = 0;
    c->position = 0;
    c->armed = 0;
}

static void close_held(struct conn *c)
{
    for (uint32_t i = 0; i < c->n_held; i++)
        close(c->held[i].fd);
    c->n_held = 0;
}

void conn_close(struct conn *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    close_held(c);
}

void conn_fini(struct conn *c)
{
    conn_close(c);
    free(c->rx);
    free(c->tx);
}

static size_t pending(const struct conn *c)
{
    return c->rx_end - c->rx_at;
}

bool conn_has_room(const struct conn *c)
{
    return pending(c) < RX_MAX && c->n_held < MAX_HELD_FDS / 2;
}

/* Room for at least RX_MIN more bytes. */
static bool make_room(struct conn *c)
{
    if (c->rx_at && c->rx_cap - c->rx_end < RX_MIN) {
        memmove(c->rx, c->rx + c->rx_at, pending(c));
        c->rx_end -= c->rx_at;
        c->rx_at = 0;
    }
    if (c->rx_cap - c->rx_end >= RX_MIN)
        return true;
    size_t cap = c->rx_cap ? 2 * c->rx_cap : 2 * RX_MIN;
    uint8_t *rx = realloc(c->rx, cap);
    if (rx) {
        c->rx = rx;
        c->rx_cap = cap;
    }
    return rx;
}

/* A receive ends with the piece that carried fds, so they belong to the message that its last byte is in. */
static int hold_fds(struct conn *c, struct msghdr *msg, uint64_t position, uint64_t *detail)
{
    int why = msg->msg_flags & MSG_CTRUNC ? VPCI_WHY_FDS : VPCI_WHY_NONE;
    for (struct cmsghdr *cm = CMSG_FIRSTHDR(msg); cm; cm = CMSG_NXTHDR(msg, cm)) {
        if (cm->cmsg_level != SOL_SOCKET || cm->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (cm->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(cm) + i * sizeof(fd), sizeof(fd));
            if (c->n_held < MAX_HELD_FDS) {
                c->held[c->n_held++] = (struct held_fd){position, fd};
            } else {
                close(fd);
                why = VPCI_WHY_FDS;
            }
        }
        *detail = c->n_held;
    }
    return why;
}

int conn_receive(struct conn *c, uint64_t *detail)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(253 * sizeof(int))];   /* the kernel's own limit for one message */
    } control;
    if (!make_room(c))
        return VPCI_WHY_MEMORY;
    struct iovec iov = {c->rx + c->rx_end, c->rx_cap - c->rx_end};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(c->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return VPCI_WHY_NONE;
    if (got <= 0) {
        c->gone = true;
        return VPCI_WHY_NONE;
    }
    c->rx_end += (size_t)got;
    return hold_fds(c, &msg, c->position + pending(c) - 1, detail);
}

static void take_fds(struct conn *c, struct message *m, uint64_t end)
{
    uint32_t n = 0;
    while (n < c->n_held && c->held[n].position < end) {
        if (m->n_fds < VFU_MAX_FDS)
            m->fds[m->n_fds++] = c->held[n].fd;
        else
            close(c->held[n].fd), m->n_fds = VFU_MAX_FDS + 1;
        n++;
    }
    c->n_held -= n;
    memmove(c->held, c->held + n, c->n_held * sizeof(c->held[0]));
}

int conn_next(struct conn *c, struct message *m, uint64_t *detail)
{
    if (pending(c) < sizeof(m->h))
        return 0;
    memcpy(&m->h, c->rx + c->rx_at, sizeof(m->h));
    if (m->h.size < sizeof(m->h) || m->h.size > VFU_MAX_MESSAGE) {
        *detail = m->h.size;
        return -VPCI_WHY_SIZE;
    }
    if (pending(c) < m->h.size)
        return 0;
    m->data = c->rx + c->rx_at + sizeof(m->h);
    m->len = m->h.size - (uint32_t)sizeof(m->h);
    m->n_fds = 0;
    c->rx_at += m->h.size;
    c->position += m->h.size;
    take_fds(c, m, c->position);
    if (c->rx_at == c->rx_end)
        c->rx_at = c->rx_end = 0;   /* the bytes stay where m->data points until the next receive */
    return 1;
}

void message_close(struct message *m)
{
    for (uint32_t i = 0; i < m->n_fds && i < VFU_MAX_FDS; i++)
        if (m->fds[i] >= 0)
            close(m->fds[i]);
    m->n_fds = 0;
}

static bool tx_room(struct conn *c, size_t more)
{
    if (c->tx_at == c->tx_end)
        c->tx_at = c->tx_end = 0;
    if (c->tx_cap - c->tx_end >= more)
        return true;
    size_t cap = 2 * (c->tx_end + more);
    uint8_t *tx = realloc(c->tx, cap);
    if (tx) {
        c->tx = tx;
        c->tx_cap = cap;
    }
    return tx;
}

static void put(struct conn *c, const void *data, size_t len)
{
    if (len)
        memcpy(c->tx + c->tx_end, data, len);
    c->tx_end += len;
}

bool conn_request(struct conn *c, const struct vfu_header *header, const void *a, size_t a_len, const void *b,
                  size_t b_len)
{
    struct vfu_header h = *header;
    h.size = (uint32_t)(sizeof(h) + a_len + b_len);
    if (!tx_room(c, h.size))
        return false;
    put(c, &h, sizeof(h));
    put(c, a, a_len);
    put(c, b, b_len);
    return true;
}

bool conn_reply(struct conn *c, const struct vfu_header *request, uint32_t error, const void *a, size_t a_len,
                const void *b, size_t b_len)
{
    struct vfu_header h = {
        .id = request->id, .command = request->command, .flags = VFU_F_REPLY | (error ? VFU_F_ERROR : 0u),
        .error = error,
    };
    if (c->fd < 0 || request->flags & VFU_F_NO_REPLY)
        return true;
    return conn_request(c, &h, a, a_len, b, b_len);
}

bool conn_reply_fds(struct conn *c, const struct vfu_header *request, const void *a, size_t a_len, const void *b,
                    size_t b_len, const int *fds, uint32_t n_fds)
{
    size_t at = c->tx_at == c->tx_end ? 0 : c->tx_end;
    if (!conn_reply(c, request, 0, a, a_len, b, b_len))
        return false;
    c->tx_fds_at = at;
    c->n_tx_fds = n_fds;
    memcpy(c->tx_fds, fds, n_fds * sizeof(*fds));
    return true;
}

/* Bytes [at, at + len) of the receive buffer go; what comes after them moves up in the stream, its fds too. */
static void cut(struct conn *c, size_t at, size_t len)
{
    uint64_t end = c->position + (at - c->rx_at) + len;
    memmove(c->rx + at, c->rx + at + len, c->rx_end - at - len);
    c->rx_end -= len;
    for (uint32_t i = 0; i < c->n_held; i++)
        if (c->held[i].position >= end)
            c->held[i].position -= len;
}

void conn_take_replies(struct conn *c, bool (*take)(struct vpci_dev *dev, const struct message *m), struct vpci_dev *dev)
{
    struct message m = {.n_fds = 0};
    for (size_t at = c->rx_at; c->rx_end - at >= sizeof(m.h);) {
        memcpy(&m.h, c->rx + at, sizeof(m.h));
        if (m.h.size < sizeof(m.h) || m.h.size > VFU_MAX_MESSAGE || c->rx_end - at < m.h.size)
            return;
        m.data = c->rx + at + sizeof(m.h);
        m.len = m.h.size - (uint32_t)sizeof(m.h);
        if ((m.h.flags & VFU_F_TYPE_MASK) == VFU_F_REPLY && take(dev, &m))
            cut(c, at, m.h.size);
        else
            at += m.h.size;
    }
}

/* What is before the byte with fds goes by itself, so that they come with the message that they belong to. */
static ssize_t send_some(struct conn *c)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(VFU_MAX_FDS * sizeof(int))];
    } control;
    bool with_fds = c->n_tx_fds && c->tx_at == c->tx_fds_at;
    size_t end = c->n_tx_fds && c->tx_at < c->tx_fds_at ? c->tx_fds_at : c->tx_end;
    struct iovec iov = {c->tx + c->tx_at, end - c->tx_at};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (with_fds) {
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(c->n_tx_fds * sizeof(int));
        struct cmsghdr *cm = CMSG_FIRSTHDR(&msg);
        *cm = (struct cmsghdr){CMSG_LEN(c->n_tx_fds * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(cm), c->tx_fds, c->n_tx_fds * sizeof(int));
    }
    ssize_t n = sendmsg(c->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0 && with_fds)
        c->n_tx_fds = 0;
    return n;
}

void conn_send(struct conn *c)
{
    while (c->fd >= 0 && c->tx_at < c->tx_end) {
        ssize_t n = send_some(c);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            c->gone = true;
        if (n < 0)
            return;
        c->tx_at += (size_t)n;
    }
}

bool conn_congested(const struct conn *c)
{
    return c->tx_end - c->tx_at > TX_HIGH;
}
