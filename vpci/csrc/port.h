/* Between the network engine and what is behind it: net.c asks a port for frames and hands it frames, port.c speaks to
 * the descriptor. */
#ifndef VPCI_PORT_H
#define VPCI_PORT_H

#include "pump.h"

/* The header before each frame, as the driver knows it and a TAP with vnet header too. [uapi virtio_net.h] */
struct vnet_header {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t hdr_len;
    uint16_t gso_size;
    uint16_t csum_start;
    uint16_t csum_offset;
};
CHECK_LAYOUT(struct vnet_header, 10);

/* A frame that came; the bytes are the port's until it is dropped. */
struct frame {
    const uint8_t *data;
    uint32_t len;
    struct vnet_header vnet;
};

/* A frame to be sent: iov[0] is the port's own, for what goes before each frame; the rest is the frame. */
struct out {
    vpci_chain *chain;
    struct iovec *iov;
    uint32_t n_iov;
    uint32_t len;               /* of the frame */
    struct vnet_header vnet;
    uint8_t prefix[4];
    uint16_t csum;
    bool failed;                /* taken, and not sent: counted already */
};

enum { OUT_BATCH = 64, IN_BATCH = 32, STREAM_BYTES = 256 << 10 };

struct kept;                    /* a frame in loop's backlog */

struct port {
    const struct port_ops *ops;
    vpci_net_stats *stats;
    int fd;                     /* -1: nothing is plugged in */
    bool readable;              /* there may be something to read: until the kernel says no */
    bool hung_up;
    uint32_t life;              /* grows when what was plugged in goes */
    bool blocked;               /* the kernel takes no more: until EPOLLOUT */
    uint8_t *in;                /* what was received: stream bytes, or frames at multiples of VPCI_NET_FRAME_MAX */
    size_t in_at, in_end;       /* stream: bytes; else frames */
    uint32_t lens[IN_BATCH];
    struct vnet_header vnet;
    uint8_t *rest;              /* of a frame that the stream took in part */
    size_t rest_at, rest_end;
    struct kept *first, **last;
    uint32_t n_kept;
    char *peer;
    bool connected;
    int refused;                /* errno of the first frame that was not taken; 0: none yet */
    bool refused_told;
};

struct port_ops {
    bool has_fd, has_vnet;
    /* Up to max frames that are next; they stay. How many, 0: none now, < 0: -errno, the descriptor is of no more use. */
    int (*next)(struct port *p, struct frame *f, uint32_t max);
    /* The end of the first of them. */
    void (*drop)(struct port *p);
    /* Send; how many of n were taken, at least one unless blocked; -errno: the descriptor is of no more use. */
    int (*send)(struct port *p, struct out *out, uint32_t n);
    /* There is room again: send what was kept of a frame. 1: all of it went, 0: blocked, < 0: as send(). */
    int (*flush)(struct port *p);
    /* What the guest takes, as bits of features. */
    void (*offload)(struct port *p, uint64_t bits);
};

int port_init(struct port *p, uint32_t kind, const char *peer, vpci_net_stats *stats);
void port_fini(struct port *p);
/* Forget everything of the descriptor that was plugged in, and of the stream in the middle. */
void port_clear(struct port *p);

/* ---- capture.c ---- */

struct capture;

/* The fd is its own when it could be made; NULL when memory or threads are short. When it fails, event_fd is written. */
struct capture *capture_new(const vpci_net_setup *setup, int event_fd);
/* The errno that ended it; 0: it goes on. */
int capture_error(struct capture *c);
/* What was added is written first. */
void capture_free(struct capture *c);
/* Keep a frame of len bytes that lies in these pieces. Returns false when there is no room now, or the disk failed. */
bool capture_add(struct capture *c, vpci_mem *mem, const struct iovec *iov, uint32_t len, bool outbound);

#endif
