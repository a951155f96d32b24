/* surface: which system calls lead into the kernel from here.
 *
 * Each number is called once, in a child of its own, with arguments that no call can act on: -1 is no descriptor, no
 * process, no size, no set of flags and no address that anything is mapped at. Where that would block, be taken for a
 * number that doesn't exist, or do something, the table below has others, with the reason; a call that acts whatever its
 * arguments is left out. All of it may be run by an
 * unconfined root. What counts is only how the kernel declines.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "probe.h"

enum { LAST = 480, LIMIT_MS = 2000, WAKE_US = 20000 };

struct special {
    long number;
    long arguments[6];
};

#define NOWHERE (-1l)
#ifndef SYS_fchmodat2
#define SYS_fchmodat2 452
#endif

/* What -1 doesn't do for. Some filters judge an argument: there it is one that they let through, or the answer would be of
 * the argument and not of the call. */
static const struct special specials[] = {
    /* -1 would be a key and all flags: a queue would be made, and stay. A key of 0 is a new private one. */
    {SYS_msgget, {0x7ffffffe, 0, 0, 0, 0, 0}},
    {SYS_semget, {0x7ffffffe, -1, 0, 0, 0, 0}},
    {SYS_shmget, {0x7ffffffe, -1, 0, 0, 0, 0}},
    /* An unknown operation is ENOSYS, as if there were no such call. */
    {SYS_futex, {NOWHERE, 1 /* FUTEX_WAKE */, 0, 0, 0, 0}},
#ifdef SYS_modify_ldt
    {SYS_modify_ldt, {0, 0, 0, 0, 0, 0}},
#endif
    /* The kernel takes memory of that length before it looks at what is in it. */
    {SYS_init_module, {NOWHERE, 0, NOWHERE, 0, 0, 0}},
    /* -1 has the bit of a kind of lock that the kernel has given up, and logs. */
    {SYS_flock, {-1, 1, 0, 0, 0, 0}},
    /* Of this process, and to nothing that it isn't. */
    {SYS_setpriority, {0, 0, 0, 0, 0, 0}},
    {SYS_ioprio_set, {1, 0, -1, 0, 0, 0}},
    {SYS_sched_setaffinity, {0, -1, NOWHERE, 0, 0, 0}},
    {SYS_sched_setparam, {0, NOWHERE, 0, 0, 0, 0}},
    {SYS_sched_setscheduler, {0, -1, NOWHERE, 0, 0, 0}},
    {SYS_sched_setattr, {0, NOWHERE, -1, 0, 0, 0}},
    {SYS_prlimit64, {0, -1, NOWHERE, NOWHERE, 0, 0}},
    /* A clone of signal handlers without memory doesn't exist; -1 has the bits of namespaces, too. */
    {SYS_clone, {0x800 /* CLONE_SIGHAND */, 0, 0, 0, 0, 0}},
    {SYS_socket, {1 /* AF_UNIX */, 1, -1, 0, 0, 0}},
    {SYS_socketpair, {1 /* AF_UNIX */, 1, -1, NOWHERE, 0, 0}},
    {SYS_sendto, {-1, NOWHERE, -1, 0, NOWHERE, -1}},
    {SYS_sendmsg, {-1, NOWHERE, 0, 0, 0, 0}},
    {SYS_sendmmsg, {-1, NOWHERE, -1, 0, 0, 0}},
    /* Modes without set-user-ID, flags without O_CREAT. */
    {SYS_fchmod, {-1, 0, 0, 0, 0, 0}},
    {SYS_fchmodat, {-1, NOWHERE, 0, 0, 0, 0}},
    {SYS_fchmodat2, {-1, NOWHERE, 0, -1, 0, 0}},
    {SYS_mkdirat, {-1, NOWHERE, 0, 0, 0, 0}},
    {SYS_mknodat, {-1, NOWHERE, 0, 0, 0, 0}},
    {SYS_openat, {-1, NOWHERE, 0, 0, 0, 0}},
#ifdef __x86_64__ /* newer architectures have only the calls with at */
    {SYS_chmod, {NOWHERE, 0, 0, 0, 0, 0}},
    {SYS_creat, {NOWHERE, 0, 0, 0, 0, 0}},
    {SYS_mkdir, {NOWHERE, 0, 0, 0, 0, 0}},
    {SYS_mknod, {NOWHERE, 0, 0, 0, 0, 0}},
    {SYS_open, {NOWHERE, 0, 0, 0, 0, 0}},
#endif
};

