/* The network engine: frames between guest memory and a backend, in C, on the thread that has the queue. Python opens
 * what is behind it, plugs descriptors in and says what is let through. Source: [devices.md 4]. */

typedef struct vpci_net vpci_net;

/* What a port does with the descriptor that is plugged into it. */
enum vpci_port_kind {
    VPCI_PORT_NULL,      /* takes every frame, gives none; no descriptor */
    VPCI_PORT_LOOP,      /* gives back what it took; no descriptor */
    VPCI_PORT_DATAGRAM,  /* a UNIX datagram socket: one datagram, one frame */
    VPCI_PORT_STREAM,    /* QEMU's: a length of 32 bits, big endian, then the frame */
    VPCI_PORT_TAP,       /* a queue of a TAP interface without header */
    VPCI_PORT_TAP_VNET,  /* the same with the virtio header of 10 bytes */
    VPCI_PORT_KINDS
};

enum vpci_net_limit {
    VPCI_NET_FRAME_MAX = 65600,  /* bytes of the longest frame: the largest segment that a guest may leave to us */
    VPCI_NET_FRAME_MIN = 14,
    VPCI_NET_TABLE = 64,         /* addresses that the filter holds, as in QEMU */
    VPCI_NET_BACKLOG = 256       /* frames that loop keeps for a guest without buffers */
};

/* The feature bits that change how frames are moved. */
enum vpci_net_feature {
    VPCI_NET_F_CSUM = 0,
    VPCI_NET_F_GUEST_CSUM = 1,
    VPCI_NET_F_GSO = 6,
    VPCI_NET_F_GUEST_TSO4 = 7,
    VPCI_NET_F_GUEST_TSO6 = 8,
    VPCI_NET_F_GUEST_ECN = 9,
    VPCI_NET_F_GUEST_UFO = 10,
    VPCI_NET_F_HOST_TSO4 = 11,
    VPCI_NET_F_HOST_TSO6 = 12,
    VPCI_NET_F_HOST_ECN = 13,
    VPCI_NET_F_HOST_UFO = 14,
    VPCI_NET_F_MRG_RXBUF = 15,
    VPCI_NET_F_MQ = 22
};

typedef struct vpci_net_setup {
    uint32_t n_pairs;
    uint32_t kind;           /* enum vpci_port_kind */
    uint32_t n_ports;        /* 1: all pairs share it, and frames are steered; or n_pairs */
    const char *peer;        /* DATAGRAM: where frames go */
    vpci_handoff *control;   /* takes the chains of the control queue */
    int capture;             /* a file for what goes out and comes in, -1: none; the engine's if it is made */
    uint32_t snaplen;        /* bytes of each frame that it keeps */
    uint32_t pcapng;         /* 1: in the newer format */
} vpci_net_setup;

/* What is let through to the guest; Python makes it from the control queue's commands. */
typedef struct vpci_net_filter {
    uint8_t mac[6];
    uint8_t promisc, allmulti, alluni, nomulti, nouni, nobcast;
    uint8_t all_vlans;
    uint8_t n_unicast, n_multicast;
    uint8_t unicast[384], multicast[384];  /* 6 bytes each, VPCI_NET_TABLE of them */
    uint8_t vlans[512];                    /* bit n & 7 of byte n / 8 */
} vpci_net_filter;

/* What went wrong since the last look: errnos, 0 = nothing. Each is told once: `refused` until the backend takes a frame
 * of its peer's again, or another one is plugged in. */
typedef struct vpci_net_troubles {
    int32_t lost;       /* of the descriptor that went; 0 when nothing did */
    int32_t refused;    /* of a frame that the backend did not take */
    int32_t capture;    /* of the capture, which is over */
} vpci_net_troubles;

typedef struct vpci_net_stats {
    uint64_t rx_frames, rx_bytes, tx_frames, tx_bytes;
    uint64_t rx_starved;     /* times that frames had to wait for buffers */
    uint64_t tx_blocked;     /* times that chains had to wait for the backend */
    uint64_t rx_filtered;    /* not for this guest: by address, VLAN or mode */
    uint64_t rx_not_ready;   /* the link is down or the receive queue does not run */
    uint64_t rx_too_long;    /* longer than a buffer, with MRG_RXBUF than all buffers of a full ring, or than any frame */
    uint64_t rx_short;       /* less than an Ethernet header */
    uint64_t rx_bad_buffer;  /* chains that cannot hold a header, or nothing of a frame */
    uint64_t rx_bad_offload; /* segments that the driver did not ask for */
    uint64_t rx_backlog;     /* the backlog of loop was full */
    uint64_t tx_short;       /* a chain without a whole header and Ethernet header */
    uint64_t tx_too_long;
    uint64_t tx_bad_offload; /* a checksum outside the frame, or a segment type that was not negotiated */
    uint64_t tx_no_link;     /* the link is down, or nothing is plugged in */
    uint64_t tx_no_peer;     /* nobody is there to take it */
    uint64_t tx_errors;      /* the backend refused it */
    uint64_t checksums;      /* completed by us */
    uint64_t lost;           /* times that a backend went away */
    uint64_t captured;
    uint64_t not_captured;   /* faster than they could be written, or the disk failed */
} vpci_net_stats;

/* NULL when memory is short. Free it when the pump has ended, before the device. */
vpci_net *vpci_net_new(const vpci_net_setup *setup);
void vpci_net_free(vpci_net *net);
const vpci_engine *vpci_net_engine(void);
/* Before the device starts. */
void vpci_net_attach(vpci_net *net, vpci_dev *dev);

/* From any thread, from here on. The fd is the engine's from now on, also when it is refused; 0 or -errno. It replaces
 * what was plugged in. */
int vpci_net_plug(vpci_net *net, uint32_t port, int fd);
void vpci_net_unplug(vpci_net *net, uint32_t port);
/* Whether something is plugged in; 0 once it was lost. */
int vpci_net_is_plugged(vpci_net *net, uint32_t port);
void vpci_net_take_troubles(vpci_net *net, vpci_net_troubles *troubles);
/* An eventfd that is readable when there are troubles; the engine's. -errno when there is none to be had. */
int vpci_net_event_fd(vpci_net *net);

void vpci_net_set_filter(vpci_net *net, const vpci_net_filter *filter);
void vpci_net_set_link(vpci_net *net, int up);
/* The driver uses the first n pairs; 1 again after new features. */
void vpci_net_set_pairs(vpci_net *net, uint32_t n);
/* What the backend may leave to the guest: bits of feature bits 1 and 7..10; reset by new features. */
void vpci_net_set_offloads(vpci_net *net, uint64_t bits);
void vpci_net_read_stats(vpci_net *net, vpci_net_stats *stats);

/* What the frames of one flow have in common, in either direction: addresses, protocol, and the ports of TCP and UDP
 * without a fragment; else the stations. [linux tun.c does the same by its flow dissector] */
uint32_t vpci_net_flow(const uint8_t *frame, uint32_t len);
/* For tests: the Internet checksum of bytes that lie in pieces, from byte `from` on, not complemented. */
uint16_t vpci_net_sum(const struct iovec *iov, uint32_t n, uint32_t from);
