/* One message at a time: the pump hands it a whole message in arrival order; it answers at once, hands the message to
 * Python, or begins an operation that the pump finishes. Source: [vfio-user], [linux vfio.h]. */
#include "pump.h"

/* ---- replies ---- */

void reply(struct vpci_dev *dev, uint32_t error, const void *a, size_t a_len, const void *b, size_t b_len)
{
    if (dev->multi.n && !dev->multi.error)
        dev->multi.error = error;
    dev->front->reply(dev->front_state, error, a, a_len, b, b_len);
}

static void succeed(struct vpci_dev *dev, const void *payload, size_t len)
{
    reply(dev, 0, payload, len, NULL, 0);
}

static void refuse(struct vpci_dev *dev, uint32_t error, enum vpci_refusal why, uint64_t detail)
{
    pump_note(dev, (vpci_event){.note = VPCI_NOTE_MESSAGE, .command = dev->request.command, .a = error, .b = why,
                                .c = detail});
    reply(dev, error, NULL, 0, NULL, 0);
}

/* ---- messages that Python answers ---- */

/* The request in execution, with its payload in two parts. */
static void ask_python(struct vpci_dev *dev, const void *a, uint32_t a_len, const void *b, uint32_t b_len)
{
    free(dev->python_data);
    dev->python_data = malloc((size_t)a_len + b_len + 1);
    if (!dev->python_data) {
        refuse(dev, ENOMEM, VPCI_WHY_MEMORY, a_len + b_len);
        return;
    }
    if (a_len)
        memcpy(dev->python_data, a, a_len);
    if (b_len)
        memcpy(dev->python_data + a_len, b, b_len);
    dev->stats.cold++;
    pump_begin(dev, OP_PYTHON);
    mailbox_message(&dev->box, &(vpci_event){
        .kind = VPCI_EVENT_MESSAGE, .command = dev->request.command, .flags = dev->request.flags,
        .data = dev->python_data, .len = a_len + b_len, .pid = dev->stats.client_pid});
}

static void to_python(struct vpci_dev *dev, struct message *m)
{
    ask_python(dev, m->data, m->len, NULL, 0);
}

void message_reset(struct vpci_dev *dev)
{
    dev->request = (struct vfu_header){.command = VFU_DEVICE_RESET};
    dev->stats.messages++;
    ask_python(dev, NULL, 0, NULL, 0);
}

/* ---- registers ---- */

static bool in_region(const struct vpci_dev *dev, const struct vfu_region_access *a)
{
    uint64_t size = a->region < VFU_REGION_INDICES ? dev->region_sizes[a->region] : 0;
    return size && a->offset <= size && a->count <= size - a->offset && a->count <= VFU_MAX_DATA;
}

/* An access that is not inside its region is refused here. */
static bool check_access(struct vpci_dev *dev, const struct vfu_region_access *a)
{
    if (in_region(dev, a))
        return true;
    refuse(dev, EINVAL, VPCI_WHY_REGION, (uint64_t)a->region << 56 | (a->offset & ((1ull << 56) - 1)));
    return false;
}

static void read_region(struct vpci_dev *dev, const struct vfu_region_access *a)
{
    uint8_t data[VFU_MAX_BAR0];
    if (a->region != VFU_REGION_BAR0) {
        ask_python(dev, a, sizeof(*a), NULL, 0);
        return;
    }
    uint32_t off = (uint32_t)a->offset;
    uint32_t isr = hot_covers_isr(&dev->hot, off, a->count) ? vpci_irq_read_isr(&dev->irq) : 0;
    hot_read(&dev->hot, off, a->count, isr, data);
    dev->stats.hot++;
    reply(dev, 0, a, sizeof(*a), data, a->count);
}

static void kick(struct vpci_dev *dev, const struct vfu_region_access *a, const uint8_t *data)
{
    uint64_t value = 0;
    memcpy(&value, data, a->count);
    hot_set_notify(&dev->hot, (uint16_t)value);
    pump_kick(dev, (uint32_t)value);
}

