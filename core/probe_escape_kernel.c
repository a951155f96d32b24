/* Attempts on the kernel: mounts, the root, modules, clocks, devices, keys, terminals. See probe_escape.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <linux/perf_event.h>
#include <pty.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/quota.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/timex.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "probe.h"
#include "probe_escape.h"

#define NOWHERE "/ringfence-no-such-file"

/* The call failed, and not by one of the errors that only come after the check of privilege. */
static const char *unless(long result, const char *call, int passed)
{
    return result < 0 && errno != passed ? call : NULL;
}

/* ---- mounts and the root ---- */

static const char *umount_mask(char **argv)
{
    /* may_mount first; then what is no mount is EINVAL. */
    return unless(umount2(argv[1], UMOUNT_NOFOLLOW | MNT_EXPIRE), "umount2", EINVAL);
}

static const char *remount(char **argv)
{
    /* may_mount first; then what isn't the root of a mount is EINVAL (do_reconfigure_mnt). */
    return unless(mount(NULL, argv[1], NULL, MS_REMOUNT | MS_BIND, NULL), "mount", EINVAL);
}

static const char *bind_mount(char **argv)
{
    return unless(mount(NOWHERE, argv[1], NULL, MS_BIND, NULL), "mount", ENOENT);
}

static const char *mount_type(char **argv)
{
    return unless(mount("none", NOWHERE, argv[1], 0, NULL), "mount", ENOENT);
}

static const char *move_nothing(char **argv)
{
    (void)argv;
    /* may_mount first; a mount onto itself is a loop. */
    return unless(syscall(SYS_move_mount, AT_FDCWD, "/", AT_FDCWD, "/", 0), "move_mount", ELOOP);
}

static const char *clone_mount(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_open_tree, AT_FDCWD, "/", 1u | (unsigned)O_CLOEXEC), "open_tree", 0);
}

static const char *pick_mount(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_fspick, AT_FDCWD, "/", 1u), "fspick", 0);
}

static const char *set_nothing(char **argv)
{
    (void)argv;
    uint64_t nothing[4] = {0};
    return unless(syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, nothing, sizeof nothing), "mount_setattr", 0);
}

static const char *pivot(char **argv)
{
    (void)argv;
    /* may_mount first; /proc/self/fd is no mount point, so EINVAL. */
    return unless(syscall(SYS_pivot_root, "/proc/self/fd", "/proc/self/fd"), "pivot_root", EINVAL);
}

/* chroot(2) to a folder below, with a descriptor of one above kept: the walk back up ends nowhere but at the real root. */
static const char *walk_out(char **argv)
{
    (void)argv;
    int above = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (above < 0)
        return "open";
    if (mkdir("walk-out", 0700) < 0)
        return "mkdir";
    int r = chroot("walk-out");
    int err = errno;
    unlinkat(above, "walk-out", AT_REMOVEDIR);
    errno = err;
    if (r < 0)
        return "chroot";
    if (fchdir(above) < 0)
        return "fchdir";
    for (int i = 0; i < 64; i++)
        if (chdir("..") < 0)
            return "chdir";
    return chroot(".") < 0 ? "chroot" : NULL;
}

static const char *clone_namespace(char **argv)
{
    static const struct { const char *name; unsigned long flag; } names[] = {
        {"mnt", 0x00020000}, {"cgroup", 0x02000000}, {"uts", 0x04000000}, {"ipc", 0x08000000},
        {"user", 0x10000000}, {"pid", 0x20000000}, {"net", 0x40000000},
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(names[i].name, argv[1]) != 0)
            continue;
        long child = syscall(SYS_clone, names[i].flag | SIGCHLD, NULL, NULL, NULL, NULL);
        if (child == 0)
            _exit(0);
        if (child > 0)
            waitpid((pid_t)child, NULL, 0);
        return child < 0 ? "clone" : NULL;
    }
    errno = EINVAL;
    return "clone";
}

static const char *make_block(char **argv)
{
    if (mknod(argv[1], S_IFBLK | 0600, makedev(7, 0)) < 0)
        return "mknod";
    return unlink(argv[1]) < 0 ? "unlink" : NULL;
}

