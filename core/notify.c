/* A command whose filter has a listener: what the filter denies is told to Python, which answers (seccomp_unotify(2)).
 *
 * The listener is a descriptor that seccomp(2) gives to the one whose filter it is, who can't send it anywhere any more:
 * the filter may deny just that call, and the answer would have to come through the descriptor. So there are three:
 * init stands still; the middle one shares its memory, and has a descriptor table of its own; the command shares both
 * memory and table with the middle one, installs the filter and executes. The middle one, which has no filter, finds the
 * listener in the table and sends it. execve gives the command a table of its own, in which the listener, like all that
 * is close-on-exec, isn't. */
#include "rf.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct watched {
    struct rf_start start;
    char *stack_end;
    int channel; /* where the listener is sent: Python's, or in a guest one of init's own */
    pid_t pid, alive; /* the command's, both written by the kernel; `alive` is 0 once it has executed or ended */
};

static int command(void *arg) {
    struct watched *w = arg;
    rf_start_command(&w->start);
}

/* Sends the listener as soon as there is one: the very execve may wait for its answer. Nothing wakes us but the clock, as
 * a call that would might be denied too. Nor by a futex: its timeout would be an error, and errno is the command's too. */
static void pass_listener(struct watched *w, int channel) {
    for (bool sent = false, gone = false; !gone;) {
        gone = __atomic_load_n(&w->alive, __ATOMIC_ACQUIRE) == 0;
        int listener = __atomic_load_n(&w->start.readback->listener, __ATOMIC_ACQUIRE);
        if (listener >= 0 && !sent) {
            /* With nobody to answer, what would ask gets ENOSYS once nobody holds the listener. */
            if (rf_send(channel, false, RF_LISTENER, w->start.exec->id, NULL, 0, listener) < 0) close(listener);
            sent = true;
            if (w->start.plan->listen) w->start.plan->listen->fd = listener; /* in our table; init takes its own once it goes on */
        }
        if (sent && w->start.plan->listen) rf_listen_serve(w->start.plan->listen);
        const struct timespec pause = {.tv_nsec = 50000};
        if (!gone) nanosleep(&pause, NULL);
    }
}

static int middle(void *arg) {
    struct watched *w = arg;
    /* Above all that the command puts in its place. */
    int channel = fcntl(w->channel, F_DUPFD_CLOEXEC, 2 * RF_FDS_MAX);
    w->alive = 1;
    int made = -1;
    if (channel >= 0 && prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0)
        /* Init's child, not ours: the workload must not find a child that it doesn't know. The kernel writes its pid before
         * it runs, so that init knows of it whatever becomes of us. */
        made = clone(command, w->stack_end, CLONE_VM | CLONE_FILES | CLONE_PARENT | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD, w,
                     &w->pid, NULL, &w->alive);
    if (made < 0) {
        rf_fail(w->start.error, "start", "clone", "CLONE_FILES");
        _exit(127);
    }
    pass_listener(w, channel);
    _exit(0);
}

static int spawn_watched(struct watched *w, char *stack_end) {
    /* We go on once the middle one has ended, which it does only when the command is out of our memory. */
    pid_t child = clone(middle, stack_end, CLONE_VM | CLONE_VFORK | SIGCHLD, w);
    if (child < 0) return rf_fail(w->start.error, "start", "clone", "");
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    if (status == 0) return rf_started(w->pid, &w->start);
    /* The middle one was killed, by another process of its user: the command may still run in our memory, on our stack. */
    if (WIFSIGNALED(status)) rf_fail_errno(w->start.error, ECANCELED, "start", "clone", "killed before it was started");
    if (w->pid > 0) {
        kill(w->pid, SIGKILL);
        waitpid(w->pid, NULL, 0);
    }
    return -1;
}

int rf_spawn_watched(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, pid_t *pid,
                     struct rf_readback *rb, struct rf_error *e) {
    _Alignas(16) char stacks[2][96 << 10];
    struct watched w = {.start = {.plan = p, .exec = x, .fds = fds, .nfds = nfds, .readback = rb, .error = e},
                        .stack_end = stacks[1] + sizeof stacks[1], .channel = p->channel_fd, .pid = -1};
    rb->listener = -1;
    int own[2] = {-1, -1}, former = p->listen ? p->listen->fd : -1;
    if (p->listen && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, own) < 0) return rf_fail(e, "start", "socketpair", "");
    if (p->listen) w.channel = own[1], p->listen->fd = -1;
    int r = spawn_watched(&w, stacks[0] + sizeof stacks[0]);
    *pid = w.pid;
    if (p->listen) {
        p->listen->fd = former; /* of an earlier command; what the middle one had there was a number in its own table */
        if (r == 0) r = rf_listen_take(p->listen, own[0], e);
        close(own[0]);
        close(own[1]);
    }
    return r;
}