static void write_region(struct vpci_dev *dev, const struct vfu_region_access *a, const uint8_t *data)
{
    bool is_kick = a->region == VFU_REGION_BAR0 && hot_is_kick(&dev->hot, (uint32_t)a->offset, a->count);
    if (!is_kick && a->count) {
        ask_python(dev, a, sizeof(*a), data, a->count);
        return;
    }
    if (is_kick)
        kick(dev, a, data);
    dev->stats.hot++;
    succeed(dev, a, sizeof(*a));
}

void message_access(struct vpci_dev *dev, const struct vfu_region_access *a, const uint8_t *data)
{
    dev->request = (struct vfu_header){.command = data ? VFU_REGION_WRITE : VFU_REGION_READ};
    dev->stats.messages++;
    if (!check_access(dev, a))
        return;
    if (data)
        write_region(dev, a, data);
    else
        read_region(dev, a);
}

static void region_read(struct vpci_dev *dev, struct message *m)
{
    struct vfu_region_access a;
    memcpy(&a, m->data, sizeof(a));
    if (check_access(dev, &a))
        read_region(dev, &a);
}

static void region_write(struct vpci_dev *dev, struct message *m)
{
    struct vfu_region_access a;
    memcpy(&a, m->data, sizeof(a));
    if (!check_access(dev, &a))
        return;
    if (m->len - sizeof(a) != a.count)
        refuse(dev, EINVAL, VPCI_WHY_SHORT, sizeof(a) + (uint64_t)a.count);
    else
        write_region(dev, &a, m->data + sizeof(a));
}

/* ---- memory ---- */

static void dma_map(struct vpci_dev *dev, struct message *m)
{
    struct vfu_dma_map map;
    memcpy(&map, m->data, sizeof(map));
    int fd = m->n_fds ? m->fds[0] : -1;
    int rc = m->n_fds > 1 || map.argsz < sizeof(map) || map.flags & ~(uint32_t)VFU_DMA_MAP_FLAGS ? -EINVAL
             : vpci_mem_map(dev->mem, map.addr, map.size, fd, map.offset,
                            map.flags & (VFU_DMA_READABLE | VFU_DMA_WRITABLE));
    if (rc < 0) {
        refuse(dev, (uint32_t)-rc, VPCI_WHY_MAP, map.addr);
        return;
    }
    pump_remap(dev);
    succeed(dev, NULL, 0);
}

static int check_unmap(struct vpci_dev *dev, const struct vfu_dma_unmap *u)
{
    if (u->argsz < sizeof(*u) || u->flags & ~(uint32_t)(VFU_DMA_UNMAP_DIRTY | VFU_DMA_UNMAP_ALL))
        return EINVAL;
    if (u->flags & VFU_DMA_UNMAP_DIRTY)
        return ENOTSUP;
    if (u->flags & VFU_DMA_UNMAP_ALL)
        return u->addr || u->size ? EINVAL : 0;
    return vpci_mem_exact(dev->mem, u->addr, u->size) ? 0 : ENOENT;
}

static void dma_unmap(struct vpci_dev *dev, struct message *m)
{
    memcpy(&dev->unmap, m->data, sizeof(dev->unmap));
    int error = check_unmap(dev, &dev->unmap);
    if (error) {
        refuse(dev, (uint32_t)error, VPCI_WHY_UNMAP, dev->unmap.addr);
        return;
    }
    pump_begin(dev, OP_UNMAP);
}

void message_finish_unmap(struct vpci_dev *dev)
{
    int rc = 0;
    if (dev->unmap.flags & VFU_DMA_UNMAP_ALL)
        vpci_mem_clear(dev->mem);
    else
        rc = vpci_mem_unmap(dev->mem, dev->unmap.addr, dev->unmap.size);
    pump_remap(dev);
    pump_begin(dev, OP_NONE);
    if (rc < 0)
        refuse(dev, (uint32_t)-rc, VPCI_WHY_UNMAP, dev->unmap.addr);
    else
        succeed(dev, &dev->unmap, sizeof(dev->unmap));
}

/* ---- interrupts ---- */

static void set_irqs(struct vpci_dev *dev, struct message *m)
{
    struct vfu_irq_set set;
    memcpy(&set, m->data, sizeof(set));
    pump_unwatch_unmask(dev);
    int error = set.argsz < sizeof(set) ? EINVAL
                : vpci_irq_set(&dev->irq, &set, m->data + sizeof(set), m->len - sizeof(set), m->fds, m->n_fds);
    if (error)
        refuse(dev, (uint32_t)error, VPCI_WHY_IRQ, set.index);
    else
        succeed(dev, NULL, 0);
    pump_watch_unmask(dev);
}

