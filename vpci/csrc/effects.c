/* What Python decided, carried out: the pump hands it an order whose drain is over; it changes queues, interrupts and
 * the hot table. One function an op (enum vpci_effect_op), found by a table. */
#include "pump.h"

void effects_stop_queue(vpci_queue *q)
{
    vpci_queue_stop(q);
    q->draining = q->dirty = false;
    q->runnable = q->engine->run != NULL;   /* it may have something to throw away, and others wait behind that */
}

static void fx_queue_stop(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)dev, (void)fx;
    effects_stop_queue(q);
}

static void fx_queue_start(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)dev;
    vpci_queue_start(q, (uint32_t)fx->value);
    q->runnable = false;
}

static void fx_features(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    dev->features = fx->value;
    for (uint32_t i = 0; i < dev->n_queues; i++)
        if (dev->queues[i]->engine->features)
            dev->queues[i]->engine->features(dev->queues[i]->engine_state, fx->value);
}

static void fx_ring_rules(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    for (uint32_t i = 0; i < dev->n_queues; i++)
        vpci_queue_rules(dev->queues[i], (uint32_t)fx->value);
}

static void fx_queue_vector(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)dev;
    q->vector = (uint16_t)fx->value;
}

static void fx_config_vector(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    dev->irq.config_vector = (uint16_t)fx->value;
}

static void fx_msix(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    vpci_irq_set_msix(&dev->irq, fx->value & 1, fx->value >> 1 & 1);
}

static void fx_intx_disable(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    vpci_irq_set_intx_disable(&dev->irq, fx->value);
}

static void fx_bus_master(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    dev->held_by_bus_master = !fx->value;
}

static void fx_vector_mask(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    vpci_irq_entry_mask(&dev->irq, fx->queue, fx->value);
}

static void fx_isr_clear(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q, (void)fx;
    vpci_irq_clear(&dev->irq);
}

static void fx_notify_reset(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q, (void)fx;
    hot_set_notify(&dev->hot, 0);
}

static void fx_raise_config(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q, (void)fx;
    dev->stats.config_interrupts += vpci_irq_raise(&dev->irq, dev->irq.config_vector, VPCI_ISR_CONFIG);
}

static void fx_kick(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    hot_set_notify(&dev->hot, (uint16_t)fx->queue);
    pump_kick(dev, fx->queue);
}

static void fx_max_transfer(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    dev->far.max_len = fx->value < FAR_PIECE ? (uint32_t)fx->value : FAR_PIECE;
}

static void fx_max_fds(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx)
{
    (void)q;
    dev->max_fds = (uint32_t)fx->value;
}

static const struct {
    void (*run)(struct vpci_dev *dev, vpci_queue *q, const vpci_effect *fx);
    bool needs_queue;
} effects[VPCI_FX_OPS] = {
    [VPCI_FX_QUEUE_STOP] = {fx_queue_stop, true},
    [VPCI_FX_QUEUE_START] = {fx_queue_start, true},
    [VPCI_FX_FEATURES] = {fx_features, false},
    [VPCI_FX_RING_RULES] = {fx_ring_rules, false},
    [VPCI_FX_QUEUE_VECTOR] = {fx_queue_vector, true},
    [VPCI_FX_CONFIG_VECTOR] = {fx_config_vector, false},
    [VPCI_FX_MSIX] = {fx_msix, false},
    [VPCI_FX_INTX_DISABLE] = {fx_intx_disable, false},
    [VPCI_FX_BUS_MASTER] = {fx_bus_master, false},
    [VPCI_FX_VECTOR_MASK] = {fx_vector_mask, false},
    [VPCI_FX_ISR_CLEAR] = {fx_isr_clear, false},
    [VPCI_FX_NOTIFY_RESET] = {fx_notify_reset, false},
    [VPCI_FX_RAISE_CONFIG] = {fx_raise_config, false},
    [VPCI_FX_KICK] = {fx_kick, false},
    [VPCI_FX_MAX_TRANSFER] = {fx_max_transfer, false},
    [VPCI_FX_MAX_FDS] = {fx_max_fds, false},
};

void effects_apply(struct vpci_dev *dev, const struct order *o)
{
    /* The table first: a config interrupt must find the new bytes readable (D9). */
    hot_install(&dev->hot, o->rows, o->n_rows);
    for (uint32_t i = 0; i < o->n_effects; i++) {
        const vpci_effect *fx = &o->effects[i];
        vpci_queue *q = fx->queue < dev->n_queues ? dev->queues[fx->queue] : NULL;
        if (fx->op < VPCI_FX_OPS && (q || !effects[fx->op].needs_queue))
            effects[fx->op].run(dev, q, fx);
    }
}
