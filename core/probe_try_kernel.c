/* Attempts that need privilege, or that reach a large interface of the kernel. One line each: `ok`, or `ERRNO call`.
 *
 * Where a real success would do harm, the call is made with arguments that fail after the permission check, and
 * that later error counts as `ok`; the comment names the check. All else ends with this process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/keyctl.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "probe.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1 /* Linux 5.11 */
#endif

/* sched.h of libc and of the kernel both define these, so they're named here once, by clone(2). */
static const struct {
    const char *name;
    uint64_t flag;
} namespaces[] = {
    {"time", 0x00000080}, {"mnt", 0x00020000},  {"cgroup", 0x02000000}, {"uts", 0x04000000},
    {"ipc", 0x08000000},  {"user", 0x10000000}, {"pid", 0x20000000},    {"net", 0x40000000},
};

static int parse_namespaces(const char *text, int *flags)
{
    uint64_t sum = 0;
    if (parse_number(text, &sum) == 0 && sum <= INT32_MAX) {
        *flags = (int)sum;
        return 0;
    }
    char copy[128], *rest = copy;
    if ((size_t)snprintf(copy, sizeof copy, "%s", text) >= sizeof copy)
        return -1;
    sum = 0;
    for (char *name; (name = strsep(&rest, ","));) {
        uint64_t flag = 0;
        for (size_t i = 0; i < sizeof namespaces / sizeof namespaces[0]; i++)
            if (strcmp(namespaces[i].name, name) == 0)
                flag = namespaces[i].flag;
        if (!flag)
            return -1;
        sum |= flag;
    }
    *flags = (int)sum;
    return 0;
}

int verb_try_mount(int argc, char **argv)
{
    (void)argc, (void)argv;
    /* path_mount: the security hook and CAP_SYS_ADMIN first, then two propagations at once are EINVAL. */
    if (mount(NULL, "/", NULL, MS_SHARED | MS_PRIVATE, NULL) < 0 && errno != EINVAL)
        return say_failed("mount");
    return say_ok();
}

int verb_try_fsopen(int argc, char **argv)
{
    (void)argc, (void)argv;
    /* By number: glibc has these calls from 2.36, musl not at all. */
    int fs = (int)syscall(SYS_fsopen, "tmpfs", 1u /* FSOPEN_CLOEXEC */);
    if (fs < 0)
        return say_failed("fsopen");
    if (syscall(SYS_fsconfig, fs, 6u /* FSCONFIG_CMD_CREATE */, NULL, NULL, 0) < 0)
        return say_failed("fsconfig");
    if (syscall(SYS_fsmount, fs, 1u /* FSMOUNT_CLOEXEC */, 0u) < 0)
        return say_failed("fsmount");
    return say_ok();
}

int verb_try_unshare(int argc, char **argv)
{
    (void)argc;
    int flags;
    if (parse_namespaces(argv[1], &flags) < 0)
        return bad_argument("namespace flags", argv[1]);
    return syscall(SYS_unshare, flags) < 0 ? say_failed("unshare") : say_ok();
}

int verb_try_setns(int argc, char **argv)
{
    (void)argc;
    int type;
    if (parse_namespaces(argv[2], &type) < 0)
        return bad_argument("a namespace type", argv[2]);
    int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return say_failed("open");
    return syscall(SYS_setns, fd, type) < 0 ? say_failed("setns") : say_ok();
}

int verb_try_clone3_user(int argc, char **argv)
{
    (void)argc, (void)argv;
    struct clone_args args = {.flags = UINT64_C(0x10000000) /* CLONE_NEWUSER */, .exit_signal = SIGCHLD};
    long child = syscall(SYS_clone3, &args, sizeof args);
    if (child == 0)
        _exit(0);
    if (child < 0)
        return say_failed("clone3");
    waitpid((pid_t)child, NULL, 0);
    return say_ok();
}

int verb_try_chroot(int argc, char **argv)
{
    (void)argc, (void)argv;
    return chroot("/") < 0 ? say_failed("chroot") : say_ok();
}

int verb_try_sethostname(int argc, char **argv)
{
    char name[256];
    if (gethostname(name, sizeof name) < 0)
        return say_failed("gethostname");
    const char *wanted = argc > 1 ? argv[1] : name;
    return sethostname(wanted, strlen(wanted)) < 0 ? say_failed("sethostname") : say_ok();
}