/* Not called at all, and not told. */
static int left_out(long number)
{
    switch (number) {
    case SYS_sync: /* takes no argument that could be wrong: it would write back all that the machine has changed */
        return 1;
#ifndef __x86_64__
    case SYS_rt_sigreturn: /* goes on at what happens to be on the stack, see below */
        return 1;
#endif
    default:
        return 0;
    }
}

static const long *arguments_of(long number)
{
    static const long generic[6] = {-1, -1, -1, -1, -1, -1};
    for (size_t i = 0; i < sizeof specials / sizeof specials[0]; i++)
        if (specials[i].number == number)
            return specials[i].arguments;
    return generic;
}

static void wake(int sig)
{
    (void)sig;
}

/* Inlined, as the child of a vfork goes on in the frame of its parent. */
static inline __attribute__((always_inline)) long call(long number, const long *a)
{
#ifdef __x86_64__
    register long r10 __asm__("r10") = a[3];
    register long r8 __asm__("r8") = a[4];
    register long r9 __asm__("r9") = a[5];
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
#else
    long result = syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    return result < 0 ? -errno : result;
#endif
}

#ifdef __x86_64__
/* It takes all registers from the stack: here from an address that nothing is mapped at, or an unconfined root would go
 * on anywhere. Where it is denied with an error, the stack is taken back. */
static long return_from_no_signal(void)
{
    long result;
    __asm__ volatile("mov %%rsp, %%r12\n\t"
                     "mov $16, %%esp\n\t"
                     "syscall\n\t"
                     "mov %%r12, %%rsp"
                     : "=a"(result)
                     : "a"((long)SYS_rt_sigreturn)
                     : "rcx", "r11", "r12", "memory");
    return result;
}
#endif

static void try_one(long number, int out)
{
    const long *arguments = arguments_of(number);
    const long itself[6] = {getpid(), 0, 0, 0, 0, 0};
    if (number == SYS_kill) /* -1 is all processes; here it is this one, and only asked whether it may */
        arguments = itself;
    leave_no_core();
    if (number == SYS_vhangup)
        setsid(); /* a session without a terminal: nobody's is hung up */
#ifdef __x86_64__
    if (number == SYS_rt_sigreturn) {
        long denied = return_from_no_signal();
        (void)!write(out, &denied, sizeof denied);
        return;
    }
#endif
    /* What waits for a signal gets one. */
    struct sigaction action = {.sa_handler = wake};
    sigaction(SIGALRM, &action, NULL);
    struct itimerval timer = {{0, WAKE_US}, {0, WAKE_US}};
    setitimer(ITIMER_REAL, &timer, NULL);
    long self = call(SYS_getpid, arguments), result = call(number, arguments);
    /* By fork and vfork there are two of us. */
    if (call(SYS_getpid, arguments) == self && write(out, &result, sizeof result) < 0)
        call(SYS_exit_group, arguments);
    call(SYS_exit_group, arguments);
}

static void say(long number, int said, long result, int ended, int status)
{
    printf("%ld ", number);
    if (said && result < 0 && result > -4096)
        puts(errno_name((int)-result));
    else if (said)
        puts("ok");
    else if (!ended)
        puts("waits");
    else if (WIFSIGNALED(status))
        printf("signal %d\n", WTERMSIG(status));
    else
        puts("exits");
}

int verb_surface(int argc, char **argv)
{
    uint64_t last = LAST;
    if (argc > 1 && (parse_number(argv[1], &last) < 0 || last > 4096))
        return bad_argument("a system call's number", argv[1]);
    for (long number = 0; number <= (long)last; number++) {
        int pipes[2], status = 0;
        if (left_out(number))
            continue;
        if (pipe(pipes) < 0)
            return complain_failed("pipe");
        fflush(stdout);
        pid_t child = fork();
        if (child < 0)
            return complain_failed("fork");
        if (child == 0) {
            close(pipes[0]);
            try_one(number, pipes[1]);
            _exit(0);
        }
        close(pipes[1]);
        struct pollfd ready = {.fd = pipes[0], .events = POLLIN};
        int ended = poll(&ready, 1, LIMIT_MS) == 1;
        long result = 0;
        int said = ended && read(pipes[0], &result, sizeof result) == sizeof result;
        close(pipes[0]);
        if (!ended)
            kill(child, SIGKILL);
        if (waitpid(child, &status, 0) < 0)
            return complain_failed("waitpid");
        say(number, said, result, ended, status);
    }
    return PROBE_OK;
}
