/* What a command gives up between clone and exec, in one fixed order, and what the kernel then says of it. */
#include "rf.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/keyctl.h>
#include <linux/securebits.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

static int fail(struct rf_error *e, const char *step, const char *call, const char *detail) { return rf_fail(e, step, call, detail); }

/* v1 `tasks` and v2 `cgroup.procs` take "0" for the writer itself, whatever its PID namespace. On v1 cgroup.procs
 * would do too, but its write can take milliseconds after an idle gap. */
static int join_cgroups(const struct rf_plan *p, struct rf_error *e) {
    for (unsigned i = 0; i < p->ncgroups; i++)
        if (write(p->cgroup_fds[i], "0", 1) != 1) return fail(e, "cgroup", "write", "join");
    /* Only after the joins: the namespace's root is the cgroup that its creator is in. */
    if ((p->flags & RF_P_CGROUP_NS) && unshare(CLONE_NEWCGROUP) < 0) return fail(e, "cgroup", "unshare", "CLONE_NEWCGROUP");
    return 0;
}

/* struct rlimit64 of the kernel. setrlimit(3) takes an enum with glibc and an int with musl. */
struct kernel_limit { uint64_t soft, hard; };

static int set_rlimits(const struct rf_plan *p, struct rf_error *e) {
    for (unsigned i = 0; i < p->nrlimits; i++) {
        const struct rf_rlimit *r = &p->rlimits[i];
        char n[21];
        struct kernel_limit limit = {r->soft, r->hard};
        if (syscall(SYS_prlimit64, 0, r->resource, &limit, NULL) < 0) return fail(e, "rlimits", "prlimit", rf_decimal(n, r->resource));
    }
    return 0;
}

/* Puts `fds` at 0, 1, 2, … and closes all the rest. A descriptor may stand where another one must go, so all are
 * first moved above the targets. */
static int place_fds(const int *fds, unsigned nfds, int *landlock_fd, struct rf_error *e) {
    int high[RF_FDS_MAX];
    if (*landlock_fd >= 0 && (*landlock_fd = fcntl(*landlock_fd, F_DUPFD_CLOEXEC, RF_FDS_MAX)) < 0) return fail(e, "descriptors", "fcntl", "F_DUPFD_CLOEXEC");
    for (unsigned i = 0; i < nfds; i++) {
        high[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, RF_FDS_MAX);
        if (high[i] < 0) return fail(e, "descriptors", "fcntl", "F_DUPFD_CLOEXEC");
    }
    for (unsigned i = 0; i < nfds; i++)
        if (dup2(high[i], (int)i) < 0) return fail(e, "descriptors", "dup2", "");
    return 0;
}

/* Marked, not closed: the Landlock ruleset is needed later, and the parent shares our table not at all. */
static int seal_fds(unsigned from, struct rf_error *e) {
    if (syscall(SYS_close_range, from, ~0U, CLOSE_RANGE_CLOEXEC) < 0) return fail(e, "descriptors", "close_range", "");
    return 0;
}

static int drop_bounding(const struct rf_plan *p, struct rf_error *e) {
    for (int c = 0; c < 64; c++) {
        if (p->capabilities & (1ull << c) || prctl(PR_CAPBSET_READ, c, 0, 0, 0) == 0) continue;
        if (prctl(PR_CAPBSET_DROP, c, 0, 0, 0) == 0) continue;
        if (errno == EINVAL) break; /* past the kernel's last capability */
        /* An unprivileged caller may not drop from its bounding set. no_new_privs keeps the set from mattering, and
         * what stays in it is read back and told. */
        if (errno == EPERM) break;
        return fail(e, "capabilities", "prctl", "PR_CAPBSET_DROP");
    }
    return 0;
}

/* Raw calls: libc's wrappers would signal "all threads", and this process shares its memory with init. */
static int become(const struct rf_plan *p, struct rf_error *e) {
    if (!p->has_ids) return 0;
    /* EPERM: an unprivileged caller's user namespace, where setgroups(2) is denied for good (user_namespaces(7)). */
    if (syscall(SYS_setgroups, 0, NULL) < 0 && errno != EPERM) return fail(e, "ids", "setgroups", "none");
    if (p->capabilities && prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0) return fail(e, "ids", "prctl", "PR_SET_KEEPCAPS");
    if (syscall(SYS_setresgid, p->gid, p->gid, p->gid) < 0) return fail(e, "ids", "setresgid", "");
    if (syscall(SYS_setresuid, p->uid, p->uid, p->uid) < 0) return fail(e, "ids", "setresuid", "");
    /* Our memory is init's until exec, and a change of ids sets this to fs.suid_dumpable, which may be 1. */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0) return fail(e, "ids", "prctl", "PR_SET_DUMPABLE");
    return 0;
}

