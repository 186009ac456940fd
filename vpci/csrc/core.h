/* What the C files share and cffi does not read: structs behind the opaque names of api/, and the includes. */
#ifndef VPCI_CORE_H
#define VPCI_CORE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include "api/wire.h"
#include "api/mem.h"
#include "api/ring.h"
#include "api/irq.h"
#include "api/engine.h"
#include "api/dev.h"
#include "api/front.h"
#include "api/disk.h"
#include "api/blk.h"
#include "api/net.h"
#include "api/drv.h"

#define PAGE_SIZE_BYTES 4096u
#define PAGE_SHIFT 12
#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

#define CHECK_LAYOUT(type, size) _Static_assert(sizeof(type) == (size), #type " is not as the wire has it")
CHECK_LAYOUT(struct vfu_header, 16);
CHECK_LAYOUT(struct vfu_region_access, 16);
CHECK_LAYOUT(struct vfu_dma_map, 32);
CHECK_LAYOUT(struct vfu_dma_unmap, 24);
CHECK_LAYOUT(struct vfu_irq_set, 20);
CHECK_LAYOUT(struct vfu_irq_info, 16);
CHECK_LAYOUT(struct vfu_region_info, 32);
CHECK_LAYOUT(struct vfu_ioeventfd, 48);
CHECK_LAYOUT(struct vfu_dma_access, 16);
CHECK_LAYOUT(struct vfu_one_write, 24);

/* ---- mem.c ---- */

/* One mapped range. Ranges are made and freed by the thread that owns the table. */
struct vpci_range {
    uint64_t gpa;
    uint64_t size;
    uint8_t *hva;      /* NULL: cannot be mapped, only reached by messages */
    bool borrowed;     /* it is not ours to unmap */
    uint32_t perm;
    uint32_t users;    /* pieces of chains in flight that point into it; counted by the queue's owner only */
};

/* Where guest memory is: in no range with the right asked for, mapped here, or with the client only. */
enum vpci_where { VPCI_NOWHERE = 0, VPCI_HERE = 1, VPCI_FAR = 2 };

/* The piece of a guest span that lies in one range: the range, the pointer (NULL when it is far) and the length. */
struct vpci_piece {
    struct vpci_range *range;
    uint8_t *hva;
    uint64_t len;
};

enum vpci_where vpci_mem_piece(vpci_mem *mem, uint64_t gpa, uint64_t len, uint32_t perm, struct vpci_piece *piece);
/* A whole span: VPCI_FAR when any byte of it is far, VPCI_NOWHERE when any is missing. */
enum vpci_where vpci_mem_whole(vpci_mem *mem, uint64_t gpa, uint64_t len, uint32_t perm);
/* Whether a mapped file may shrink under us, so that touching it needs vpci_guard. */
bool vpci_mem_may_fault(const vpci_mem *mem);
struct vpci_range *vpci_mem_exact(vpci_mem *mem, uint64_t gpa, uint64_t size);
struct vpci_range *vpci_mem_nth(vpci_mem *mem, size_t n);
void vpci_mem_clear(vpci_mem *mem);

/* ---- fault.c ---- */

/* Run work(arg), which touches guest memory. Returns false when the memory vanished under it (SIGBUS): then work was
 * left in the middle, and whatever it had begun is its caller's to undo. */
bool vpci_guard(const vpci_mem *mem, void (*work)(void *), void *arg);
void vpci_guard_install(void);

/* ---- far.c ---- */

/* Memory that only the client can reach. Both block; 0, -EFAULT (the client refused) or -ECANCELED (given up, because
 * somebody waits for this queue to be at rest). */
struct vpci_far_ops {
    int (*read)(void *arg, vpci_queue *q, uint64_t gpa, void *buf, uint32_t len);
    int (*write)(void *arg, vpci_queue *q, uint64_t gpa, const void *buf, uint32_t len);
};

enum { FAR_PIECE = 65536, FAR_CHAIN_MAX = 64 << 20, FAR_BLOCK = 1024 };

/* ---- ring.c ---- */

struct vpci_queue {
    vpci_mem *mem;
    uint32_t size;
    uint32_t max_sg;
    uint32_t rules;
    uint32_t pfn;