static const char *hard_link(char **argv)
{
    if (link(argv[1], argv[2]) < 0)
        return "link";
    return unlink(argv[2]) < 0 ? "unlink" : NULL;
}

static const char *change_mode(char **argv)
{
    struct stat st;
    if (stat(argv[1], &st) < 0)
        return "stat";
    return chmod(argv[1], st.st_mode & 0777) < 0 ? "chmod" : NULL;
}

static const char *change_times(char **argv)
{
    struct stat st;
    if (stat(argv[1], &st) < 0)
        return "stat";
    struct timespec same[2] = {st.st_atim, st.st_mtim};
    return utimensat(AT_FDCWD, argv[1], same, 0) < 0 ? "utimensat" : NULL;
}

/* ---- modules, kernels, accounting ---- */

static const char *insert_module(char **argv)
{
    (void)argv;
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    long r = syscall(SYS_finit_module, null, "", 0);
    return r < 0 && errno != EINVAL && errno != ENOEXEC ? "finit_module" : NULL;
}

static const char *remove_module(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_delete_module, "ringfence_no_such_module", O_NONBLOCK), "delete_module", ENOENT);
}

static const char *load_kernel(char **argv)
{
    (void)argv;
    /* CAP_SYS_BOOT first; a flag that doesn't exist is EINVAL. */
    return unless(syscall(SYS_kexec_load, 0ul, 0ul, NULL, 0x8000ul), "kexec_load", EINVAL);
}

static const char *load_kernel_file(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_kexec_file_load, -1, -1, 0ul, NULL, 0x8000ul), "kexec_file_load", EINVAL);
}

static const char *swap_on(char **argv)
{
    (void)argv;
    return unless(swapon(NOWHERE, 0), "swapon", ENOENT);
}

static const char *swap_off(char **argv)
{
    (void)argv;
    return unless(swapoff(NOWHERE), "swapoff", ENOENT);
}

static const char *accounting(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_acct, NOWHERE), "acct", ENOENT);
}

static const char *quota(char **argv)
{
    (void)argv;
    /* Writes back what is changed, of every file system: no more than sync(2). */
    return unless(quotactl(QCMD(Q_SYNC, USRQUOTA), NULL, 0, NULL), "quotactl", 0);
}

static const char *read_kernel_log(char **argv)
{
    (void)argv;
    char none[1];
    return unless(klogctl(3 /* SYSLOG_ACTION_READ_ALL */, none, 0), "syslog", 0);
}

static const char *hang_up(char **argv)
{
    (void)argv;
    /* In a session without a terminal, so that nobody's is hung up. */
    pid_t child = fork();
    if (child == 0) {
        setsid();
        _exit(syscall(SYS_vhangup) < 0 ? errno : 0);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) < 0)
        return "fork";
    errno = WEXITSTATUS(status);
    return errno ? "vhangup" : NULL;
}

/* ---- the clock, names, ports of the machine ---- */

static const char *set_clock(char **argv)
{
    (void)argv;
    struct timespec invalid = {.tv_nsec = -1};
    return unless(syscall(SYS_clock_settime, CLOCK_REALTIME, &invalid), "clock_settime", EINVAL);
}

static const char *adjust_clock(char **argv)
{
    (void)argv;
    struct timex state = {.modes = 0};
    if (adjtimex(&state) < 0)
        return "adjtimex";
    state.modes = ADJ_STATUS; /* set to what was just read */
    return unless(adjtimex(&state), "adjtimex", 0);
}

static const char *set_domain(char **argv)
{
    (void)argv;
    char name[65];
    if (getdomainname(name, sizeof name) < 0)
        return "getdomainname";
    return unless(setdomainname(name, strlen(name)), "setdomainname", 0);
}

/* x86 only: elsewhere these calls don't exist. */
static const char *io_ports(char **argv)
{
    (void)argv;
#ifdef SYS_ioperm
    return unless(syscall(SYS_ioperm, 0x80ul, 1ul, 1), "ioperm", 0);
#else
    errno = ENOSYS;
    return "ioperm";
#endif
}