static int set_capabilities(const struct rf_plan *p, struct rf_error *e) {
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0) return fail(e, "capabilities", "prctl", "PR_CAP_AMBIENT_CLEAR_ALL");
    struct __user_cap_header_struct h = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct d[2];
    for (int i = 0; i < 2; i++) {
        uint32_t keep = (uint32_t)(p->capabilities >> (32 * i));
        d[i].effective = d[i].permitted = d[i].inheritable = keep;
    }
    if (syscall(SYS_capset, &h, d) < 0) return fail(e, "capabilities", "capset", "");
    /* Only ambient ones outlive execve for a user who isn't root (capabilities(7)). */
    for (int c = 0; c < 64 && p->capabilities >> c; c++) {
        char n[21];
        if (p->capabilities >> c & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, c, 0, 0) < 0)
            return fail(e, "capabilities", "prctl", rf_decimal(n, (uint64_t)c));
    }
    return 0;
}

/* The dispositions are the default ones already: the launcher saw to that, and clone3's CLONE_CLEAR_SIGHAND. */
static int unblock_signals(struct rf_error *e) {
    sigset_t none;
    sigemptyset(&none);
    return sigprocmask(SIG_SETMASK, &none, NULL) < 0 ? fail(e, "signals", "sigprocmask", "") : 0;
}

/* A field of /proc/self/status: the number, in `base`, that follows `name`. False where it isn't there. */
static bool status_field(const char *status, const char *name, int base, uint64_t *v) {
    const char *at = strstr(status, name);
    if (!at) return false;
    char *end;
    *v = strtoull(at + strlen(name), &end, base);
    return end != at + strlen(name);
}

/* What the kernel says of this task, after its last restriction. Nothing here is copied from the plan, and what can't
 * be read looks like no restriction at all. */
static void read_back(const struct rf_plan *p, int status_fd, struct rf_readback *rb) {
    static const char *const sets[] = {"\nCapEff:", "\nCapPrm:", "\nCapInh:", "\nCapBnd:", "\nCapAmb:"};
    char status[4096];
    ssize_t n = status_fd < 0 ? -1 : read(status_fd, status, sizeof status - 1);
    if (status_fd >= 0) close(status_fd);
    status[n < 0 ? 0 : n] = 0;
    for (size_t i = 0; i < RF_LEN(sets); i++)
        if (!status_field(status, sets[i], 16, &rb->caps[i])) rb->caps[i] = UINT64_MAX;
    uint64_t v;
    rb->no_new_privs = status_field(status, "\nNoNewPrivs:", 10, &v) ? (uint32_t)v : 0;
    rb->seccomp = status_field(status, "\nSeccomp:", 10, &v) ? (uint32_t)v : 0;
    syscall(SYS_getresuid, &rb->ids[0], &rb->ids[1], &rb->ids[2]);
    syscall(SYS_getresgid, &rb->ids[3], &rb->ids[4], &rb->ids[5]);
    rb->pid = (uint32_t)syscall(SYS_getpid);
    rb->nrlimits = 0;
    for (unsigned i = 0; i < p->nrlimits; i++) {
        struct kernel_limit limit;
        if (syscall(SYS_prlimit64, 0, p->rlimits[i].resource, NULL, &limit) < 0) continue;
        rb->rlimits[rb->nrlimits++] = (struct rf_rlimit){p->rlimits[i].resource, limit.soft, limit.hard};
    }
    struct utsname u;
    rb->hostname[0] = rb->release[0] = 0;
    if (uname(&u) == 0) {
        snprintf(rb->hostname, sizeof rb->hostname, "%s", u.nodename);
        snprintf(rb->release, sizeof rb->release, "%s", u.release);
    }
    /* A guest's says nothing to anybody outside. */
    ssize_t link = p->has_guest_limits ? 0 : readlink("/proc/self/ns/cgroup", rb->cgroup_namespace, sizeof rb->cgroup_namespace - 1);
    rb->cgroup_namespace[link < 0 ? 0 : link] = 0;
    rb->clock_ns = rf_monotonic_ns(); /* all that is left is exec */
}

