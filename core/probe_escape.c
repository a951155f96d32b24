/* escape NAME [ARGUMENT…]: one attempt to get out of a sandbox, or to change what is outside it. One line: `ok`, or
 * `ERRNO call`.
 *
 * As with the try- verbs, an unconfined root may run all of them: an attempt acts on this process, sets what is set
 * already, or passes arguments that fail after the check of privilege, where that later error counts as `ok`. The table is
 * at the end; attempts on other processes are here, those on the kernel in probe_escape_kernel.c.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "probe.h"
#include "probe_escape.h"

#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

static pid_t pid_of(const char *text)
{
    pid_t pid;
    return parse_pid(text, &pid) < 0 ? -1 : pid;
}

/* pidfd_open may be had for any process that is seen; it is what's done with it that needs a right. */
static int pidfd_of(const char *text)
{
    return (int)syscall(SYS_pidfd_open, pid_of(text), 0);
}

static const char *tkill_other(char **argv)
{
    return syscall(SYS_tkill, pid_of(argv[1]), 0) < 0 ? "tkill" : NULL;
}

static const char *tgkill_other(char **argv)
{
    pid_t pid = pid_of(argv[1]);
    return syscall(SYS_tgkill, pid, pid, 0) < 0 ? "tgkill" : NULL;
}

static const char *queue_signal(char **argv)
{
    siginfo_t info;
    memset(&info, 0, sizeof info);
    info.si_code = SI_QUEUE;
    return syscall(SYS_rt_sigqueueinfo, pid_of(argv[1]), 0, &info) < 0 ? "rt_sigqueueinfo" : NULL;
}

static const char *pidfd_signal(char **argv)
{
    int fd = pidfd_of(argv[1]);
    if (fd < 0)
        return "pidfd_open";
    return syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0) < 0 ? "pidfd_send_signal" : NULL;
}

static const char *attach(char **argv)
{
    pid_t pid = pid_of(argv[1]);
    if (ptrace(PTRACE_ATTACH, pid, NULL, NULL) < 0)
        return "ptrace";
    waitpid(pid, NULL, __WALL);
    ptrace(PTRACE_DETACH, pid, NULL, NULL);
    return NULL;
}

static const char *vm_writev(char **argv)
{
    char byte = 0;
    struct iovec local = {&byte, 1}, remote = {NULL, 1};
    /* As in try-vm-readv: EFAULT comes after the right. */
    return process_vm_writev(pid_of(argv[1]), &local, 1, &remote, 1, 0) < 0 && errno != EFAULT ? "process_vm_writev" : NULL;
}

static const char *take_fd(char **argv)
{
    int fd = pidfd_of(argv[1]);
    if (fd < 0)
        return "pidfd_open";
    return syscall(SYS_pidfd_getfd, fd, 0, 0) < 0 ? "pidfd_getfd" : NULL;
}

static const char *advise_other(char **argv)
{
    int fd = pidfd_of(argv[1]);
    if (fd < 0)
        return "pidfd_open";
    struct iovec nothing = {NULL, 0};
    return syscall(SYS_process_madvise, fd, &nothing, 1, MADV_COLD, 0) < 0 ? "process_madvise" : NULL;
}

static const char *move_pages_of(char **argv)
{
    return syscall(SYS_move_pages, pid_of(argv[1]), 0ul, NULL, NULL, NULL, 0) < 0 ? "move_pages" : NULL;
}

static const char *migrate_pages_of(char **argv)
{
    unsigned long node = 1;
    return syscall(SYS_migrate_pages, pid_of(argv[1]), 2ul, &node, &node) < 0 ? "migrate_pages" : NULL;
}

static const char *compare_with(char **argv)
{
    return syscall(SYS_kcmp, getpid(), pid_of(argv[1]), 1 /* KCMP_VM */, 0, 0) < 0 ? "kcmp" : NULL;
}

static const char *robust_list_of(char **argv)
{
    void *head;
    size_t length;
    return syscall(SYS_get_robust_list, pid_of(argv[1]), &head, &length) < 0 ? "get_robust_list" : NULL;
}

static const char *schedule_other(char **argv)
{
    pid_t pid = pid_of(argv[1]);
    struct sched_param same = {0};
    int policy = sched_getscheduler(pid);
    if (policy < 0 || sched_getparam(pid, &same) < 0)
        return "sched_getscheduler";
    return sched_setscheduler(pid, policy, &same) < 0 ? "sched_setscheduler" : NULL;
}

static const char *move_other(char **argv)
{
    cpu_set_t same;
    if (sched_getaffinity(pid_of(argv[1]), sizeof same, &same) < 0)
        return "sched_getaffinity";
    return sched_setaffinity(pid_of(argv[1]), sizeof same, &same) < 0 ? "sched_setaffinity" : NULL;
}

static const char *renice_other(char **argv)
{
    errno = 0;
    int same = getpriority(PRIO_PROCESS, (id_t)pid_of(argv[1]));
    if (errno)
        return "getpriority";
    return setpriority(PRIO_PROCESS, (id_t)pid_of(argv[1]), same) < 0 ? "setpriority" : NULL;
}

static const char *renice_user(char **argv)
{
    (void)argv;
    /* To what they have: the call still asks for each of them. */
    return setpriority(PRIO_USER, getuid(), getpriority(PRIO_USER, getuid())) < 0 ? "setpriority" : NULL;
}