/* ---- kicks without a message ---- */

static uint32_t n_ioeventfds(const struct vpci_dev *dev, uint32_t region)
{
    uint32_t n = region == VFU_REGION_BAR0 && dev->ioeventfds ? dev->n_queues : 0;
    uint32_t max = dev->max_fds < VFU_MAX_FDS ? dev->max_fds : VFU_MAX_FDS;
    return n < max ? n : max;
}

static bool make_kick_fds(struct vpci_dev *dev, uint32_t n, int *fds)
{
    for (uint32_t i = 0; i < n; i++) {
        vpci_queue *q = dev->queues[i];
        if (q->kick_fd < 0)
            pump_watch_kick(dev, q);
        if ((fds[i] = q->kick_fd) < 0)
            return false;
    }
    return true;
}

/* One eventfd a queue: a write of its index to queue_notify. Tells how much room it needs when there is too little. */
static void get_region_io_fds(struct vpci_dev *dev, struct message *m)
{
    struct vfu_region_io_fds io;
    struct vfu_ioeventfd subs[VFU_MAX_FDS] = {0};
    int fds[VFU_MAX_FDS];
    uint32_t off, width;
    memcpy(&io, m->data, sizeof(io));
    if (io.argsz < sizeof(io) || io.flags || io.count || io.index >= VFU_REGION_INDICES) {
        refuse(dev, EINVAL, VPCI_WHY_REGION, (uint64_t)io.index << 56);
        return;
    }
    uint32_t room = io.argsz, n = n_ioeventfds(dev, io.index);
    n = n && hot_kick_place(&dev->hot, &off, &width) ? n : 0;
    io.count = n;
    io.argsz = (uint32_t)(sizeof(io) + n * sizeof(subs[0]));
    if (!n || room < io.argsz) {
        succeed(dev, &io, sizeof(io));
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        subs[i] = (struct vfu_ioeventfd){.offset = off, .size = width, .fd_index = i, .flags = VFU_IOEVENTFD_DATAMATCH,
                                         .datamatch = i};
    conn_send(&dev->conn);   /* one reply with fds at a time */
    if (dev->request.flags & VFU_F_NO_REPLY)
        return;
    if (dev->conn.n_tx_fds)
        refuse(dev, EBUSY, VPCI_WHY_FDS, dev->conn.n_tx_fds);
    else if (!make_kick_fds(dev, n, fds))
        refuse(dev, EMFILE, VPCI_WHY_MEMORY, n);
    else if (!conn_reply_fds(&dev->conn, &dev->request, &io, sizeof(io), subs, n * sizeof(subs[0]), fds, n))
        dev->conn.gone = true;
}

/* ---- several writes in one message ---- */

static bool are_sound(const struct vfu_one_write *writes, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        if (writes[i].count > sizeof(writes[i].data))
            return false;
    return true;
}

static void region_write_multi(struct vpci_dev *dev, struct message *m)
{
    struct vfu_write_multi head;
    memcpy(&head, m->data, sizeof(head));
    size_t bytes = m->len - sizeof(head);
    struct vfu_one_write *writes = bytes ? malloc(bytes) : NULL;
    if (writes)
        memcpy(writes, m->data + sizeof(head), bytes);
    if (!writes || bytes % sizeof(*writes) || head.count != bytes / sizeof(*writes) || !are_sound(writes, head.count)) {
        free(writes);
        refuse(dev, EINVAL, VPCI_WHY_SHORT, sizeof(head) + head.count * sizeof(*writes));
        return;
    }
    dev->multi = (struct multi){.request = m->h, .writes = writes, .n = head.count};
}

static void finish_multi(struct vpci_dev *dev)
{
    struct vfu_write_multi head = {dev->multi.n};
    dev->request = dev->multi.request;
    free(dev->multi.writes);
    dev->multi.writes = NULL;
    dev->multi.n = 0;
    if (dev->multi.error)
        reply(dev, dev->multi.error, NULL, 0, NULL, 0);
    else
        succeed(dev, &head, sizeof(head));
}

bool message_go_on(struct vpci_dev *dev)
{
    struct multi *multi = &dev->multi;
    if (!multi->n)
        return false;
    if (multi->next == multi->n) {
        finish_multi(dev);
        return true;
    }
    const struct vfu_one_write *w = &multi->writes[multi->next++];
    struct message m = {
        .h = {.command = VFU_REGION_WRITE, .flags = VFU_F_NO_REPLY},
        .data = (const uint8_t *)w, .len = (uint32_t)(sizeof(struct vfu_region_access) + w->count),
    };
    dev->request = m.h;
    region_write(dev, &m);
    return true;
}

/* ---- the table of commands ---- */

static void not_supported(struct vpci_dev *dev, struct message *m)
{
    refuse(dev, ENOTSUP, VPCI_WHY_COMMAND, m->h.command);
}

static const struct command {
    void (*run)(struct vpci_dev *dev, struct message *m);
    uint32_t min_len;       /* of the payload */
    bool before_version;
} commands[] = {
    [VFU_VERSION] = {to_python, sizeof(struct vfu_version), true},
    [VFU_DMA_MAP] = {dma_map, sizeof(struct vfu_dma_map), false},
    [VFU_DMA_UNMAP] = {dma_unmap, sizeof(struct vfu_dma_unmap), false},
    [VFU_DEVICE_GET_INFO] = {to_python, sizeof(struct vfu_device_info), false},
    [VFU_DEVICE_GET_REGION_INFO] = {to_python, sizeof(struct vfu_region_info), false},
    [VFU_DEVICE_GET_REGION_IO_FDS] = {get_region_io_fds, sizeof(struct vfu_region_io_fds), false},
    [VFU_DEVICE_GET_IRQ_INFO] = {to_python, sizeof(struct vfu_irq_info), false},
    [VFU_DEVICE_SET_IRQS] = {set_irqs, sizeof(struct vfu_irq_set), false},
    [VFU_REGION_READ] = {region_read, sizeof(struct vfu_region_access), false},
    [VFU_REGION_WRITE] = {region_write, sizeof(struct vfu_region_access), false},
    [VFU_DEVICE_RESET] = {to_python, 0, false},
    [VFU_REGION_WRITE_MULTI] = {region_write_multi, sizeof(struct vfu_write_multi), false},
    [VFU_DEVICE_FEATURE] = {not_supported, 0, false},
    [VFU_MIG_DATA_READ] = {not_supported, 0, false},
    [VFU_MIG_DATA_WRITE] = {not_supported, 0, false},
};

static void execute(struct vpci_dev *dev, struct message *m)
{
    const struct command *c = m->h.command < ARRAY_LEN(commands) ? &commands[m->h.command] : &commands[0];
    if (!c->run)
        refuse(dev, EINVAL, VPCI_WHY_COMMAND, m->h.command);
    else if (m->n_fds > VFU_MAX_FDS)
        refuse(dev, EINVAL, VPCI_WHY_FDS, m->n_fds);
    else if (!c->before_version && !dev->conn.versioned)
        refuse(dev, EINVAL, VPCI_WHY_VERSION_FIRST, m->h.command);
    else if (m->len < c->min_len)
        refuse(dev, EINVAL, VPCI_WHY_SHORT, c->min_len);
    else
        c->run(dev, m);
}

static void take_reply(struct vpci_dev *dev, const struct message *m)
{
    if (!far_take_reply(dev, m))
        pump_note(dev, (vpci_event){.note = VPCI_NOTE_MESSAGE, .command = m->h.command, .b = VPCI_WHY_TYPE,
                                    .c = m->h.flags});
}

void message_execute(struct vpci_dev *dev, struct message *m)
{
    dev->request = m->h;
    dev->stats.messages++;
    if ((m->h.flags & VFU_F_TYPE_MASK) == 0)
        execute(dev, m);
    else if ((m->h.flags & VFU_F_TYPE_MASK) == VFU_F_REPLY)
        take_reply(dev, m);
    else
        refuse(dev, EINVAL, VPCI_WHY_TYPE, m->h.flags);
    message_close(m);
}