    uint8_t **pages;          /* one host pointer a ring page, NULL where it is not mapped with the right */
    uint32_t n_pages;
    uint32_t used_off;        /* byte offset of the used part from the base */
    bool started;
    bool suspended;           /* started, but the ring is not whole in memory */
    bool no_notify;           /* we have set VRING_USED_F_NO_NOTIFY */
    uint16_t last_avail;
    uint16_t avail_seen;      /* avail.idx as last loaded */
    uint16_t used_idx;        /* entries pushed */
    uint16_t published;       /* entries the driver can see */
    uint16_t driver_event;    /* used_event, or avail.flags, as last loaded */
    uint32_t in_flight;       /* chains popped and neither pushed nor dropped */
    bool gated;               /* chains are fetched only against credit */
    int64_t credit;           /* bytes of chains that the engine still asks for; the last chain may overdraw it */
    uint64_t recalls;         /* atomic: how often those who took its chains were asked to give them back */
    uint16_t broken;          /* enum vpci_ring_error */
    uint16_t broken_head;
    uint64_t broken_addr;
    uint64_t chains, used, suppressed, request_errors, zero_len, ring_errors;

    struct chain *free_chains;
    struct chain *building;   /* the chain that pop is filling, for when it is left in the middle */

    /* far memory: the queue then runs on a thread that may block (far.c) */
    const struct vpci_far_ops *far;   /* NULL: far memory is refused */
    void *far_arg;
    uint8_t *shadow;          /* stands for the ring's far pages: words go through it one by one */
    uint8_t *block;           /* of a far indirect table */
    uint64_t block_gpa;
    uint32_t block_len;
    bool far_ring;            /* some page of the ring is far */
    bool far_refused;         /* and nobody can reach it */
    bool needs_far;           /* the ring or a chain is far: the pump leaves the queue to the far thread */
    bool on_far_thread;       /* that thread is at work on it, perhaps waiting for the client */
    bool unwound;             /* an access was given up: what was begun has no effect and is to be tried again */

    /* the pump's own; ring.c does not look at them */
    vpci_dev *dev;
    const vpci_engine *engine;
    void *engine_state;
    uint16_t index;
    uint16_t vector;
    bool runnable;            /* look at the ring before sleeping */
    bool draining;            /* finished work is dropped, nothing is fetched */
    bool dirty;               /* pushed since the last publication */
    uint64_t kicks, ignored_kicks, interrupts;
    uint64_t noted_errors;
    vpci_chain *done, **last_done; /* finished, to be pushed by the far thread */
    uint32_t n_done;          /* they are in flight, but hold no memory */
    int kick_fd;              /* an ioeventfd of the client's: readable = a kick; -1: it has none */
};

void vpci_ring_break(vpci_queue *q, uint16_t reason, uint16_t head, uint64_t addr);
/* The engine is done with it: its own memory need not stay, only its used entry is still to be written. */
void vpci_chain_release(vpci_chain *chain);
/* Does it take the far thread to push it? */
bool vpci_chain_is_far(const vpci_chain *chain);
bool vpci_queue_touches(const vpci_queue *q, const struct vpci_range *range);

/* ---- irq.c ---- */

struct vpci_vector {
    int fd;          /* -1: the client has set none */
    bool masked;     /* by SET_IRQS */
    bool entry_masked; /* by the MSI-X table's own bit */
    bool pending;
};

struct vpci_irq {
    pthread_mutex_t lock;    /* an eventfd is used only under it, so a replaced one is never used after the answer */
    uint32_t isr;            /* atomic: workers set bits, the pump exchanges it for 0 */
    bool msix;
    bool function_mask;
    bool intx_disabled;      /* PCI command bit 10 */
    bool intx_masked;        /* by us after each edge, until the client unmasks; or by SET_IRQS */
    int intx_fd;
    int unmask_fd;           /* readable: the client unmasks INTx; -1: it uses messages */
    uint16_t config_vector;
    uint32_t counts[VFU_IRQ_INDICES];
    uint32_t n_vectors;
    struct vpci_vector *vectors;
    /* Who signals the client when its eventfds are not here: returns -1 when it has armed none. */
    int (*trigger)(void *state, uint32_t vector);
    void *trigger_state;
    bool intx_signalled;     /* by trigger, for the level that INTx has now */
};