static int enter_landlock(int ruleset, struct rf_readback *rb, struct rf_error *e) {
    rb->landlock = 0;
    if (ruleset < 0) return 0;
    if (syscall(SYS_landlock_restrict_self, ruleset, 0) < 0) return fail(e, "landlock", "landlock_restrict_self", "");
    rb->landlock = 1;
    return 0;
}

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5) /* Linux 5.19 */
#endif

static int enter_seccomp(const struct rf_plan *p, struct rf_readback *rb, struct rf_error *e) {
    if (p->filter.len == 0) return 0;
    unsigned long flags = (p->seccomp_flags & RF_S_LOG ? SECCOMP_FILTER_FLAG_LOG : 0) | (p->seccomp_flags & RF_S_SPEC_ALLOW ? SECCOMP_FILTER_FLAG_SPEC_ALLOW : 0);
    long r = -1;
    if (p->seccomp_flags & RF_S_NOTIFY) {
        flags |= SECCOMP_FILTER_FLAG_NEW_LISTENER;
        /* A call that is being answered isn't interrupted by signals, only by a fatal one. */
        r = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &p->filter);
        if (r < 0 && errno != EINVAL) return fail(e, "seccomp", "seccomp", "SECCOMP_FILTER_FLAG_NEW_LISTENER");
    }
    if (r < 0) r = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &p->filter);
    if (r < 0) return fail(e, "seccomp", "seccomp", "SECCOMP_SET_MODE_FILTER");
    if (p->seccomp_flags & RF_S_NOTIFY) __atomic_store_n(&rb->listener, (int)r, __ATOMIC_RELEASE);
    return 0;
}

/* Whoever may call keyctl(2) reaches the keys of the session that the caller is in, whatever ids and namespaces say:
 * possession is enough. */
static int leave_session_keyring(const struct rf_plan *p, struct rf_error *e) {
    if (!(p->seccomp_flags & RF_S_FOREIGN)) return 0;
    /* ENOSYS: no keys in this kernel. EPERM: a filter that we are under ourselves, in a container say, and the command too. */
    if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 && errno != ENOSYS && errno != EPERM) return fail(e, "keyring", "keyctl", "KEYCTL_JOIN_SESSION_KEYRING");
    return 0;
}

uint32_t rf_seccomp_mode(pid_t pid) {
    char path[64], status[4096];
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, status, sizeof status - 1);
    if (fd >= 0) close(fd);
    status[n < 0 ? 0 : n] = 0;
    uint64_t v;
    return status_field(status, "\nSeccomp:", 10, &v) ? (uint32_t)v : 0;
}

/* A command doesn't outlive its init, nor what init has not yet made of it. */
static int die_with_init(const struct rf_plan *p, struct rf_error *e) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0) return fail(e, "signals", "prctl", "PR_SET_PDEATHSIG");
    return getppid() == p->init_pid ? 0 : rf_fail_errno(e, ECANCELED, "signals", "getppid", "init is gone");
}

/* What comes after the descriptors and before the working directory. */
static int restrict_ids(const struct rf_plan *p, struct rf_error *e) {
    umask(022);
    if (drop_bounding(p, e) < 0) return -1; /* needs CAP_SETPCAP, so before the ids */
    if (set_rlimits(p, e) < 0) return -1;
    if (become(p, e) < 0) return -1;
    if (leave_session_keyring(p, e) < 0) return -1; /* as the user whom it is to belong to */
    return set_capabilities(p, e);
}