static const char *io_level(char **argv)
{
    (void)argv;
#ifdef SYS_iopl
    return unless(syscall(SYS_iopl, 3), "iopl", 0);
#else
    errno = ENOSYS;
    return "iopl";
#endif
}

static const char *read_implies_exec(char **argv)
{
    (void)argv;
    return unless(personality(READ_IMPLIES_EXEC), "personality", 0);
}

/* ---- keys, BPF, perf, io_uring, fanotify, memory policy ---- */

static const char *make_key(char **argv)
{
    (void)argv;
    long key = syscall(SYS_add_key, "user", "ringfence-probe", "x", 1ul, KEY_SPEC_THREAD_KEYRING);
    return unless(key, "add_key", 0);
}

static const char *ask_for_key(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_request_key, "user", "ringfence-no-such-key", NULL, 0), "request_key", ENOKEY);
}

static const char *keyring(char **argv)
{
    int which = strcmp(argv[1], "session") == 0 ? KEY_SPEC_SESSION_KEYRING : KEY_SPEC_USER_KEYRING;
    return unless(syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, which, 1), "keyctl", 0);
}

static const char *join_keyring(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL), "keyctl", 0);
}

static const char *load_bpf(char **argv)
{
    (void)argv;
    /* mov r0, 0; exit */
    static const uint64_t program[] = {0x00000000000000b7ull, 0x0000000000000095ull};
    struct {
        uint32_t type, count;
        uint64_t instructions, license;
        uint8_t rest[96];
    } attr = {.type = 1 /* a socket filter */, .count = 2};
    attr.instructions = (uint64_t)(uintptr_t)program;
    attr.license = (uint64_t)(uintptr_t) "GPL";
    return unless(syscall(SYS_bpf, 5 /* BPF_PROG_LOAD */, &attr, sizeof attr), "bpf", 0);
}

static const char *watch_machine(char **argv)
{
    (void)argv;
    struct perf_event_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.size = sizeof attr;
    attr.type = PERF_TYPE_SOFTWARE;
    attr.config = PERF_COUNT_SW_CPU_CLOCK;
    return unless(syscall(SYS_perf_event_open, &attr, -1, 0, -1, 0), "perf_event_open", 0);
}

static const char *enter_ring(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_io_uring_enter, -1, 0, 0, 0, NULL, 0), "io_uring_enter", EBADF);
}

static const char *register_ring(char **argv)
{
    (void)argv;
    long r = syscall(SYS_io_uring_register, -1, 0, NULL, 0);
    return r < 0 && errno != EBADF && errno != EINVAL ? "io_uring_register" : NULL;
}

static const char *watch_files(char **argv)
{
    (void)argv;
    return unless(fanotify_init(FAN_CLASS_CONTENT, O_RDONLY), "fanotify_init", 0);
}

static const char *memory_policy(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_set_mempolicy, 0 /* MPOL_DEFAULT */, NULL, 0ul), "set_mempolicy", 0);
}

/* ---- this process's own privileges ---- */

static const char *real_time(char **argv)
{
    (void)argv;
    struct sched_param one = {.sched_priority = 1};
    return unless(sched_setscheduler(0, SCHED_FIFO, &one), "sched_setscheduler", 0);
}

static const char *be_urgent(char **argv)
{
    (void)argv;
    /* From the ordinary one, as the caller may be urgent already, and that is inherited. */
    if (setpriority(PRIO_PROCESS, 0, 0) < 0)
        return "setpriority to 0";
    return unless(setpriority(PRIO_PROCESS, 0, -5), "setpriority", 0);
}

static const char *io_real_time(char **argv)
{
    (void)argv;
    return unless(syscall(SYS_ioprio_set, 1, 0, 1 << 13 /* IOPRIO_CLASS_RT */), "ioprio_set", 0);
}

static const char *raise_limit(char **argv)
{
    (void)argv;
    struct rlimit limit;
    if (getrlimit(RLIMIT_RTPRIO, &limit) < 0)
        return "getrlimit";
    if (limit.rlim_max != RLIM_INFINITY)
        limit.rlim_max++;
    return unless(setrlimit(RLIMIT_RTPRIO, &limit), "setrlimit", 0);
}

