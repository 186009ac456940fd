/* The network engine: it has all queues of a network device, takes chains when it has a use for them, and holds none
 * between two calls. The pump asks it, port.c speaks to the backend; the control queue's chains go on to Python.
 *
 * Receiving copies each frame once, from the port's buffer: what is let through, and how many buffers it takes, is judged
 * before guest memory is touched. Sending copies nothing. State is touched with dev->awake held, and what belongs to a
 * queue by that queue's own calls only: in take() the lock may be let go of, for far memory. */
#include "port.h"

#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

enum { HEADER = 10, HEADER_MRG = 12, GSO_NONE = 0, GSO_ECN = 0x80 };
enum { NEEDS_CSUM = 1, DATA_VALID = 2 };
enum { LOOK_FRAMES = 64, LOOK_BYTES = 1 << 20, MAX_CHAINS = 1024, ARENA = 1024, MAX_PIECES = 256 };
enum { ETH_TYPE = 12, ETH_TAGGED = 18, VLAN_TAG = 0x8100, IP4 = 0x0800, IP6 = 0x86dd };
enum { FLOWS = 1024, FLOW_BYTES = 96 };

/* A batch on its way out. */
struct tx {
    struct out out[OUT_BATCH];
    uint32_t n;
    vpci_chain *bad;              /* taken behind them, and to be dropped */
    struct iovec arena[ARENA];    /* of all frames, one behind the other */
    uint32_t n_iov;
    uint8_t *flat;                /* the one frame of the batch that lies in too many pieces */
    bool flat_used;
};

/* What belongs to a pair's queues. */
struct pair {
    struct tx tx;
    vpci_chain *chains[MAX_CHAINS];   /* of the frame that is being received */
};

/* Frames that came out of a port together, each for one pair: they stay in the port's buffer until the last is done
 * with, so that each pair gets its share in one batch. A pair without buffers holds up what comes behind them. */
struct batch {
    struct frame frames[LOOK_FRAMES];
    uint8_t pairs[LOOK_FRAMES];
    uint8_t states[LOOK_FRAMES];      /* enum frame_state */
    uint32_t n, n_left;               /* there, and not DONE */
    uint32_t n_held;                  /* on their way, also of the life before */
    uint32_t life;                    /* the port's */
};

enum frame_state { WAITING, HELD, DONE };

struct vpci_net {
    vpci_dev *dev;
    uint32_t n_pairs, n_ports;
    uint32_t n_used;              /* pairs that the driver uses */
    uint8_t flows[FLOWS];         /* the pair that sent last, plus 1; 0: none did */
    struct port *ports;
    struct batch *batches;        /* one a port */
    struct pair **pairs;
    vpci_handoff *control;
    uint64_t features;
    uint64_t offloads;            /* what the guest takes now */
    uint64_t applied;             /* and what the ports were told */
    uint32_t header;              /* bytes before each frame */
    bool link;
    int event_fd;
    struct capture *capture;      /* NULL: none */
    bool capture_told;
    vpci_net_troubles troubles;
    vpci_net_filter filter;
    vpci_net_stats stats;
};

static bool has(uint64_t bits, int bit)
{
    return bits >> bit & 1;
}

static uint32_t control_index(const struct vpci_net *net)
{
    return has(net->features, VPCI_NET_F_MQ) ? 2 * net->n_pairs : 2;
}

static struct port *port_of(struct vpci_net *net, uint32_t pair)
{
    return &net->ports[net->n_ports > 1 ? pair : 0];
}

static struct batch *batch_of(const struct vpci_net *net, const struct port *p)
{
    return &net->batches[p - net->ports];
}

/* Then whose frames they are was asked to look, and kicks when it has buffers for them. */
static bool has_frames(const struct vpci_net *net, const struct port *p)
{
    const struct batch *b = batch_of(net, p);
    return b->n_left && b->life == p->life;
}

static bool is_plugged(const struct port *p)
{
    return !p->ops->has_fd || p->fd >= 0;
}

/* ---- ports ---- */

static void look_at_rx(struct vpci_net *net, const struct port *p)
{
    if (net->dev)
        watch_look(net->dev, (uint32_t)(2 * (p - net->ports)));
}

static void look_at_all_rx(struct vpci_net *net)
{
    for (uint32_t i = 0; net->dev && i < net->n_pairs; i++)
        watch_look(net->dev, 2 * i);
}

static void look_at_tx(struct vpci_net *net)
{
    for (uint32_t i = 0; i < net->n_pairs; i++)
        watch_look(net->dev, 2 * i + 1);
}

static void unplug(struct vpci_net *net, struct port *p)
{
    if (p->fd < 0)
        return;
    if (net->dev)
        watch_remove(net->dev, p->fd);
    close(p->fd);
    p->fd = -1;
    port_clear(p);
    if (net->dev)
        look_at_tx(net);
}