static int restrict_calls(const struct rf_plan *p, int landlock_fd, struct rf_readback *rb, struct rf_error *e) {
    if (die_with_init(p, e) < 0) return -1; /* again: the change of ids has cleared it */
    if ((p->flags & RF_P_NO_NEW_PRIVS) && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return fail(e, "no_new_privs", "prctl", "PR_SET_NO_NEW_PRIVS");
    if (unblock_signals(e) < 0) return -1;
    /* Opened before Landlock, which may leave no path below /proc, and read after all. */
    int status = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    if (enter_landlock(landlock_fd, rb, e) < 0) return -1;
    /* Behind our own filter, so that it is read back too. A foreign one may deny any call: init reads its mode later. */
    if (p->seccomp_flags & RF_S_FOREIGN) read_back(p, status, rb);
    if (enter_seccomp(p, rb, e) < 0) return -1; /* last: what comes before may need calls that the filter denies */
    if (!(p->seccomp_flags & RF_S_FOREIGN)) read_back(p, status, rb);
    return 0;
}

static int leave_cpu(const struct rf_plan *p, struct rf_error *e) {
    if (!p->cpus || CPU_COUNT(p->cpus) == 0 || sched_setaffinity(0, sizeof *p->cpus, p->cpus) == 0) return 0;
    return fail(e, "cpus", "sched_setaffinity", "");
}

int rf_restrict(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, struct rf_readback *rb,
                struct rf_error *e) {
    if (die_with_init(p, e) < 0) return -1;
    if (join_cgroups(p, e) < 0) return -1;
    if (setsid() < 0) return fail(e, "session", "setsid", "");
    int landlock_fd = p->landlock_fd;
    if (place_fds(fds, nfds, &landlock_fd, e) < 0) return -1;
    if (seal_fds(nfds, e) < 0) return -1;
    if (restrict_ids(p, e) < 0) return -1;
    /* As the command's own user, so that a directory it may not enter is told now. */
    if (chdir(x->cwd) < 0) return fail(e, "chdir", "chdir", x->cwd);
    if (leave_cpu(p, e) < 0) return -1;
    return restrict_calls(p, landlock_fd, rb, e);
}

int rf_restrict_ahead(const struct rf_plan *p, struct rf_readback *rb, struct rf_error *e) {
    if (die_with_init(p, e) < 0) return -1;
    if (join_cgroups(p, e) < 0) return -1;
    if (setsid() < 0) return fail(e, "session", "setsid", "");
    if (seal_fds(0, e) < 0) return -1;
    if (restrict_ids(p, e) < 0) return -1;
    return restrict_calls(p, p->landlock_fd, rb, e);
}

int rf_restrict_rest(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, struct rf_error *e) {
    int none = -1;
    if (place_fds(fds, nfds, &none, e) < 0) return -1;
    if (seal_fds(nfds, e) < 0) return -1;
    if (chdir(x->cwd) < 0) return fail(e, "chdir", "chdir", x->cwd);
    return leave_cpu(p, e);
}

static const char *variable(char *const *envp, const char *name) {
    size_t n = strlen(name);
    for (; *envp; envp++)
        if (strncmp(*envp, name, n) == 0 && (*envp)[n] == '=') return *envp + n + 1;
    return NULL;
}

int rf_exec_path(const struct rf_exec *x, struct rf_error *e) {
    const char *file = x->argv[0];
    if (x->program >= 0) {
        syscall(SYS_execveat, x->program, "", x->argv, x->envp, AT_EMPTY_PATH);
        return rf_fail(e, "exec", "execveat", file);
    }
    const char *path = variable(x->envp, "PATH");
    if (strchr(file, '/') || !path) {
        execve(file, x->argv, x->envp);
        return rf_fail(e, "exec", "execve", file);
    }
    int err = ENOENT;
    for (const char *dir = path; dir;) {
        const char *end = strchr(dir, ':');
        int n = (int)(end ? end - dir : (ptrdiff_t)strlen(dir));
        char candidate[4096];
        int length = snprintf(candidate, sizeof candidate, "%.*s%s%s", n, dir, n ? "/" : "", file);
        if (length > 0 && (size_t)length < sizeof candidate) {
            execve(candidate, x->argv, x->envp);
            /* As execvp(3): a directory that lacks it, or may not be searched, doesn't end the search. */
            if (errno == EACCES) err = EACCES;
            else if (errno != ENOENT && errno != ENOTDIR) {
                err = errno;
                break;
            } else if (access(candidate, F_OK) == 0) {
                err = errno = ENOENT; /* it is there: its interpreter is what's missing */
                break;
            }
        }
        dir = end ? end + 1 : NULL;
    }
    return rf_fail_errno(e, err, "exec", "execve", file);
}
