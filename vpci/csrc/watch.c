/* Descriptors of engines in the pump's epoll set: an engine asks for them through vpci_host, the pump hands it their
 * events. All of it with dev->awake held. */
#include "pump.h"

#include <sys/epoll.h>

static struct watch *find(const struct vpci_dev *dev, int fd)
{
    for (uint32_t i = 0; i < dev->n_watches; i++)
        if (dev->watches[i].fd == fd)
            return &dev->watches[i];
    return NULL;
}

static struct watch *add_row(struct vpci_dev *dev)
{
    struct watch *rows = realloc(dev->watches, (dev->n_watches + 1) * sizeof(*rows));
    if (!rows)
        return NULL;
    dev->watches = rows;
    return &rows[dev->n_watches++];
}

int watch_add(struct vpci_dev *dev, const vpci_engine *engine, void *state, int fd, uint32_t events)
{
    struct epoll_event ev = {.events = events | EPOLLET, .data.fd = fd};
    struct watch *row = find(dev, fd);
    int op = row ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (!row && !(row = add_row(dev)))
        return -ENOMEM;
    *row = (struct watch){fd, engine, state};
    if (!epoll_ctl(dev->epoll_fd, op, fd, &ev))
        return 0;
    int error = errno;
    watch_remove(dev, fd);
    return -error;
}

void watch_remove(struct vpci_dev *dev, int fd)
{
    struct watch *row = find(dev, fd);
    if (!row)
        return;
    epoll_ctl(dev->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
    *row = dev->watches[--dev->n_watches];
}

/* Also a queue that is stopped: its engine may have something to throw away. */
void watch_look(struct vpci_dev *dev, uint32_t queue_index)
{
    if (queue_index < dev->n_queues)
        dev->queues[queue_index]->runnable = true;
}

bool watch_event(struct vpci_dev *dev, int fd, uint32_t events)
{
    struct watch *row = find(dev, fd);
    if (row)
        row->engine->event(row->state, vpci_host_table(), fd, events);
    return row;
}
