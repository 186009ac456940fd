/* Between libvfio-user's callbacks and Python's pyvfu_* functions: adds the index that a callback lacks. */
#include "vfu.h"
#include "callbacks.h"

_Static_assert(VFU_MIGR_CALLBACKS_VERS == 2, "the migration callbacks of this libvfio-user are not version 2");
_Static_assert(VFU_PCI_DEV_NUM_REGIONS == 9, "this libvfio-user does not have 9 regions");
_Static_assert(VFU_DEV_NUM_IRQS == 5, "this libvfio-user does not have 5 types of interrupts");

#define REGION(n) \
    static ssize_t region_##n(vfu_ctx_t *ctx, char *buf, size_t count, loff_t offset, bool is_write) \
    { \
        return pyvfu_region(ctx, n, buf, count, (uint64_t)offset, is_write); \
    }
REGION(0) REGION(1) REGION(2) REGION(3) REGION(4) REGION(5) REGION(6) REGION(7) REGION(8)

#define IRQ_STATE(n) \
    static void irq_state_##n(vfu_ctx_t *ctx, uint32_t start, uint32_t count, bool mask) \
    { \
        pyvfu_irq_state(ctx, n, start, count, mask); \
    }
IRQ_STATE(0) IRQ_STATE(1) IRQ_STATE(2) IRQ_STATE(3) IRQ_STATE(4)

static vfu_region_access_cb_t *const regions[VFU_PCI_DEV_NUM_REGIONS] = {
    region_0, region_1, region_2, region_3, region_4, region_5, region_6, region_7, region_8,
};

static vfu_dev_irq_state_cb_t *const irq_states[VFU_DEV_NUM_IRQS] = {
    irq_state_0, irq_state_1, irq_state_2, irq_state_3, irq_state_4,
};

static const vfu_migration_callbacks_t migration = {
    .version = VFU_MIGR_CALLBACKS_VERS,
    .transition = pyvfu_migration_transition,
    .read_data = pyvfu_migration_read,
    .write_data = pyvfu_migration_write,
};

/* NULL for an index that there is not: the library then says so itself, or keeps the region without a callback. */
vfu_region_access_cb_t *vpci_pyvfu_region(int region_idx)
{
    return region_idx >= 0 && region_idx < VFU_PCI_DEV_NUM_REGIONS ? regions[region_idx] : NULL;
}

vfu_dev_irq_state_cb_t *vpci_pyvfu_irq_state(int type)
{
    return type >= 0 && type < VFU_DEV_NUM_IRQS ? irq_states[type] : NULL;
}

vfu_log_fn_t *vpci_pyvfu_log(void) { return pyvfu_log; }
vfu_reset_cb_t *vpci_pyvfu_reset(void) { return pyvfu_reset; }
vfu_device_quiesce_cb_t *vpci_pyvfu_quiesce(void) { return pyvfu_quiesce; }
vfu_dma_register_cb_t *vpci_pyvfu_dma_register(void) { return pyvfu_dma_register; }
vfu_dma_unregister_cb_t *vpci_pyvfu_dma_unregister(void) { return pyvfu_dma_unregister; }
const vfu_migration_callbacks_t *vpci_pyvfu_migration(void) { return &migration; }