static const char *ioprio_other(char **argv)
{
    long same = syscall(SYS_ioprio_get, 1, pid_of(argv[1]));
    if (same < 0)
        return "ioprio_get";
    return syscall(SYS_ioprio_set, 1, pid_of(argv[1]), same) < 0 ? "ioprio_set" : NULL;
}

static const char *limit_other(char **argv)
{
    struct rlimit same;
    pid_t pid = pid_of(argv[1]);
    /* By what is the same for all here: reading another's may be refused first. */
    if (syscall(SYS_prlimit64, 0, RLIMIT_CORE, NULL, &same) < 0)
        return "getrlimit";
    syscall(SYS_prlimit64, pid, RLIMIT_CORE, NULL, &same);
    return syscall(SYS_prlimit64, pid, RLIMIT_CORE, &same, NULL) < 0 ? "prlimit64" : NULL;
}

static int open_of(char **argv, int flags)
{
    char path[128];
    snprintf(path, sizeof path, "/proc/%s/%s", argv[1], argv[2]);
    return open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
}

/* Some of these files open for everybody and look at the reader's rights when they are read. */
static const char *read_proc_of(char **argv)
{
    char byte;
    int fd = open_of(argv, O_RDONLY);
    if (fd < 0)
        return "open";
    return read(fd, &byte, 1) < 0 ? "read" : NULL;
}

static const char *write_proc_of(char **argv)
{
    return open_of(argv, O_WRONLY) < 0 ? "open" : NULL;
}

static const char *open_proc_of(char **argv)
{
    return open_of(argv, O_RDONLY) < 0 ? "open" : NULL;
}

static const char *list_proc_of(char **argv)
{
    char path[128];
    snprintf(path, sizeof path, "/proc/%s/%s", argv[1], argv[2]);
    DIR *d = opendir(path);
    if (!d)
        return "opendir";
    errno = 0;
    const struct dirent *entry;
    do
        entry = readdir(d);
    while (entry && entry->d_name[0] == '.');
    return errno ? "readdir" : NULL;
}

static const char *link_of(char **argv)
{
    char path[128], target[256];
    snprintf(path, sizeof path, "/proc/%s/%s", argv[1], argv[2]);
    return readlink(path, target, sizeof target) < 0 ? "readlink" : NULL;
}

/* Through the root, or the current directory, of another process: what it sees is then seen. */
static const char *through_root(char **argv)
{
    char path[128];
    snprintf(path, sizeof path, "/proc/%s/%s/.", argv[1], argv[2]);
    return open(path, O_PATH | O_CLOEXEC | O_DIRECTORY) < 0 ? "open" : NULL;
}

static const char *be_traced(char **argv)
{
    (void)argv;
    return ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0 ? "ptrace" : NULL;
}

/* Of two processes of the same sandbox the one looks into the other: by design not even there. */
static const char *attach_child(char **argv)
{
    (void)argv;
    pid_t child = fork();
    if (child == 0) {
        pause();
        _exit(0);
    }
    const char *failed = ptrace(PTRACE_SEIZE, child, NULL, NULL) < 0 ? "ptrace" : NULL;
    int err = errno;
    kill(child, SIGKILL);
    waitpid(child, NULL, __WALL);
    errno = err;
    return failed;
}

static const struct escape attempts[] = {
    {"tkill", 1, tkill_other},
    {"tgkill", 1, tgkill_other},
    {"rt_sigqueueinfo", 1, queue_signal},
    {"pidfd_send_signal", 1, pidfd_signal},
    {"ptrace-attach", 1, attach},
    {"ptrace-traceme", 0, be_traced},
    {"ptrace-child", 0, attach_child},
    {"process_vm_writev", 1, vm_writev},
    {"pidfd_getfd", 1, take_fd},
    {"process_madvise", 1, advise_other},
    {"move_pages", 1, move_pages_of},
    {"migrate_pages", 1, migrate_pages_of},
    {"kcmp", 1, compare_with},
    {"get_robust_list", 1, robust_list_of},
    {"sched_setscheduler", 1, schedule_other},
    {"sched_setaffinity", 1, move_other},
    {"setpriority", 1, renice_other},
    {"setpriority-user", 0, renice_user},
    {"ioprio_set", 1, ioprio_other},
    {"prlimit", 1, limit_other},
    {"proc-read", 2, read_proc_of},
    {"proc-write", 2, write_proc_of},
    {"proc-open", 2, open_proc_of},
    {"proc-list", 2, list_proc_of},
    {"proc-link", 2, link_of},
    {"proc-through", 2, through_root},
};

static const struct escape *find(const struct escape *table, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(table[i].name, name) == 0)
            return &table[i];
    return NULL;
}

int verb_escape(int argc, char **argv)
{
    const struct escape *one = find(attempts, sizeof attempts / sizeof attempts[0], argv[1]);
    if (!one)
        one = find(kernel_escapes, kernel_escape_count, argv[1]);
    if (!one)
        return bad_argument("an attempt", argv[1]);
    if (argc - 2 < one->arguments)
        return bad_argument("its arguments", argv[1]);
    const char *failed = one->attempt(argv + 1);
    return failed ? say_failed(failed) : say_ok();
}