static void tell_trouble(struct vpci_net *net, int32_t *which, int error)
{
    uint64_t one = 1;
    *which = error;
    ssize_t n = write(net->event_fd, &one, sizeof(one));
    (void)n;
}

static void lose(struct vpci_net *net, struct port *p, int error)
{
    net->stats.lost++;
    unplug(net, p);
    tell_trouble(net, &net->troubles.lost, -error);
}

static const vpci_engine engine;

static void watch(struct vpci_net *net, struct port *p)
{
    uint32_t events = EPOLLIN | EPOLLRDHUP | (p->blocked ? (uint32_t)EPOLLOUT : 0u);
    int rc = watch_add(net->dev, &engine, net, p->fd, events);
    if (rc < 0)
        lose(net, p, rc);
}

static void unblock(struct vpci_net *net, struct port *p)
{
    p->blocked = false;
    int rc = p->ops->flush ? p->ops->flush(p) : 0;
    if (rc < 0) {
        lose(net, p, rc);
        return;
    }
    watch(net, p);
    if (!p->blocked)
        look_at_tx(net);
}

static void event(void *state, const vpci_host *host, int fd, uint32_t events)
{
    struct vpci_net *net = state;
    (void)host;
    for (uint32_t i = 0; i < net->n_ports; i++) {
        struct port *p = &net->ports[i];
        if (p->fd != fd)
            continue;
        p->hung_up |= (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
        p->readable |= (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
        if (p->readable && !has_frames(net, p))
            look_at_rx(net, p);
        if (p->blocked && events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
            unblock(net, p);
    }
}

/* ---- what is let through ---- */

static bool is_listed(const uint8_t *table, uint32_t n, const uint8_t *mac)
{
    for (uint32_t i = 0; i < n; i++)
        if (!memcmp(table + 6 * i, mac, 6))
            return true;
    return false;
}

static bool vlan_passes(const vpci_net_filter *f, const struct frame *frame)
{
    const uint8_t *d = frame->data;
    if (f->all_vlans || frame->len < ETH_TAGGED || (d[ETH_TYPE] << 8 | d[ETH_TYPE + 1]) != VLAN_TAG)
        return true;
    uint32_t id = (uint32_t)(d[14] << 8 | d[15]) & 0xfff;
    return f->vlans[id / 8] >> (id & 7) & 1;
}

static bool group_passes(const vpci_net_filter *f, const uint8_t *mac)
{
    static const uint8_t broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    if (!memcmp(mac, broadcast, 6))
        return !f->nobcast;
    return !f->nomulti && (f->allmulti || is_listed(f->multicast, f->n_multicast, mac));
}

static bool passes(const vpci_net_filter *f, const struct frame *frame)
{
    const uint8_t *mac = frame->data;
    if (f->promisc)
        return true;
    if (!vlan_passes(f, frame))
        return false;
    if (mac[0] & 1)
        return group_passes(f, mac);
    return !f->nouni && (f->alluni || !memcmp(f->mac, mac, 6) || is_listed(f->unicast, f->n_unicast, mac));
}

/* ---- which pair: where several share a port, the one that sent last to where the frame comes from ---- */

static uint32_t mix(uint32_t hash, uint32_t word)
{
    hash = (hash ^ word) * 0x9e3779b1u;   /* 2^32 by the golden ratio */
    return hash ^ hash >> 15;
}

/* The same for both directions. */
static uint32_t mix_ends(uint32_t hash, const uint8_t *from, const uint8_t *to, uint32_t n)
{
    for (uint32_t i = 0; i + 1 < n; i += 2)
        hash = mix(hash, (uint32_t)(from[i] ^ to[i]) << 8 | (from[i + 1] ^ to[i + 1]));
    return hash;
}

static uint32_t word_at(const uint8_t *p)
{
    return (uint32_t)(p[0] << 8 | p[1]);
}

/* `head`: bytes of the IP header, or 0: this is none; `from`: where the addresses are, `size` bytes each. */
static uint32_t flow_of_ip(const uint8_t *ip, uint32_t len, uint32_t head, uint32_t from, uint32_t size, uint8_t protocol)
{
    uint32_t hash = mix_ends(protocol, ip + from, ip + from + size, size);
    bool whole = size > 4 || !(word_at(ip + 6) & 0x3fff);   /* fragments of one packet must not part */
    bool has_ports = (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP) && whole && len >= head + 4;
    return has_ports ? mix_ends(hash, ip + head, ip + head + 2, 2) : hash;
}

uint32_t vpci_net_flow(const uint8_t *frame, uint32_t len)
{
    uint32_t at = len >= ETH_TAGGED && word_at(frame + ETH_TYPE) == VLAN_TAG ? ETH_TAGGED : VPCI_NET_FRAME_MIN;
    uint32_t type = word_at(frame + at - 2), n = len - at;
    const uint8_t *ip = frame + at;
    if (type == IP4 && n >= 20)
        return flow_of_ip(ip, n, (ip[0] & 15u) * 4, 12, 4, ip[9]);
    if (type == IP6 && n >= 40)
        return flow_of_ip(ip, n, 40, 8, 16, ip[6]);
    return mix_ends(type, frame, frame + 6, 6);
}

static bool is_steered(const struct vpci_net *net)
{
    return net->n_ports == 1 && net->n_used > 1;
}

static uint32_t steer(const struct vpci_net *net, const struct frame *f)
{
    if (!is_steered(net) || f->len < VPCI_NET_FRAME_MIN)
        return 0;
    uint32_t flow = vpci_net_flow(f->data, f->len), pair = net->flows[flow % FLOWS];
    return pair ? pair - 1 : flow / FLOWS % net->n_used;
}

static void learn(struct vpci_net *net, const vpci_host *host, const vpci_chain *chain, uint32_t pair)
{
    uint8_t head[FLOW_BYTES];
    uint32_t len = host->read(chain, net->header, head, sizeof(head));
    if (len >= VPCI_NET_FRAME_MIN)
        net->flows[vpci_net_flow(head, len) % FLOWS] = (uint8_t)(pair + 1);
}

/* Fewer pairs may be in use than when the frame came. */
static uint32_t pair_of(const struct vpci_net *net, const struct port *p, uint32_t i)
{
    uint32_t pair = batch_of(net, p)->pairs[i];
    return net->n_ports > 1 ? (uint32_t)(p - net->ports) : pair < net->n_used ? pair : 0;
}

/* ---- receiving ---- */

static bool may_be_offloaded(uint64_t offloads, const struct vnet_header *h)
{
    static const uint8_t bit_of[] = {[1] = VPCI_NET_F_GUEST_TSO4, [3] = VPCI_NET_F_GUEST_UFO,
                                     [4] = VPCI_NET_F_GUEST_TSO6};
    uint8_t type = h->gso_type & (uint8_t)~GSO_ECN;
    if (h->flags & NEEDS_CSUM && !has(offloads, VPCI_NET_F_GUEST_CSUM))
        return false;
    if (h->gso_type & GSO_ECN && !has(offloads, VPCI_NET_F_GUEST_ECN))
        return false;
    return type == GSO_NONE || (type < sizeof(bit_of) && bit_of[type] && has(offloads, bit_of[type]));
}

static void give_empty(const vpci_host *host, vpci_chain **chains, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        host->done(chains[i], 0);
}

/* Chains with room for n bytes, 1 or, with MRG_RXBUF, as many as it takes. Returns how many; their room in *room. A frame
 * lies in chains that follow each other, so one that is no buffer goes back empty with those that were taken before it:
 * else it would stand in the way of every long frame. */
static uint32_t take_chains(struct vpci_net *net, const vpci_host *host, vpci_queue *q, vpci_chain **chains, uint64_t n,
                            uint64_t *room)
{
    uint32_t most = has(net->features, VPCI_NET_F_MRG_RXBUF) ? MAX_CHAINS : 1, taken = 0;
    for (*room = 0; *room < n && taken < most;) {
        vpci_chain *chain = host->take(q);
        if (!chain)
            break;
        bool bad = chain->error || chain->in_len < (taken ? 1 : net->header);
        chains[taken++] = chain;
        *room = bad ? 0 : *room + chain->in_len;
        if (bad) {
            net->stats.rx_bad_buffer++;
            give_empty(host, chains, taken);
            taken = 0;
        }
    }
    return taken;
}

static void fill(const struct vpci_net *net, const vpci_host *host, vpci_chain **chains, uint32_t n,
                 const struct frame *f)
{
    uint8_t header[HEADER_MRG] = {0};
    uint16_t num_buffers = (uint16_t)n;
    memcpy(header, &f->vnet, HEADER);
    header[0] &= has(net->offloads, VPCI_NET_F_GUEST_CSUM) ? NEEDS_CSUM | DATA_VALID : 0;
    memcpy(header + HEADER, &num_buffers, sizeof(num_buffers));
    host->write(chains[0], 0, header, net->header);
    for (uint32_t i = 0, at = 0, skip = net->header; i < n; i++, skip = 0) {
        uint32_t room = chains[i]->in_len - skip, now = f->len - at < room ? f->len - at : room;
        host->write(chains[i], skip, f->data + at, now);
        host->done(chains[i], skip + now);
        at += now;
    }
}

static void keep_frame(struct vpci_net *net, const vpci_queue *q, const struct iovec *iov, uint32_t len)
{
    if (!net->capture)
        return;
    bool kept = capture_add(net->capture, q->mem, iov, len, q->index % 2);
    ++*(kept ? &net->stats.captured : &net->stats.not_captured);
}

enum verdict { TAKEN, STARVED };

static enum verdict deliver(struct vpci_net *net, const vpci_host *host, vpci_queue *q, const struct frame *f)
{
    vpci_chain **chains = net->pairs[q->index / 2]->chains;
    uint64_t need = (uint64_t)net->header + f->len, room;
    uint32_t n = take_chains(net, host, q, chains, need, &room), most = q->size < MAX_CHAINS ? q->size : MAX_CHAINS;
    if (room < need) {
        bool may_grow = !n || (has(net->features, VPCI_NET_F_MRG_RXBUF) && n < most);
        ++*(may_grow ? &net->stats.rx_starved : &net->stats.rx_too_long);
        while (n)
            host->put_back(q, chains[--n]);
        return may_grow ? STARVED : TAKEN;
    }
    net->stats.rx_frames++;
    net->stats.rx_bytes += f->len;
    keep_frame(net, q, &(struct iovec){(void *)(uintptr_t)f->data, f->len}, f->len);
    fill(net, host, chains, n, f);
    return TAKEN;
}

/* Why a frame is not for the guest: the counter of the reason, or NULL. */
static uint64_t *refusal(struct vpci_net *net, const vpci_queue *q, const struct frame *f)
{
    if (!net->link || !q->started || q->broken)
        return &net->stats.rx_not_ready;
    if (f->len < VPCI_NET_FRAME_MIN)
        return &net->stats.rx_short;
    if (!passes(&net->filter, f))
        return &net->stats.rx_filtered;
    return may_be_offloaded(net->offloads, &f->vnet) ? NULL : &net->stats.rx_bad_offload;
}

/* With the last one all of the batch leave the port's buffer. */
static void end_frame(struct port *p, struct batch *b, uint32_t i)
{
    b->states[i] = DONE;
    if (--b->n_left)
        return;
    for (; b->n; b->n--)
        p->ops->drop(p);
}

/* Does the frame come to its end? Returns false when it has to wait. What was plugged in may go meanwhile. */
static bool hand_over(struct vpci_net *net, const vpci_host *host, vpci_queue *q, struct port *p, uint32_t i)
{
    struct batch *b = batch_of(net, p);
    const struct frame f = b->frames[i];
    uint32_t life = p->life;
    b->states[i] = HELD;
    b->n_held++;
    uint64_t *reason = refusal(net, q, &f);
    if (reason)
        ++*reason;
    bool ended = reason || deliver(net, host, q, &f) == TAKEN;
    if (!ended && (q->broken || !q->started)) {
        net->stats.rx_not_ready++;   /* since this very frame */
        ended = true;
    }
    b->n_held--;
    if (p->life == life && ended)
        end_frame(p, b, i);
    else if (p->life == life)
        b->states[i] = WAITING;
    return ended || p->life != life;
}

/* A batch, if the last one is done with, for `pair` and others. Returns whether frames are there: 1, 0, or < 0: what was
 * plugged in is lost. */
static int refill(struct vpci_net *net, struct port *p, uint32_t pair)
{
    struct batch *b = batch_of(net, p);
    if (b->life != p->life)
        b->n = b->n_left = 0;
    b->life = p->life;
    if (b->n_left || b->n_held)
        return b->n_left != 0;   /* whoever has one of a life that is over goes on when it is done */
    int got = is_plugged(p) ? p->ops->next(p, b->frames, LOOK_FRAMES) : 0;
    if (got < 0)
        lose(net, p, got);
    b->n = b->n_left = got > 0 ? (uint32_t)got : 0;
    for (uint32_t i = 0; i < b->n; i++) {
        b->states[i] = WAITING;
        b->pairs[i] = (uint8_t)steer(net, &b->frames[i]);
        if (pair_of(net, p, i) != pair)
            watch_look(net->dev, 2 * pair_of(net, p, i));
    }
    return got < 0 ? got : got > 0;
}

struct share {
    uint32_t n;
    uint64_t bytes;
};

static bool is_enough(const struct share *share)
{
    return share->n >= LOOK_FRAMES || share->bytes >= LOOK_BYTES;
}

/* The frames of the batch that are this queue's, or as many as one look may take. Returns false when one has to wait. */
static bool take_share(struct vpci_net *net, const vpci_host *host, vpci_queue *q, struct port *p,
                       struct share *share)
{
    struct batch *b = batch_of(net, p);
    for (uint32_t i = 0; i < b->n && b->life == p->life && !is_enough(share); i++) {
        if (b->states[i] != WAITING || pair_of(net, p, i) != q->index / 2u)
            continue;
        share->n++;
        share->bytes += b->frames[i].len;
        if (!hand_over(net, host, q, p, i))
            return false;
    }
    return true;
}

static uint32_t receive(struct vpci_net *net, const vpci_host *host, vpci_queue *q, struct port *p)
{
    const struct batch *b = batch_of(net, p);
    struct share share = {0};
    while (!is_enough(&share)) {
        int rc = refill(net, p, q->index / 2);
        if (rc <= 0)
            return rc == 0 && p->readable && is_plugged(p) && !b->n_held ? VPCI_RUN_MORE : VPCI_RUN_QUIET;
        if (!take_share(net, host, q, p, &share))
            return VPCI_RUN_KICKS;
        if (has_frames(net, p) && !is_enough(&share))
            return VPCI_RUN_QUIET;   /* whoever ends the last one goes on */
    }
    return VPCI_RUN_MORE;
}

/* ---- checksums ---- */

/* Words as they lie in memory; the sum of bytes that begin at an odd place is the one with its bytes exchanged. */
static uint32_t sum_of(const uint8_t *p, size_t n)
{
    uint64_t sum = 0;
    for (uint32_t w; n >= sizeof(w); p += sizeof(w), n -= sizeof(w)) {
        memcpy(&w, p, sizeof(w));
        sum += w;
    }
    uint8_t tail[4] = {0};
    uint32_t w;
    memcpy(tail, p, n);
    memcpy(&w, tail, sizeof(w));
    sum += w;
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint32_t)((sum & 0xffff) + (sum >> 16));
}

uint16_t vpci_net_sum(const struct iovec *iov, uint32_t n, uint32_t from)
{
    uint32_t sum = 0;
    bool odd = false;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t skip = from < iov[i].iov_len ? from : (uint32_t)iov[i].iov_len;
        size_t len = iov[i].iov_len - skip;
        uint32_t part = sum_of((const uint8_t *)iov[i].iov_base + skip, len);
        part = (part & 0xffff) + (part >> 16);
        sum += odd ? (uint16_t)(part << 8 | part >> 8) : part;
        odd ^= len & 1;
        from -= skip;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

struct summing {
    struct out *out;
    uint16_t sum;
};

static void sum_frame(void *arg)
{
    struct summing *s = arg;
    s->sum = vpci_net_sum(s->out->iov + 1, s->out->n_iov - 1, s->out->vnet.csum_start);
}

/* Have a piece begin at this byte of the frame; there is room for it behind the last piece. */
static void cut_at(struct out *out, uint32_t off)
{
    uint32_t i = 1;
    for (; i < out->n_iov && off >= out->iov[i].iov_len; i++)
        off -= (uint32_t)out->iov[i].iov_len;
    if (i == out->n_iov || !off)
        return;
    memmove(&out->iov[i + 1], &out->iov[i], (out->n_iov++ - i) * sizeof(*out->iov));
    out->iov[i].iov_len = off;
    out->iov[i + 1].iov_base = (uint8_t *)out->iov[i + 1].iov_base + off;
    out->iov[i + 1].iov_len -= off;
}

/* The driver left the checksum to us, and the backend knows no header. The guest's memory is not written: the two bytes
 * are ours, between the pieces before and behind them. */
static void complete_checksum(struct vpci_net *net, struct out *out)
{
    struct summing s = {.out = out};
    uint32_t at = (uint32_t)out->vnet.csum_start + out->vnet.csum_offset, off = 0;
    vpci_guard(out->chain->queue->mem, sum_frame, &s);
    out->csum = s.sum == 0xffff ? 0xffff : (uint16_t)~s.sum;   /* 0 would say that there is none */
    cut_at(out, at);
    cut_at(out, at + 2);
    for (uint32_t i = 1; i < out->n_iov; off += (uint32_t)out->iov[i++].iov_len)
        if (off >= at && off < at + 2)
            out->iov[i].iov_base = (uint8_t *)&out->csum + (off - at);
    net->stats.checksums++;
}

/* ---- sending ---- */

/* The old bit GSO stands for every type. */
static bool may_segment(uint64_t features, uint8_t type)
{
    static const uint8_t bit_of[] = {[1] = VPCI_NET_F_HOST_TSO4, [3] = VPCI_NET_F_HOST_UFO, [4] = VPCI_NET_F_HOST_TSO6};
    return type < sizeof(bit_of) && bit_of[type] && (has(features, bit_of[type]) || has(features, VPCI_NET_F_GSO));
}

static bool offload_is_sound(const struct vpci_net *net, const struct port *p, const struct out *out)
{
    const struct vnet_header *h = &out->vnet;
    uint8_t type = h->gso_type & (uint8_t)~GSO_ECN;
    if (h->flags & NEEDS_CSUM && (!has(net->features, VPCI_NET_F_CSUM) ||
                                  (uint32_t)h->csum_start + h->csum_offset + 2 > out->len))
        return false;
    if (h->gso_type & GSO_ECN && !has(net->features, VPCI_NET_F_HOST_ECN) && !has(net->features, VPCI_NET_F_GSO))
        return false;
    if (type == GSO_NONE)
        return h->gso_type == GSO_NONE;
    return p->ops->has_vnet && h->flags & NEEDS_CSUM && may_segment(net->features, type);
}

/* Why a chain is not sent: the counter of the reason, or NULL; header and length are in *out then. */
static uint64_t *judge(struct vpci_net *net, const vpci_host *host, const struct port *p, vpci_chain *chain,
                       struct out *out)
{
    *out = (struct out){.chain = chain, .len = chain->out_len - net->header};
    if (chain->error || chain->out_len < net->header + VPCI_NET_FRAME_MIN ||
        host->read(chain, 0, &out->vnet, HEADER) < HEADER)
        return &net->stats.tx_short;
    out->vnet.flags &= NEEDS_CSUM;   /* that a checksum was checked is not for a driver to say */
    if (out->len > VPCI_NET_FRAME_MAX)
        return &net->stats.tx_too_long;
    return offload_is_sound(net, p, out) ? NULL : &net->stats.tx_bad_offload;
}

static void add_pieces(struct tx *tx, struct out *out, const struct iovec *iov, uint32_t n, size_t skip)
{
    out->iov = &tx->arena[tx->n_iov];
    out->n_iov = 1;
    for (uint32_t i = 0; i < n; i++) {
        size_t cut = skip < iov[i].iov_len ? skip : iov[i].iov_len;
        skip -= cut;
        if (cut < iov[i].iov_len)
            out->iov[out->n_iov++] = (struct iovec){(uint8_t *)iov[i].iov_base + cut, iov[i].iov_len - cut};
    }
}

/* Returns false when the batch has no room for it. */
static bool add_frame(struct vpci_net *net, const vpci_host *host, const struct port *p, struct tx *tx, struct out *out)
{
    uint32_t pieces = out->chain->out_iovs;
    bool flat = pieces > MAX_PIECES;
    if (tx->n_iov + (flat ? 1 : pieces) + 3 > ARENA || (flat && tx->flat_used))
        return false;
    if (flat && !tx->flat && !(tx->flat = malloc(VPCI_NET_FRAME_MAX)))
        return false;
    struct iovec whole = {tx->flat, out->len};
    if (flat)
        host->read(out->chain, net->header, tx->flat, out->len);
    tx->flat_used |= flat;
    add_pieces(tx, out, flat ? &whole : out->chain->iov, flat ? 1 : pieces, flat ? 0 : net->header);
    if (out->vnet.flags & NEEDS_CSUM && !p->ops->has_vnet)
        complete_checksum(net, out);
    tx->n_iov += out->n_iov;
    tx->n++;
    return true;
}

/* A batch of sound frames; the first chain that is none ends it, for chains can only be put back in order. */
static void collect(struct vpci_net *net, const vpci_host *host, vpci_queue *q, const struct port *p, struct tx *tx)
{
    tx->n = tx->n_iov = 0;
    tx->bad = NULL;
    tx->flat_used = false;
    for (vpci_chain *chain; tx->n < OUT_BATCH && (chain = host->take(q));) {
        struct out *out = &tx->out[tx->n];
        uint64_t *reason = judge(net, host, p, chain, out);
        if (reason) {
            ++*reason;
            tx->bad = chain;
            return;
        }
        if (is_steered(net))
            learn(net, host, chain, q->index / 2u);
        if (!add_frame(net, host, p, tx, out)) {
            host->put_back(q, chain);
            return;
        }
    }
}

static uint32_t send_batch(struct vpci_net *net, struct port *p, struct tx *tx)
{
    if (!tx->n || !is_plugged(p))
        return 0;
    int sent = p->ops->send(p, tx->out, tx->n);
    if (p->refused && !p->refused_told) {
        p->refused_told = true;
        tell_trouble(net, &net->troubles.refused, p->refused);
    }
    if (sent < 0)
        lose(net, p, sent);
    else if (p->blocked && p->fd >= 0)
        watch(net, p);
    net->stats.tx_blocked += p->blocked;
    if (!p->ops->has_fd)
        look_at_rx(net, p);
    return sent < 0 ? 0 : (uint32_t)sent;
}

/* Those that went come back to the driver, the others wait in the ring. */
static uint64_t settle(struct vpci_net *net, const vpci_host *host, vpci_queue *q, struct tx *tx, uint32_t sent)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < sent; i++) {
        net->stats.tx_frames += !tx->out[i].failed;
        net->stats.tx_bytes += tx->out[i].failed ? 0 : tx->out[i].len;
        bytes += tx->out[i].len;
        if (!tx->out[i].failed)
            keep_frame(net, q, tx->out[i].iov + 1, tx->out[i].len);
        host->done(tx->out[i].chain, 0);
    }
    if (tx->bad && sent == tx->n)
        host->done(tx->bad, 0);
    else if (tx->bad)
        host->put_back(q, tx->bad);
    for (uint32_t i = tx->n; i > sent; i--)
        host->put_back(q, tx->out[i - 1].chain);
    return bytes;
}

static uint32_t drop_all(struct vpci_net *net, const vpci_host *host, vpci_queue *q)
{
    for (uint32_t n = 0; n < LOOK_FRAMES; n++) {
        vpci_chain *chain = host->take(q);
        if (!chain)
            return VPCI_RUN_KICKS;
        net->stats.tx_no_link++;
        host->done(chain, 0);
    }
    return VPCI_RUN_MORE;
}

static uint32_t transmit(struct vpci_net *net, const vpci_host *host, vpci_queue *q, uint32_t pair)
{
    struct port *p = port_of(net, pair);
    struct tx *tx = &net->pairs[pair]->tx;
    uint64_t bytes = 0;
    for (uint32_t n = 0; n < LOOK_FRAMES && bytes < LOOK_BYTES;) {
        if (!net->link || !is_plugged(p))
            return drop_all(net, host, q);
        if (p->blocked)
            return VPCI_RUN_QUIET;
        collect(net, host, q, p, tx);
        if (!tx->n && !tx->bad)
            return VPCI_RUN_KICKS;
        uint32_t sent = send_batch(net, p, tx);
        bytes += settle(net, host, q, tx, sent);
        n += sent + (tx->bad != NULL);
    }
    return VPCI_RUN_MORE;
}

/* ---- the control queue ---- */

/* Python answers; what it could not even read is refused here. */
static uint32_t forward(struct vpci_net *net, const vpci_host *host, vpci_queue *q)
{
    for (uint32_t n = 0; n < LOOK_FRAMES; n++) {
        vpci_chain *chain = host->take(q);
        if (!chain)
            return VPCI_RUN_KICKS;
        if (chain->error) {
            vpci_chain_set_last(chain, 1);
            host->done(chain, chain->in_len == 1 && chain->last_in);
        } else {
            vpci_handoff_engine()->serve(net->control, host, chain);
        }
    }
    return VPCI_RUN_MORE;
}

/* ---- the table ---- */

static uint32_t run(void *state, const vpci_host *host, vpci_queue *q, uint16_t index)
{
    struct vpci_net *net = state;
    if (index == control_index(net))
        return forward(net, host, q);
    if (index >= 2 * net->n_pairs)
        return VPCI_RUN_QUIET;
    if (index % 2)
        return transmit(net, host, q, index / 2);
    return receive(net, host, q, port_of(net, index / 2));
}

static void cancel(void *state, uint32_t queue_index)
{
    vpci_handoff_engine()->cancel(((struct vpci_net *)state)->control, queue_index);
}

static void apply_offloads(struct vpci_net *net, bool again)
{
    for (uint32_t i = 0; i < net->n_ports && (again || net->applied != net->offloads); i++)
        if (net->ports[i].ops->offload && net->ports[i].fd >= 0)
            net->ports[i].ops->offload(&net->ports[i], net->offloads);
    net->applied = net->offloads;
}

/* Once a queue, and after a reset: frames for the driver that was are thrown away. */
static void features(void *state, uint64_t bits)
{
    struct vpci_net *net = state;
    net->features = bits;
    net->offloads = bits;
    net->header = has(bits, VPCI_NET_F_MRG_RXBUF) ? HEADER_MRG : HEADER;
    apply_offloads(net, false);
    vpci_handoff_engine()->features(net->control, bits);
    look_at_all_rx(net);
}

static const vpci_engine engine = {
    .abi = VPCI_ENGINE_ABI, .cancel = cancel, .features = features, .run = run, .event = event,
};

const vpci_engine *vpci_net_engine(void)
{
    return &engine;
}

/* ---- from Python ---- */

static void lock(struct vpci_net *net)
{
    if (net->dev)
        pthread_mutex_lock(&net->dev->awake);
}

static void unlock(struct vpci_net *net)
{
    if (!net->dev)
        return;
    pthread_mutex_unlock(&net->dev->awake);
    mailbox_wake(&net->dev->box);
}

int vpci_net_plug(vpci_net *net, uint32_t port, int fd)
{
    if (port >= net->n_ports || !net->ports[port].ops->has_fd || !net->dev) {
        close(fd);
        return -EINVAL;
    }
    struct port *p = &net->ports[port];
    lock(net);
    unplug(net, p);
    p->fd = fd;
    p->readable = true;
    apply_offloads(net, true);
    watch(net, p);
    look_at_rx(net, p);
    look_at_tx(net);
    int rc = p->fd == fd ? 0 : -EINVAL;
    unlock(net);
    return rc;
}

void vpci_net_unplug(vpci_net *net, uint32_t port)
{
    lock(net);
    if (port < net->n_ports)
        unplug(net, &net->ports[port]);
    unlock(net);
}

int vpci_net_is_plugged(vpci_net *net, uint32_t port)
{
    lock(net);
    int plugged = port < net->n_ports && is_plugged(&net->ports[port]);
    unlock(net);
    return plugged;
}

int vpci_net_event_fd(vpci_net *net)
{
    return net->event_fd;
}

void vpci_net_take_troubles(vpci_net *net, vpci_net_troubles *troubles)
{
    lock(net);
    *troubles = net->troubles;
    troubles->capture = net->capture && !net->capture_told ? capture_error(net->capture) : 0;
    net->capture_told |= troubles->capture != 0;
    net->troubles = (vpci_net_troubles){0};
    unlock(net);
}

void vpci_net_set_filter(vpci_net *net, const vpci_net_filter *filter)
{
    lock(net);
    net->filter = *filter;
    unlock(net);
}

void vpci_net_set_link(vpci_net *net, int up)
{
    lock(net);
    net->link = up;
    look_at_all_rx(net);
    if (net->dev)
        look_at_tx(net);
    unlock(net);
}

void vpci_net_set_pairs(vpci_net *net, uint32_t n)
{
    lock(net);
    net->n_used = n;
    memset(net->flows, 0, sizeof(net->flows));
    look_at_all_rx(net);
    unlock(net);
}

void vpci_net_set_offloads(vpci_net *net, uint64_t bits)
{
    lock(net);
    net->offloads = bits;
    apply_offloads(net, false);
    unlock(net);
}

void vpci_net_read_stats(vpci_net *net, vpci_net_stats *stats)
{
    lock(net);
    *stats = net->stats;
    unlock(net);
}

/* ---- life ---- */

static bool make(struct vpci_net *net, const vpci_net_setup *setup)
{
    net->ports = calloc(net->n_ports, sizeof(*net->ports));
    net->batches = calloc(net->n_ports, sizeof(*net->batches));
    net->pairs = calloc(net->n_pairs, sizeof(*net->pairs));
    net->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    for (uint32_t i = 0; net->pairs && i < net->n_pairs; i++)
        if (!(net->pairs[i] = calloc(1, sizeof(**net->pairs))))
            return false;
    for (uint32_t i = 0; net->ports && i < net->n_ports; i++)
        if (port_init(&net->ports[i], setup->kind, setup->peer, &net->stats) < 0)
            return false;
    return net->ports && net->batches && net->pairs && net->event_fd >= 0;
}

vpci_net *vpci_net_new(const vpci_net_setup *setup)
{
    vpci_net *net = calloc(1, sizeof(*net));
    if (!net)
        return NULL;
    net->n_pairs = setup->n_pairs;
    net->n_ports = setup->n_ports;
    net->control = setup->control;
    net->header = HEADER;
    net->link = true;
    net->n_used = 1;
    if (make(net, setup) && (setup->capture < 0 || (net->capture = capture_new(setup, net->event_fd))))
        return net;
    vpci_net_free(net);
    return NULL;
}

void vpci_net_free(vpci_net *net)
{
    if (!net)
        return;
    for (uint32_t i = 0; net->ports && i < net->n_ports; i++) {
        if (net->dev && net->ports[i].fd >= 0)
            watch_remove(net->dev, net->ports[i].fd);
        port_fini(&net->ports[i]);
    }
    for (uint32_t i = 0; net->pairs && i < net->n_pairs; i++) {
        if (net->pairs[i])
            free(net->pairs[i]->tx.flat);
        free(net->pairs[i]);
    }
    capture_free(net->capture);
    if (net->event_fd >= 0)
        close(net->event_fd);
    free(net->ports);
    free(net->batches);
    free(net->pairs);
    free(net);
}

void vpci_net_attach(vpci_net *net, vpci_dev *dev)
{
    net->dev = dev;
}
