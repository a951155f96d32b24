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
#include <sys/mman.h>
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
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid >= 0 || errno != ENOSYS || (flags & CLONE_NEWTIME)) return pid;
    /* In a container whose filter denies clone3 without a word, as Docker's does. We have no handlers to clear. */
    return (pid_t)syscall(SYS_clone, flags | CLONE_PIDFD | SIGCHLD, 0, pidfd, 0, 0);
}

void rf_start_command(struct rf_start *s) {
    if (rf_restrict(s->plan, s->exec, s->fds, s->nfds, s->readback, s->error) == 0) {
        s->restricted = true;
        rf_exec_path(s->exec, s->error);
    }
    s->failed = true;
    _exit(127);
}

static int start_command(void *arg) { rf_start_command(arg); }

/* The child runs in our memory on a stack of its own while we stand still (CLONE_VM | CLONE_VFORK), so it needs no
 * pipe to tell what failed, and no page table is copied. */
static int run_child(int (*fn)(void *), void *arg, pid_t *pid, struct rf_error *e) {
    _Alignas(16) char stack[96 << 10];
    pid_t child = clone(fn, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, arg);
    if (child < 0) return rf_fail(e, "start", "clone", "");
    *pid = child;
    return 0;
}

/* What another process of the sandbox's user kills before its last restriction has read nothing back, and was never the
 * command. */
int rf_started(pid_t pid, const struct rf_start *s) {
    if (!s->failed && s->restricted) return 0;
    if (!s->failed) rf_fail_errno(s->error, ECANCELED, "start", "clone", "killed before it was restricted");
    waitpid(pid, NULL, 0);
    return -1;
}

int rf_spawn(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, pid_t *pid, struct rf_readback *rb,
             struct rf_error *e) {
    struct rf_start s = {.plan = p, .exec = x, .fds = fds, .nfds = nfds, .readback = rb, .error = e};
    if (run_child(start_command, &s, pid, e) < 0) return -1;
    return rf_started(*pid, &s);
}

/* kill(-1) as that uid: the kernel walks all processes under one lock, so not even a fork bomb gets away. No new process
 * is needed for it, which at a pids limit there couldn't be. The effective uid selects whom the signal reaches. So does
 * the real one: it is nobody's but this killer's, as init and the launcher may have to kill at the same moment, and must
 * not reach each other. The saved one, root, keeps the workload from signalling us meanwhile (kill(2)). */
int rf_kill_uid(uint32_t uid, uint32_t killer, struct rf_error *e) {
    if (syscall(SYS_setresuid, killer, uid, 0) < 0) return rf_fail(e, "kill", "setresuid", "");
    int r = kill(-1, SIGKILL) < 0 && errno != ESRCH ? rf_fail(e, "kill", "kill", "by uid") : 0;
    if (syscall(SYS_setresuid, 0, 0, 0) < 0) _exit(1); /* never go on as somebody else */
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);                /* a change of ids sets it to fs.suid_dumpable */
    return r;
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

#define PROCESSES_MAX 65536

struct process { pid_t pid, parent; bool ours; };

/* All processes, as /proc lists them now; how many. */
static unsigned list_processes(struct process *p) {
    DIR *proc = opendir("/proc");
    if (!proc) return 0;
    unsigned n = 0;
    for (struct dirent *d; n < PROCESSES_MAX && (d = readdir(proc));) {
        if (d->d_name[0] < '1' || d->d_name[0] > '9') continue;
        p[n++] = (struct process){.pid = (pid_t)strtol(d->d_name, NULL, 10), .parent = parent_of(d->d_name)};
    }
    closedir(proc);
    return n;
}

struct spared { const uint8_t *first; size_t stride; unsigned n; };

static bool is_spared(const struct spared *s, pid_t pid) {
    for (unsigned i = 0; i < s->n; i++) {
        pid_t one;
        memcpy(&one, s->first + i * s->stride, sizeof one);
        if (one == pid) return true;
    }
    return false;
}

static int by_pid(const void *a, const void *b) {
    pid_t x = ((const struct process *)a)->pid, y = ((const struct process *)b)->pid;
    return (x > y) - (x < y);
}

/* Marks the descendants of this process. A child may be listed before its parent, so until nothing changes. */
static void mark_descendants(struct process *p, unsigned n, const struct spared *s) {
    pid_t self = getpid();
    qsort(p, n, sizeof *p, by_pid);
    for (unsigned i = 0; i < n; i++)
        if (p[i].parent == self && is_spared(s, p[i].pid)) p[i].parent = 0;
    for (bool changed = true; changed;) {
        changed = false;
        for (unsigned i = 0; i < n; i++) {
            if (p[i].ours) continue;
            struct process key = {.pid = p[i].parent};
            const struct process *parent = bsearch(&key, p, n, sizeof *p, by_pid);
            if (p[i].parent == self || (parent && parent->ours)) p[i].ours = changed = true;
        }
    }
}

/* By a pidfd, and only where it still is whom the list says: its number may have become another process's, of anybody's,
 * since the list was made. */
static bool signal_one(const struct process *p, unsigned n, const struct process *one, int number) {
    int fd = (int)syscall(SYS_pidfd_open, one->pid, 0);
    if (fd < 0) return false;
    char name[21];
    const struct process key = {.pid = parent_of(rf_decimal(name, (uint64_t)one->pid))};
    const struct process *parent = bsearch(&key, p, n, sizeof *p, by_pid);
    bool ours = key.pid == getpid() || (parent && parent->ours);
    bool sent = ours && syscall(SYS_pidfd_send_signal, fd, number, NULL, 0) == 0;
    close(fd);
    return sent;
}

static unsigned signal_descendants(struct process *p, int number, const struct spared *s) {
    unsigned n = list_processes(p), found = 0;
    mark_descendants(p, n, s);
    for (unsigned i = 0; i < n; i++)
        if (p[i].ours && signal_one(p, n, &p[i], number)) found++;
    return found;
}

/* Those that are stopped can't fork, and still count where their number is limited: so a bomb comes to a stand before it
 * is killed. Without any limit it might outrun us, so a sandbox without a uid of its own always gets one. */
void rf_kill_descendants(const pid_t *spared, size_t stride, unsigned n) {
    const struct spared s = {(const uint8_t *)spared, stride, n};
    struct process *p = mmap(NULL, PROCESSES_MAX * sizeof *p, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return;
    unsigned before = 0, now;
    for (int round = 0; round < 100 && (now = signal_descendants(p, SIGSTOP, &s)) > before; round++) before = now;
    signal_descendants(p, SIGKILL, &s);
    munmap(p, PROCESSES_MAX * sizeof *p);
}

int rf_loopback_up(struct rf_error *e) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return rf_fail(e, "network", "socket", "AF_INET");
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING | IFF_LOOPBACK};
    int r = ioctl(fd, SIOCSIFFLAGS, &request) < 0 ? rf_fail(e, "network", "ioctl", "SIOCSIFFLAGS lo") : 0;
    close(fd);
    return r;
}
