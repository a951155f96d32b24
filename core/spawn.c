/* Starting processes: init by clone3 into its namespaces, the command by a vfork-like clone out of init. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/sched.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

pid_t rf_clone(uint64_t flags, int *pidfd) {
    struct clone_args args = {
        .flags = flags | CLONE_PIDFD | CLONE_CLEAR_SIGHAND, /* Linux 5.5 */
        .pidfd = (uint64_t)(uintptr_t)pidfd,
        .exit_signal = SIGCHLD,
    };
    return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

struct start {
    const struct rf_plan *plan;
    const struct rf_exec *exec;
    const int *fds;
    unsigned nfds;
    struct rf_readback *readback;
    struct rf_error *error;
    bool failed;
};

static int start_command(void *arg) {
    struct start *s = arg;
    if (rf_restrict(s->plan, s->exec, s->fds, s->nfds, s->readback, s->error) == 0) rf_exec_path(s->exec, s->error);
    s->failed = true;
    _exit(127);
}

/* The child runs in our memory on a stack of its own while we stand still (CLONE_VM | CLONE_VFORK), so it needs no
 * pipe to tell what failed, and no page table is copied. */
static int run_child(int (*fn)(void *), void *arg, pid_t *pid, struct rf_error *e) {
    _Alignas(16) char stack[96 << 10];
    pid_t child = clone(fn, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, arg);
    if (child < 0) return rf_fail(e, "start", "clone", "");
    *pid = child;
    return 0;
}

int rf_spawn(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, pid_t *pid, struct rf_readback *rb,
             struct rf_error *e) {
    struct start s = {p, x, fds, nfds, rb, e, false};
    if (run_child(start_command, &s, pid, e) < 0) return -1;
    if (!s.failed) return 0;
    waitpid(*pid, NULL, 0);
    return -1;
}

struct killer { uint32_t uid; int err; };

static int kill_all_of_uid(void *arg) {
    struct killer *k = arg;
    if (syscall(SYS_setresuid, k->uid, k->uid, k->uid) < 0 || (kill(-1, SIGKILL) < 0 && errno != ESRCH)) k->err = errno;
    _exit(0);
}

/* kill(-1) as that uid: the kernel walks all processes under one lock, so not even a fork bomb gets away. */
int rf_kill_uid(uint32_t uid, struct rf_error *e) {
    struct killer k = {.uid = uid};
    pid_t pid;
    if (run_child(kill_all_of_uid, &k, &pid, e) < 0) return -1;
    waitpid(pid, NULL, 0);
    return k.err ? rf_fail_errno(e, k.err, "kill", "kill", "by uid") : 0;
}

static pid_t parent_of(const char *pid) {
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%s/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return -1;
    text[n] = 0;
    const char *end = strrchr(text, ')'); /* the name may hold anything, a ')' too */
    int parent;
    return end && sscanf(end + 1, " %*c %d", &parent) == 1 ? parent : -1;
}

int rf_kill_children(void) {
    pid_t self = getpid();
    DIR *proc = opendir("/proc");
    if (!proc) return 0;
    int killed = 0;
    for (struct dirent *d; (d = readdir(proc));) {
        if (d->d_name[0] < '1' || d->d_name[0] > '9' || parent_of(d->d_name) != self) continue;
        kill((pid_t)strtol(d->d_name, NULL, 10), SIGKILL);
        killed++;
    }
    closedir(proc);
    return killed;
}

int rf_loopback_up(struct rf_error *e) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return rf_fail(e, "network", "socket", "AF_INET");
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING | IFF_LOOPBACK};
    int r = ioctl(fd, SIOCSIFFLAGS, &request) < 0 ? rf_fail(e, "network", "ioctl", "SIOCSIFFLAGS lo") : 0;
    close(fd);
    return r;
}