int verb_try_settime(int argc, char **argv)
{
    const char *call = argc > 1 ? argv[1] : "settimeofday";
    if (strcmp(call, "settimeofday") == 0) {
        /* The same right as for the time itself (security_settime64), but only the zone, which stays. */
        struct timezone zone;
        if (syscall(SYS_gettimeofday, NULL, &zone) < 0)
            return say_failed("gettimeofday");
        return syscall(SYS_settimeofday, NULL, &zone) < 0 ? say_failed("settimeofday") : say_ok();
    }
    if (strcmp(call, "clock_adjtime") == 0) {
        struct timex state = {.modes = 0};
        if (clock_adjtime(CLOCK_REALTIME, &state) < 0)
            return say_failed("clock_adjtime");
        state.modes = ADJ_STATUS; /* set to what was just read */
        return clock_adjtime(CLOCK_REALTIME, &state) < 0 ? say_failed("clock_adjtime") : say_ok();
    }
    return bad_argument("the call", call);
}

int verb_try_setuid(int argc, char **argv)
{
    (void)argc;
    uint64_t uid;
    if (parse_number(argv[1], &uid) < 0 || uid >= UINT32_MAX)
        return bad_argument("a uid", argv[1]);
    return setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) < 0 ? say_failed("setresuid") : say_ok();
}

int verb_try_keyctl(int argc, char **argv)
{
    (void)argc, (void)argv;
    long keyring = syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_THREAD_KEYRING, 1);
    return keyring < 0 ? say_failed("keyctl") : say_ok();
}

int verb_try_shm(int argc, char **argv)
{
    (void)argc, (void)argv;
    int segment = shmget(IPC_PRIVATE, 4096, 0600);
    if (segment < 0)
        return say_failed("shmget");
    return shmctl(segment, IPC_RMID, NULL) < 0 ? say_failed("shmctl") : say_ok();
}

int verb_try_bpf(int argc, char **argv)
{
    (void)argc, (void)argv;
    union bpf_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.map_type = BPF_MAP_TYPE_ARRAY;
    attr.key_size = 4;
    attr.value_size = 4;
    attr.max_entries = 1;
    return syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr) < 0 ? say_failed("bpf") : say_ok();
}

int verb_try_perf(int argc, char **argv)
{
    (void)argc, (void)argv;
    struct perf_event_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.size = sizeof attr;
    attr.type = PERF_TYPE_SOFTWARE;
    attr.config = PERF_COUNT_SW_PAGE_FAULTS;
    attr.exclude_kernel = 1; /* all that perf_event_paranoid=2 leaves to everybody */
    attr.exclude_hv = 1;
    return syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0) < 0 ? say_failed("perf_event_open") : say_ok();
}

int verb_try_io_uring(int argc, char **argv)
{
    (void)argc, (void)argv;
    struct io_uring_params params;
    memset(&params, 0, sizeof params);
    return syscall(SYS_io_uring_setup, 1, &params) < 0 ? say_failed("io_uring_setup") : say_ok();
}

int verb_try_userfaultfd(int argc, char **argv)
{
    (void)argc, (void)argv;
    /* User mode only needs no privilege, so a refusal is the boundary's. */
    return syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY) < 0 ? say_failed("userfaultfd") : say_ok();
}

int verb_try_module(int argc, char **argv)
{
    (void)argc, (void)argv;
    /* may_init_module (CAP_SYS_MODULE) first, then an empty image is ENOEXEC. ENOSYS: a kernel without modules. */
    if (syscall(SYS_init_module, "", 0ul, "") < 0 && errno != ENOEXEC)
        return say_failed("init_module");
    return say_ok();
}

int verb_try_reboot(int argc, char **argv)
{
    (void)argc, (void)argv;
    /* CAP_SYS_BOOT first; then wrong magic numbers are EINVAL, whatever the command. Both and the command are 0. */
    if (syscall(SYS_reboot, 0, 0, 0, NULL) < 0 && errno != EINVAL)
        return say_failed("reboot");
    return say_ok();
}

int verb_try_tiocsti(int argc, char **argv)
{
    (void)argc, (void)argv;
    /* A terminal of its own, so that nobody's shell can get the input. It must be the controlling one. */
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0)
        return say_failed("posix_openpt");
    char slave_path[64];
    if (grantpt(master) < 0 || unlockpt(master) < 0 || ptsname_r(master, slave_path, sizeof slave_path) != 0)
        return say_failed("unlockpt");
    pid_t child = fork(); /* setsid fails for the leader of a process group, which the probe may be */
    if (child < 0)
        return say_failed("fork");
    if (child == 0) {
        setsid();
        int slave = open(slave_path, O_RDWR | O_CLOEXEC);
        if (slave < 0)
            _exit(errno);
        /* tiocsti: dev.tty.legacy_tiocsti (EIO) and the terminal's owner (EPERM) first; then EFAULT. */
        _exit(ioctl(slave, TIOCSTI, NULL) < 0 && errno != EFAULT ? errno : 0);
    }
    int status;
    if (waitpid(child, &status, 0) < 0)
        return say_failed("waitpid");
    errno = WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
    return errno ? say_failed("ioctl") : say_ok();
}
