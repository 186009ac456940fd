/* The pump's own front: a listening socket, one client at a time, and its messages in arrival order. The pump hands it
 * events and turns; it hands whole messages to messages.c, and bytes to conn.c. */
#include "pump.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

static bool has_hung_up(int fd)
{
    struct pollfd p = {.fd = fd};
    return poll(&p, 1, 0) > 0 && p.revents & POLLHUP;
}

/* A client that comes right after another went is not a second one: it waits in the backlog until the first one's
 * end, whose event may come later than its own, is dealt with. */
static void accept_client(struct vpci_dev *dev)
{
    dev->conn.hung_up = dev->conn.fd >= 0 && has_hung_up(dev->conn.fd);
    if (dev->conn.hung_up)
        return;
    int fd = accept4(dev->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    if (dev->conn.fd >= 0) {
        pump_turned_away(dev, fd);
        close(fd);
        return;
    }
    conn_open(&dev->conn, fd);
    pump_watch_for(dev, fd, EPOLLIN);
    dev->conn.armed = EPOLLIN;
    pump_connected(dev, fd);
}

static void lose_stream(struct vpci_dev *dev, uint64_t why, uint64_t detail)
{
    pump_note(dev, (vpci_event){.note = VPCI_NOTE_PROTOCOL, .a = why, .b = detail});
    dev->conn.gone = true;
}

static void receive(struct vpci_dev *dev)
{
    uint64_t detail = 0;
    int why = conn_receive(&dev->conn, &detail);
    if (why)
        lose_stream(dev, (uint64_t)why, detail);
}

static int event(void *state, int fd, uint32_t events)
{
    struct vpci_dev *dev = state;
    if (fd == dev->listen_fd)
        accept_client(dev);
    else if (fd == dev->conn.fd && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        receive(dev);
    return fd == dev->listen_fd || fd == dev->conn.fd;
}

static bool may_execute(const struct vpci_dev *dev)
{
    return dev->op == OP_NONE && dev->conn.fd >= 0 && !conn_congested(&dev->conn);
}

static void execute(void *state)
{
    struct vpci_dev *dev = state;
    struct message m;
    uint64_t detail = 0;
    int got = 1;
    if (dev->op != OP_NONE)
        conn_take_replies(&dev->conn, far_take_reply, dev);
    while (may_execute(dev) && got > 0)
        if (!message_go_on(dev) && (got = conn_next(&dev->conn, &m, &detail)) > 0)
            message_execute(dev, &m);
    if (got < 0)
        lose_stream(dev, (uint64_t)-got, detail);
    /* More than any message may bring, and none of them is whole: this one never will be. */
    else if (got == 0 && dev->conn.n_held > VFU_MAX_FDS)
        lose_stream(dev, VPCI_WHY_FDS, dev->conn.n_held);
}

static void send_replies(void *state)
{
    conn_send(&((struct vpci_dev *)state)->conn);
}

static void send_reply(void *state, uint32_t error, const void *a, size_t a_len, const void *b, size_t b_len)
{
    struct vpci_dev *dev = state;
    if (!conn_reply(&dev->conn, &dev->request, error, a, a_len, b, b_len))
        lose_stream(dev, VPCI_WHY_MEMORY, 0);
}

static void drop(void *state)
{
    struct vpci_dev *dev = state;
    dev->conn.gone |= dev->conn.fd >= 0;
    conn_close(&dev->conn);
}

static void at_rest(void *state)
{
    (void)state;
}

/* What was received before the peer went is executed first; then the connection closes. */
static void end_connection(struct vpci_dev *dev)
{
    if (!dev->conn.gone || dev->op != OP_NONE)
        return;
    conn_close(&dev->conn);
    dev->conn.gone = false;
    pump_begin_closing(dev);
}

static void settle(void *state)
{
    struct vpci_dev *dev = state;
    struct conn *c = &dev->conn;
    end_connection(dev);
    bool accepting = c->fd >= 0 ? !c->hung_up && !c->gone : dev->op == OP_NONE;
    if (accepting != dev->accepting)
        pump_watch_for(dev, dev->listen_fd, accepting ? EPOLLIN : 0);
    dev->accepting = accepting;
    if (c->fd < 0)
        return;
    if (c->gone) {
        /* A hang-up is reported whatever is asked for, and what is under way may take a while yet. */
        epoll_ctl(dev->epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
        return;
    }
    uint32_t want = (conn_has_room(c) ? EPOLLIN : 0u) | (c->tx_at < c->tx_end ? EPOLLOUT : 0u);
    if (want != c->armed)
        pump_watch_for(dev, c->fd, want);
    c->armed = want;
}

const vpci_front own_front = {
    .abi = VPCI_FRONT_ABI, .event = event, .execute = execute, .send = send_replies, .settle = settle,
    .reply = send_reply, .drop = drop, .at_rest = at_rest,
};
