/* The core as a front of another module sees it: the table through which it calls the pump's thread. What it asks for
 * is what the own front's messages ask for, by the same functions; where a message of the own front would wait, the
 * call does. */
#include "pump.h"

static void watch(vpci_dev *dev, int fd, uint32_t events)
{
    pump_watch_for(dev, fd, events);
}

static void wake(vpci_dev *dev)
{
    mailbox_wake(&dev->box);
}

static int may_execute(vpci_dev *dev)
{
    return dev->op == OP_NONE;
}

static void refused(vpci_dev *dev, uint32_t command, const char *why)
{
    vpci_event note = {.note = VPCI_NOTE_FRONT, .command = command};
    strncpy(note.text, why, sizeof(note.text) - 1);
    pump_note(dev, note);
}

static void access_region(vpci_dev *dev, uint32_t region, uint64_t offset, uint32_t count, const void *data)
{
    message_access(dev, &(struct vfu_region_access){.region = region, .offset = offset, .count = count}, data);
    pump_wait(dev);
}

static void reset(vpci_dev *dev)
{
    message_reset(dev);
    pump_wait(dev);
}

static int map(vpci_dev *dev, uint64_t gpa, uint64_t size, void *hva, uint32_t perm)
{
    int rc = vpci_mem_borrow(dev->mem, gpa, size, hva, perm);
    dev->stats.messages++;
    pump_remap(dev);
    return rc;
}

static int unmap(vpci_dev *dev, uint64_t gpa, uint64_t size)
{
    int rc = vpci_mem_unmap(dev->mem, gpa, size);
    dev->stats.messages++;
    pump_remap(dev);
    return rc;
}

static int quiesce(vpci_dev *dev, int drop, uint64_t gpa, uint64_t size)
{
    dev->unmap = (struct vfu_dma_unmap){.flags = size ? 0 : VFU_DMA_UNMAP_ALL, .addr = gpa, .size = size};
    return pump_quiesce(dev, drop);
}

static void mask(vpci_dev *dev, uint32_t index, uint32_t start, uint32_t count, int masked)
{
    dev->stats.messages++;
    vpci_irq_mask(&dev->irq, index, start, count, masked);
}

static void armed(vpci_dev *dev)
{
    vpci_irq_armed(&dev->irq);
}

static const vpci_core core = {
    .abi = VPCI_FRONT_ABI, .watch = watch, .wake = wake, .may_execute = may_execute, .connected = pump_connected,
    .turned_away = pump_turned_away, .disconnected = pump_begin_closing, .refused = refused, .access = access_region,
    .reset = reset, .map = map, .unmap = unmap, .quiesce = quiesce, .mask = mask, .armed = armed,
};

const vpci_core *vpci_core_table(void)
{
    return &core;
}
