/* A device made, started, stopped and looked at: the functions of api/dev.h that Python calls around the pump's life. */
#include "pump.h"

#include <sys/epoll.h>

static int make_queues(vpci_dev *dev, const vpci_dev_setup *setup)
{
    dev->queues = calloc(setup->n_queues ? setup->n_queues : 1, sizeof(*dev->queues));
    for (uint32_t i = 0; dev->queues && i < setup->n_queues; i++) {
        vpci_queue *q = vpci_queue_new(dev->mem, setup->queues[i].size, setup->max_sg);
        if (!q)
            return -ENOMEM;
        q->dev = dev;
        q->index = (uint16_t)i;
        q->engine = setup->queues[i].engine;
        q->engine_state = setup->queues[i].engine_state;
        q->kick_fd = -1;
        far_adopt(dev, q);
        dev->queues[dev->n_queues++] = q;
    }
    return dev->queues ? 0 : -ENOMEM;
}

vpci_dev *vpci_dev_new(const vpci_dev_setup *setup)
{
    vpci_dev *dev = calloc(1, sizeof(*dev));
    if (!dev)
        return NULL;
    conn_init(&dev->conn);
    pthread_mutex_init(&dev->awake, NULL);
    far_init(dev);
    memcpy(dev->region_sizes, setup->region_sizes, sizeof(dev->region_sizes));
    dev->cancel_ms = setup->cancel_ms;
    dev->close_ms = setup->close_ms;
    dev->listen_fd = dev->watched_unmask_fd = -1;
    dev->max_fds = 1;
    dev->ioeventfds = setup->ioeventfds;
    dev->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    dev->mem = vpci_mem_new();
    int rc = mailbox_init(&dev->box);
    if (dev->epoll_fd < 0 || !dev->mem || rc < 0 || setup->region_sizes[VFU_REGION_BAR0] > VFU_MAX_BAR0 ||
        vpci_irq_init(&dev->irq, setup->irq_counts) < 0 ||
        hot_init(&dev->hot, (uint32_t)setup->region_sizes[VFU_REGION_BAR0]) < 0 || make_queues(dev, setup) < 0) {
        vpci_dev_free(dev);
        return NULL;
    }
    return dev;
}

static int start(vpci_dev *dev, const vpci_front *front, void *state)
{
    dev->front = front;
    dev->front_state = state;
    int rc = pump_watch(dev, dev->box.wake_fd);
    if (rc < 0)
        return rc;
    /* Python's first table was posted before the start, and the thread takes it in its first turn. */
    mailbox_wake(&dev->box);
    rc = vpci_thread_start(&dev->thread, pump_run, dev, "vpci-pump");
    dev->thread_started = rc == 0;
    return rc;
}

int vpci_dev_start(vpci_dev *dev, int listen_fd)
{
    dev->listen_fd = listen_fd;
    dev->accepting = true;
    int rc = pump_watch(dev, listen_fd);
    return rc < 0 ? rc : start(dev, &own_front, dev);
}

int vpci_dev_start_front(vpci_dev *dev, const vpci_front *front, void *state)
{
    for (uint32_t i = 0; i < dev->n_queues; i++)
        dev->queues[i]->far = NULL;
    dev->irq.trigger = front->trigger;
    dev->irq.trigger_state = state;
    return start(dev, front, state);
}

void vpci_dev_free(vpci_dev *dev)
{
    if (!dev)
        return;
    if (dev->thread_started)
        pthread_join(dev->thread, NULL);
    far_fini(dev);
    conn_fini(&dev->conn);
    if (dev->irq.vectors)
        pump_forget_eventfds(dev);
    for (uint32_t i = 0; i < dev->n_queues; i++)
        vpci_queue_free(dev->queues[i]);
    free(dev->queues);
    free(dev->watches);
    vpci_irq_fini(&dev->irq);
    hot_fini(&dev->hot);
    vpci_mem_free(dev->mem);
    mailbox_fini(&dev->box);
    order_free(dev->answer);
    free(dev->python_data);
    if (dev->epoll_fd >= 0)
        close(dev->epoll_fd);
    pthread_mutex_destroy(&dev->awake);
    free(dev);
}

void vpci_dev_read_stats(vpci_dev *dev, vpci_dev_stats *stats)
{
    pthread_mutex_lock(&dev->awake);
    *stats = dev->stats;
    pthread_mutex_unlock(&dev->awake);
    vpci_irq_read_status(&dev->irq, &stats->isr, &stats->intx_status);
    pthread_mutex_lock(&dev->box.lock);
    stats->lost_notes = dev->box.lost_notes;
    pthread_mutex_unlock(&dev->box.lock);
}

void vpci_dev_queue_stats(vpci_dev *dev, uint32_t queue, vpci_queue_stats *stats)
{
    *stats = (vpci_queue_stats){0};
    pthread_mutex_lock(&dev->awake);
    if (queue < dev->n_queues)
        vpci_queue_read_stats(dev->queues[queue], stats);
    pthread_mutex_unlock(&dev->awake);
}

uint32_t vpci_dev_pending(vpci_dev *dev, uint8_t *buf, uint32_t len)
{
    return vpci_irq_pending(&dev->irq, buf, len);
}
