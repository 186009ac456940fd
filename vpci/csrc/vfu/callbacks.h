/* The functions that vpci/pyvfio_user.py defines: cffi takes them as extern "Python+C", pyvfio_user.c calls them.
 * Those that answer return -1 and set errno for an error. */

void pyvfu_log(vfu_ctx_t *ctx, int level, const char *msg);
ssize_t pyvfu_region(vfu_ctx_t *ctx, int region_idx, char *buf, size_t count, uint64_t offset, bool is_write);
void pyvfu_irq_state(vfu_ctx_t *ctx, int type, uint32_t start, uint32_t count, bool mask);
int pyvfu_reset(vfu_ctx_t *ctx, vfu_reset_type_t type);
int pyvfu_quiesce(vfu_ctx_t *ctx);
void pyvfu_dma_register(vfu_ctx_t *ctx, vfu_dma_info_t *info);
void pyvfu_dma_unregister(vfu_ctx_t *ctx, vfu_dma_info_t *info);
int pyvfu_migration_transition(vfu_ctx_t *ctx, vfu_migr_state_t state);
ssize_t pyvfu_migration_read(vfu_ctx_t *ctx, void *buf, uint64_t count);
ssize_t pyvfu_migration_write(vfu_ctx_t *ctx, void *buf, uint64_t count);
