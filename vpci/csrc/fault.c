/* SIGBUS: guest memory whose file has shrunk. ring.c runs what touches such memory under a guard; a fault there ends as
 * a stopped queue or a failed request instead of a dead process. */
#include "core.h"

#include <setjmp.h>
#include <signal.h>

static __thread sigjmp_buf *guard_of_this_thread;
static struct sigaction before_us;

/* Not ours: whoever was there before deals with it. */
static void pass_on(int number, siginfo_t *info, void *context)
{
    if (before_us.sa_flags & SA_SIGINFO)
        before_us.sa_sigaction(number, info, context);
    else if (before_us.sa_handler != SIG_DFL && before_us.sa_handler != SIG_IGN)
        before_us.sa_handler(number);
    else
        sigaction(number, &before_us, NULL);   /* the access is made again, and the default action taken */
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    if (guard_of_this_thread)
        siglongjmp(*guard_of_this_thread, 1);
    pass_on(number, info, context);
}

static void install(void)
{
    /* NODEFER: we leave the handler by a jump that does not restore the signal mask. */
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before_us);
}

void vpci_guard_install(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install);
}

bool vpci_guard(const vpci_mem *mem, void (*work)(void *), void *arg)
{
    sigjmp_buf here, *volatile outer = guard_of_this_thread;
    if (!vpci_mem_may_fault(mem)) {
        work(arg);
        return true;
    }
    if (sigsetjmp(here, 0)) {
        guard_of_this_thread = outer;
        return false;
    }
    guard_of_this_thread = &here;
    work(arg);
    guard_of_this_thread = outer;
    return true;
}
