/* What vpci/pyvfio_user.py gives to the library as callbacks; each ends in one of callbacks.h.
 * The library's callbacks carry no index, so each region and each type of interrupts has one of its own. */

vfu_log_fn_t *vpci_pyvfu_log(void);
vfu_region_access_cb_t *vpci_pyvfu_region(int region_idx);
vfu_dev_irq_state_cb_t *vpci_pyvfu_irq_state(int type);
vfu_reset_cb_t *vpci_pyvfu_reset(void);
vfu_device_quiesce_cb_t *vpci_pyvfu_quiesce(void);
vfu_dma_register_cb_t *vpci_pyvfu_dma_register(void);
vfu_dma_unregister_cb_t *vpci_pyvfu_dma_unregister(void);
const vfu_migration_callbacks_t *vpci_pyvfu_migration(void);
