/* An engine that keeps chains until it is told to let them go: built by foreign.py into an extension module of its own,
 * with nothing of vpci but its public headers. The pump calls serve() and cancel(), a test calls the rest. */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include "mem.h"
#include "ring.h"
#include "engine.h"
#include "gate.h"

enum { FILL = 0xc5, BEGUN = 1, FILL_BYTES = 4096 };

struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    const vpci_host *host;
    vpci_chain *first, **last;
    uint64_t features;
    gate_counts n;
    bool open, blocking;
};

static void finish(struct gate *g, vpci_chain *chain, bool fill)
{
    uint8_t bytes[FILL_BYTES];
    uint32_t len = 0;
    memset(bytes, FILL, sizeof(bytes));
    while (fill && !chain->error && len < chain->in_len) {
        uint32_t left = chain->in_len - len;
        len += g->host->write(chain, len, bytes, left < sizeof(bytes) ? left : sizeof(bytes));
    }
    g->host->done(chain, len);
}

static void keep(struct gate *g, vpci_chain *chain)
{
    chain->next = NULL;
    chain->scratch[0] = 0;
    *g->last = chain;
    g->last = &chain->next;
    g->n.held++;
    pthread_cond_broadcast(&g->changed);
}

static void serve(void *state, const vpci_host *host, vpci_chain *chain)
{
    struct gate *g = state;
    pthread_mutex_lock(&g->lock);
    g->host = host;
    g->n.served++;
    bool open = g->open;
    if (!open)
        keep(g, chain);
    g->n.in_serve++;
    pthread_cond_broadcast(&g->changed);
    while (g->blocking)
        pthread_cond_wait(&g->changed, &g->lock);
    g->n.in_serve--;
    pthread_mutex_unlock(&g->lock);
    if (open)
        finish(g, chain, true);
}

/* Take up to n chains that wanted() picks off the list; called with the lock held. */
static vpci_chain *take(struct gate *g, int n, int queue, bool only_unbegun)
{
    vpci_chain *out = NULL, **out_last = &out, **at = &g->first;
    while (*at && n) {
        vpci_chain *chain = *at;
        if ((queue >= 0 && chain->queue_index != queue) || (only_unbegun && chain->scratch[0] == BEGUN)) {
            at = &chain->next;
            continue;
        }
        *at = chain->next;
        chain->next = NULL;
        *out_last = chain;
        out_last = &chain->next;
        g->n.held--;
        n--;
    }
    for (at = &g->first; *at; at = &(*at)->next)
        ;
    g->last = at;
    return out;
}

static void finish_all(struct gate *g, vpci_chain *chain, bool fill)
{
    for (vpci_chain *next; chain; chain = next) {
        next = chain->next;
        finish(g, chain, fill);
    }
}

static void cancel(void *state, uint32_t queue_index)
{
    struct gate *g = state;
    pthread_mutex_lock(&g->lock);
    vpci_chain *given_up = take(g, -1, (int)queue_index, true);
    g->n.cancels++;
    pthread_mutex_unlock(&g->lock);
    finish_all(g, given_up, false);
}

static void features(void *state, uint64_t bits)
{
    struct gate *g = state;
    pthread_mutex_lock(&g->lock);
    g->features = bits;
    pthread_mutex_unlock(&g->lock);
}

static const vpci_engine engine = {.abi = VPCI_ENGINE_ABI, .serve = serve, .cancel = cancel, .features = features};

const void *gate_engine(void)
{
    return &engine;
}

gate *gate_new(void)
{
    gate *g = calloc(1, sizeof(*g));
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    g->last = &g->first;
    return g;
}

void gate_free(gate *g)
{
    pthread_cond_destroy(&g->changed);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

int gate_wait(gate *g, uint32_t held, uint32_t in_serve, int timeout_s)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += timeout_s;
    int rc = 0;
    pthread_mutex_lock(&g->lock);
    while ((g->n.held < held || g->n.in_serve < in_serve) && !rc)
        rc = pthread_cond_timedwait(&g->changed, &g->lock, &until);
    pthread_mutex_unlock(&g->lock);
    return !rc;
}

void gate_release(gate *g, int n, int queue)
{
    pthread_mutex_lock(&g->lock);
    vpci_chain *chains = take(g, n, queue, false);
    pthread_mutex_unlock(&g->lock);
    finish_all(g, chains, true);
}

void gate_begin(gate *g, int n)
{
    pthread_mutex_lock(&g->lock);
    for (vpci_chain *chain = g->first; chain && n; chain = chain->next, n--)
        chain->scratch[0] = BEGUN;
    pthread_mutex_unlock(&g->lock);
}

void gate_open(gate *g, int open)
{
    pthread_mutex_lock(&g->lock);
    g->open = open;
    pthread_mutex_unlock(&g->lock);
}

void gate_block(gate *g, int block)
{
    pthread_mutex_lock(&g->lock);
    g->blocking = block;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

gate_counts gate_read(gate *g, uint64_t *features_seen)
{
    pthread_mutex_lock(&g->lock);
    gate_counts n = g->n;
    *features_seen = g->features;
    pthread_mutex_unlock(&g->lock);
    return n;
}
