/* Starting init where it doesn't only get namespaces of its own: in some that exist already, and with clocks set ahead.
 *
 * A process of the launcher's that goes there itself could come back with something of it. So a child goes in first,
 * clones init as its own sibling, and is gone: setns(2) into a PID namespace, and unshare(2) of a time namespace, take
 * effect for children only in any case. */
#include "rf.h"

#include <fcntl.h>
#include <linux/nsfs.h>
#include <linux/sched.h>
#include <sched.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct answer { pid_t pid; struct rf_error error; };

static const char *name_of(uint64_t flag) {
    switch (flag) {
    case CLONE_NEWUSER: return "user namespace";
    case CLONE_NEWPID: return "PID namespace";
    case CLONE_NEWNET: return "network namespace";
    case CLONE_NEWIPC: return "IPC namespace";
    case CLONE_NEWUTS: return "UTS namespace";
    case CLONE_NEWCGROUP: return "cgroup namespace";
    default: return "time namespace";
    }
}

/* The kernel checks the type as well. This says it in words, and before anything was entered. */
static int check_type(const struct rf_join *j, struct rf_error *e) {
    int type = ioctl(j->fd, NS_GET_NSTYPE);
    if (type < 0) return rf_fail(e, "namespaces", "ioctl NS_GET_NSTYPE", name_of(j->flag));
    return (uint64_t)type == j->flag ? 0 : rf_fail_errno(e, EINVAL, "namespaces", "NS_GET_NSTYPE", name_of(j->flag));
}

/* What the privileges of here reach is entered before the user namespace, where they end; what only the privileges of
 * there reach, after it. */
static int enter(const struct rf_launch *l, struct rf_error *e) {
    bool left[RF_JOINS_MAX] = {false};
    int user = -1;
    for (unsigned i = 0; i < l->njoins; i++) {
        const struct rf_join *j = &l->joins[i];
        if (check_type(j, e) < 0) return -1;
        if (j->flag == CLONE_NEWUSER) user = j->fd;
    }
    for (unsigned i = 0; i < l->njoins; i++) {
        const struct rf_join *j = &l->joins[i];
        if (j->flag == CLONE_NEWUSER || setns(j->fd, (int)j->flag) == 0) continue;
        if (user < 0 || errno != EPERM) return rf_fail(e, "namespaces", "setns", name_of(j->flag));
        left[i] = true;
    }
    if (user >= 0 && setns(user, CLONE_NEWUSER) < 0) return rf_fail(e, "namespaces", "setns", name_of(CLONE_NEWUSER));
    for (unsigned i = 0; i < l->njoins; i++)
        if (left[i] && setns(l->joins[i].fd, (int)l->joins[i].flag) < 0) return rf_fail(e, "namespaces", "setns", name_of(l->joins[i].flag));
    return 0;
}

/* Seconds and nanoseconds as the kernel takes them: the latter never negative. */
static void split(int64_t ns, long long *seconds, long long *rest) {
    *seconds = ns / 1000000000;
    *rest = ns % 1000000000;
    if (*rest < 0) *rest += 1000000000, *seconds -= 1;
}

/* The offsets of a time namespace can be written until its first process is in it (time_namespaces(7)): unshare puts only
 * our children there, and clone3 with CLONE_NEWTIME would be too late. */
static int set_clocks(int proc, const struct rf_launch *l, struct rf_error *e) {
    uint64_t flags = CLONE_NEWTIME | (l->clone_flags & CLONE_NEWUSER); /* the user namespace that is to own it first */
    if (unshare((int)flags) < 0) return rf_fail(e, "clocks", "unshare", "CLONE_NEWTIME");
    long long monotonic[2], boottime[2];
    split(l->monotonic_ns, &monotonic[0], &monotonic[1]);
    split(l->boottime_ns, &boottime[0], &boottime[1]);
    char text[128];
    /* By number, CLOCK_MONOTONIC and CLOCK_BOOTTIME: the names are of Linux 5.6 too, but this is shorter. */
    int n = snprintf(text, sizeof text, "1 %lld %lld\n7 %lld %lld\n", monotonic[0], monotonic[1], boottime[0], boottime[1]);
    int fd = openat(proc, "self/timens_offsets", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return rf_fail(e, "clocks", "open", "/proc/self/timens_offsets");
    int r = write(fd, text, (size_t)n) == n ? 0 : rf_fail(e, "clocks", "write", text);
    close(fd);
    return r;
}

/* A child of our parent's. */
static pid_t clone_sibling(uint64_t flags) {
    struct clone_args args = {.flags = flags | CLONE_PARENT | CLONE_CLEAR_SIGHAND}; /* with CLONE_PARENT no signal is named */
    return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

/* In the child: 0 in init, never back otherwise. */
static pid_t go_in(int proc, const struct rf_launch *l, int reply) {
    struct answer a = {.pid = -1};
    uint64_t flags = l->clone_flags;
    int r = prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0 ? rf_fail(&a.error, "launch", "prctl", "PR_SET_PDEATHSIG") : enter(l, &a.error);
    if (r == 0 && l->has_offsets) {
        r = set_clocks(proc, l, &a.error);
        flags &= ~(uint64_t)(CLONE_NEWTIME | CLONE_NEWUSER); /* they are there: init only has to be born into them */
    }
    if (r == 0 && (a.pid = clone_sibling(flags)) == 0) return 0;
    if (r == 0 && a.pid < 0) rf_fail(&a.error, "launch", "clone3", "");
    rf_write_all(reply, &a, sizeof a);
    _exit(0);
}

pid_t rf_clone_elsewhere(int proc, const struct rf_launch *l, struct rf_error *e) {
    int reply[2], pidfd = -1;
    if (pipe2(reply, O_CLOEXEC) < 0) return rf_fail(e, "launch", "pipe2", "");
    pid_t child = rf_clone(0, &pidfd);
    if (child == 0) return go_in(proc, l, reply[1]);
    struct answer a = {.pid = -1};
    if (child < 0) rf_fail(&a.error, "launch", "clone3", "");
    close(reply[1]); /* so that a child that was killed is an end, not a wait */
    ssize_t n = child < 0 ? 0 : read(reply[0], &a, sizeof a);
    if (child >= 0 && n != (ssize_t)sizeof a) {
        a.pid = -1;
        rf_fail_errno(&a.error, ECANCELED, "launch", "read", "the process that went ahead was killed");
    }
    if (child > 0) waitpid(child, NULL, 0);
    if (pidfd >= 0) close(pidfd);
    close(reply[0]);
    if (a.pid < 0) *e = a.error;
    return a.pid;
}