int vpci_irq_init(struct vpci_irq *irq, const uint32_t counts[VFU_IRQ_INDICES]);
void vpci_irq_fini(struct vpci_irq *irq);
/* Returns whether anybody could hear it: false with NO_VECTOR. */
bool vpci_irq_raise(struct vpci_irq *irq, uint16_t vector, uint32_t isr_bit);
void vpci_irq_read_status(struct vpci_irq *irq, uint32_t *isr, uint32_t *status);
uint32_t vpci_irq_pending(struct vpci_irq *irq, uint8_t *buf, uint32_t len);
uint32_t vpci_irq_read_isr(struct vpci_irq *irq);
void vpci_irq_clear(struct vpci_irq *irq);
void vpci_irq_set_msix(struct vpci_irq *irq, bool enabled, bool function_mask);
void vpci_irq_set_intx_disable(struct vpci_irq *irq, bool disabled);
void vpci_irq_entry_mask(struct vpci_irq *irq, uint32_t vector, bool masked);
void vpci_irq_unmask_intx(struct vpci_irq *irq);
/* SET_IRQS as a front with eventfds of its own tells of it. */
void vpci_irq_mask(struct vpci_irq *irq, uint32_t index, uint32_t start, uint32_t count, bool masked);
void vpci_irq_armed(struct vpci_irq *irq);
bool vpci_is_eventfd(int fd);
void vpci_irq_forget_client(struct vpci_irq *irq);
/* One SET_IRQS message. Takes the fds it keeps by setting them to -1. Returns 0 or an errno. */
int vpci_irq_set(struct vpci_irq *irq, const struct vfu_irq_set *set, const uint8_t *data, size_t data_len,
                 int *fds, uint32_t n_fds);

/* ---- pool.c ---- */

struct vpci_job {
    struct vpci_job *next;
    void (*run)(struct vpci_job *job);
};

struct vpci_pool;
struct vpci_pool *vpci_pool_new(uint32_t n_threads, const char *name);
void vpci_pool_free(struct vpci_pool *pool);
void vpci_pool_submit(struct vpci_pool *pool, struct vpci_job *job);
/* Take every job that has not begun and for which wanted() says so off the queue; a list by next. */
struct vpci_job *vpci_pool_withdraw(struct vpci_pool *pool, bool (*wanted)(struct vpci_job *, void *), void *arg);
int vpci_thread_start(pthread_t *thread, void *(*run)(void *), void *arg, const char *name);

/* ---- mailbox.c ---- */

/* An engine tells something of the device that a chain belongs to; before the chain is done. */
void vpci_chain_note(vpci_chain *chain, vpci_event note);

/* ---- disk.c ---- */

enum { VPCI_SECTOR = 512 };

/* A backend, and what it wants: align is a power of two. */
struct vpci_disk {
    const vpci_disk_ops *ops;
    void *state;
    uint32_t align;
    bool private_memory;
    pthread_rwlock_t edges;        /* held for writing by who writes blocks in part, for reading by other writers */
};

/* Bytes of a disk and the memory for them; a transfer takes off the front what it has done. */
struct vpci_span {
    struct iovec *iov;
    uint32_t n_iov;
    uint64_t offset, len;
};

void vpci_disk_init(struct vpci_disk *d, const vpci_disk_ops *ops, void *state, uint32_t align, bool private_memory);
void vpci_disk_fini(struct vpci_disk *d);
/* All return 0 or an errno. mem: the guest memory that the pieces are of, NULL: ours. With VPCI_DISK_NOW EAGAIN means
 * that the rest of the span needs a call without it. */
int vpci_disk_read(struct vpci_disk *d, const vpci_mem *mem, struct vpci_span *s, uint32_t flags);
int vpci_disk_write(struct vpci_disk *d, const vpci_mem *mem, struct vpci_span *s, uint32_t flags);
int vpci_disk_flush(struct vpci_disk *d);
int vpci_disk_discard(struct vpci_disk *d, uint64_t offset, uint64_t len, uint32_t flags);
int vpci_disk_zero(struct vpci_disk *d, uint64_t offset, uint64_t len, uint32_t flags);
int vpci_disk_erase(struct vpci_disk *d, uint64_t offset, uint64_t len, uint32_t flags);
void vpci_span_skip(struct vpci_span *s, uint64_t n);
/* Copy what the pieces of a span hold. False when guest memory vanished. */
bool vpci_span_read(const vpci_mem *mem, const struct vpci_span *s, void *buf);

#endif
