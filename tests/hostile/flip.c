/* See flip.h. Built by flip.py for the tests; no part of vpci. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "flip.h"

struct flipper {
    pthread_t thread;
    int stop;
    uint8_t *memory;
    struct flip_target *targets;
    uint32_t n_targets;
    uint64_t avail, used;
    uint16_t ahead;
    uint64_t count;
};

static void store(uint8_t *at, uint32_t width, uint64_t value)
{
    switch (width) {
    case 1: __atomic_store_n(at, (uint8_t)value, __ATOMIC_RELAXED); break;
    case 2: __atomic_store_n((uint16_t *)at, (uint16_t)value, __ATOMIC_RELAXED); break;
    case 4: __atomic_store_n((uint32_t *)at, (uint32_t)value, __ATOMIC_RELAXED); break;
    default: __atomic_store_n((uint64_t *)at, value, __ATOMIC_RELAXED); break;
    }
}

static void *flip(void *arg)
{
    struct flipper *f = arg;
    uint64_t dice = 88172645463325252ull;
    while (!__atomic_load_n(&f->stop, __ATOMIC_RELAXED))
        for (uint32_t i = 0; i < f->n_targets; i++) {
            const struct flip_target *t = &f->targets[i];
            dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
            store(f->memory + t->off, t->width, t->values[dice % t->n]);
            f->count++;
        }
    return NULL;
}

static void *feed(void *arg)
{
    struct flipper *f = arg;
    uint16_t *avail = (uint16_t *)(f->memory + f->avail), *used = (uint16_t *)(f->memory + f->used);
    while (!__atomic_load_n(&f->stop, __ATOMIC_RELAXED)) {
        __atomic_store_n(avail, (uint16_t)(__atomic_load_n(used, __ATOMIC_ACQUIRE) + f->ahead), __ATOMIC_RELEASE);
        f->count++;
    }
    return NULL;
}

static struct flipper *start(struct flipper *f, void *(*run)(void *))
{
    if (pthread_create(&f->thread, NULL, run, f)) {
        free(f->targets);
        free(f);
        return NULL;
    }
    return f;
}

struct flipper *flip_start(uint8_t *memory, const struct flip_target *targets, uint32_t n_targets)
{
    struct flipper *f = calloc(1, sizeof(*f));
    f->memory = memory;
    f->n_targets = n_targets;
    f->targets = malloc(n_targets * sizeof(*targets));
    memcpy(f->targets, targets, n_targets * sizeof(*targets));
    return start(f, flip);
}

struct flipper *flip_feed(uint8_t *memory, uint64_t avail_idx_off, uint64_t used_idx_off, uint16_t ahead)
{
    struct flipper *f = calloc(1, sizeof(*f));
    f->memory = memory;
    f->avail = avail_idx_off;
    f->used = used_idx_off;
    f->ahead = ahead;
    return start(f, feed);
}

uint64_t flip_stop(struct flipper *f)
{
    __atomic_store_n(&f->stop, 1, __ATOMIC_RELAXED);
    pthread_join(f->thread, NULL);
    uint64_t count = f->count;
    free(f->targets);
    free(f);
    return count;
}
