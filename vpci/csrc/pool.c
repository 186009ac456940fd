/* A few threads for calls that may block. Engines hand it jobs; a job finishes its chain from its own thread. */
#include "core.h"

#include <signal.h>

struct vpci_pool {
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct vpci_job *first, **last;
    bool ending;
    uint32_t n_threads;
    pthread_t threads[];
};

/* Signals belong to Python's main thread: every thread of ours blocks them. */
int vpci_thread_start(pthread_t *thread, void *(*run)(void *), void *arg, const char *name)
{
    sigset_t all, old;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);   /* a fault of our own: blocked, it would kill the process (fault.c) */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!rc)
        pthread_setname_np(*thread, name);
    return -rc;
}

static struct vpci_job *take(struct vpci_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    while (!pool->first && !pool->ending)
        pthread_cond_wait(&pool->work, &pool->lock);
    struct vpci_job *job = pool->first;
    if (job && !(pool->first = job->next))
        pool->last = &pool->first;
    pthread_mutex_unlock(&pool->lock);
    return job;
}

static void *run(void *arg)
{
    for (struct vpci_job *job; (job = take(arg));)
        job->run(job);
    return NULL;
}

struct vpci_pool *vpci_pool_new(uint32_t n_threads, const char *name)
{
    struct vpci_pool *pool = calloc(1, sizeof(*pool) + n_threads * sizeof(pool->threads[0]));
    if (!pool)
        return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pool->last = &pool->first;
    for (; pool->n_threads < n_threads; pool->n_threads++)
        if (vpci_thread_start(&pool->threads[pool->n_threads], run, pool, name) < 0) {
            vpci_pool_free(pool);
            return NULL;
        }
    return pool;
}

void vpci_pool_free(struct vpci_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->ending = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->n_threads; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

void vpci_pool_submit(struct vpci_pool *pool, struct vpci_job *job)
{
    pthread_mutex_lock(&pool->lock);
    job->next = NULL;
    *pool->last = job;
    pool->last = &job->next;
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

struct vpci_job *vpci_pool_withdraw(struct vpci_pool *pool, bool (*wanted)(struct vpci_job *, void *), void *arg)
{
    struct vpci_job *out = NULL;
    pthread_mutex_lock(&pool->lock);
    struct vpci_job **at = &pool->first;
    while (*at) {
        struct vpci_job *job = *at;
        if (!wanted(job, arg)) {
            at = &job->next;
            continue;
        }
        *at = job->next;
        job->next = out;
        out = job;
    }
    pool->last = at;
    pthread_mutex_unlock(&pool->lock);
    return out;
}