static const char *replace_exe(char **argv)
{
    (void)argv;
    /* CAP_SYS_RESOURCE first; then a descriptor that isn't open is EBADF. */
    return unless(prctl(PR_SET_MM, PR_SET_MM_EXE_FILE, -1L, 0, 0), "prctl", EBADF);
}

static const char *lower_bounding(char **argv)
{
    (void)argv;
    return unless(prctl(PR_CAPBSET_DROP, CAP_SYSLOG, 0, 0, 0), "prctl", 0);
}

static const char *take_capability(char **argv)
{
    (void)argv;
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2];
    if (syscall(SYS_capget, &head, sets) < 0)
        return "capget";
    sets[0].permitted |= 1u << CAP_SYS_ADMIN;
    sets[0].effective |= 1u << CAP_SYS_ADMIN;
    return unless(syscall(SYS_capset, &head, sets), "capset", 0);
}

/* ---- devices, sockets, terminals ---- */

static const char *audit_socket(char **argv)
{
    (void)argv;
    return unless(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 9 /* NETLINK_AUDIT */), "socket", 0);
}

/* On a terminal of our own. What isn't a virtual console answers ENOTTY once the filter has let it through. */
static const char *console_ioctl(char **argv)
{
    (void)argv;
    int master, slave;
    if (openpty(&master, &slave, NULL, NULL, NULL) < 0)
        return "openpty";
    char code = 6; /* TIOCL_GETSHIFTSTATE: only asks */
    return unless(ioctl(slave, TIOCLINUX, &code), "ioctl", ENOTTY);
}

/* Whether a terminal is there to control us, or by which to reach who called. */
static const char *own_terminal(char **argv)
{
    (void)argv;
    return unless(open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY), "open", 0);
}

const struct escape kernel_escapes[] = {
    {"umount", 1, umount_mask},
    {"remount", 1, remount},
    {"mount-bind", 1, bind_mount},
    {"mount-type", 1, mount_type},
    {"move_mount", 0, move_nothing},
    {"open_tree", 0, clone_mount},
    {"fspick", 0, pick_mount},
    {"mount_setattr", 0, set_nothing},
    {"pivot_root", 0, pivot},
    {"chroot-walk", 0, walk_out},
    {"clone", 1, clone_namespace},
    {"mknod-block", 1, make_block},
    {"link", 2, hard_link},
    {"chmod", 1, change_mode},
    {"utimensat", 1, change_times},
    {"finit_module", 0, insert_module},
    {"delete_module", 0, remove_module},
    {"kexec_load", 0, load_kernel},
    {"kexec_file_load", 0, load_kernel_file},
    {"swapon", 0, swap_on},
    {"swapoff", 0, swap_off},
    {"acct", 0, accounting},
    {"quotactl", 0, quota},
    {"syslog", 0, read_kernel_log},
    {"vhangup", 0, hang_up},
    {"clock_settime", 0, set_clock},
    {"adjtimex", 0, adjust_clock},
    {"setdomainname", 0, set_domain},
    {"ioperm", 0, io_ports},
    {"iopl", 0, io_level},
    {"personality", 0, read_implies_exec},
    {"add_key", 0, make_key},
    {"request_key", 0, ask_for_key},
    {"keyring", 1, keyring},
    {"join-keyring", 0, join_keyring},
    {"bpf-load", 0, load_bpf},
    {"perf-all", 0, watch_machine},
    {"io_uring_enter", 0, enter_ring},
    {"io_uring_register", 0, register_ring},
    {"fanotify", 0, watch_files},
    {"set_mempolicy", 0, memory_policy},
    {"real-time", 0, real_time},
    {"negative-nice", 0, be_urgent},
    {"io-real-time", 0, io_real_time},
    {"raise-limit", 0, raise_limit},
    {"replace-exe", 0, replace_exe},
    {"drop-bounding", 0, lower_bounding},
    {"capset", 0, take_capability},
    {"netlink-audit", 0, audit_socket},
    {"TIOCLINUX", 0, console_ioctl},
    {"own-terminal", 0, own_terminal},
};
const size_t kernel_escape_count = sizeof kernel_escapes / sizeof kernel_escapes[0];
