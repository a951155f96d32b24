/* The verb `clone`: what each namespace alone costs: a clone3 of a process with it, which exits at once, until it is
 * reaped. In rounds whose order is shuffled, each after a pause, as the kernel removes what was made later. Needs
 * CAP_SYS_ADMIN.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "probe.h"
#include "probe_bench.h"

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x00000080
#endif

enum { MOST_ROUNDS = 10000 };

static const struct kind {
    const char *name;
    uint64_t flags;
} KINDS[] = {
    {"none", 0},
    {"user", CLONE_NEWUSER},
    {"mnt", CLONE_NEWNS},
    {"pid", CLONE_NEWPID},
    {"net", CLONE_NEWNET},
    {"ipc", CLONE_NEWIPC},
    {"uts", CLONE_NEWUTS},
    {"cgroup", CLONE_NEWCGROUP},
    {"time", CLONE_NEWTIME},
    {"all", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_NEWTIME},
};
enum { COUNT = sizeof KINDS / sizeof *KINDS };

/* Nanoseconds, or 0 with errno. */
static uint64_t cloned(uint64_t flags)
{
    struct clone_args args = {.flags = flags, .exit_signal = SIGCHLD};
    uint64_t began = bench_now();
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0)
        _exit(0);
    int status;
    if (pid < 0 || waitpid((pid_t)pid, &status, 0) < 0)
        return 0;
    uint64_t took = bench_now() - began;
    if (WIFEXITED(status))
        return took;
    errno = ECHILD;
    return 0;
}

int verb_clone(int argc, char **argv)
{
    (void)argc;
    uint64_t rounds, pause_us;
    if (parse_number(argv[1], &rounds) < 0 || rounds < 1 || rounds > MOST_ROUNDS)
        return bad_argument("a number of rounds", argv[1]);
    if (parse_number(argv[2], &pause_us) < 0 || pause_us >= 1000000)
        return bad_argument("microseconds below a second", argv[2]);
    struct bench_state state = {.seed = bench_now() | 1};
    struct timespec pause = {.tv_nsec = (long)pause_us * 1000};
    for (uint64_t i = 0; i < rounds; i++) {
        unsigned order[COUNT];
        for (unsigned k = 0; k < COUNT; k++) {
            unsigned at = (unsigned)(bench_random(&state) % (k + 1)); /* Fisher and Yates, inside out */
            order[k] = order[at];
            order[at] = k;
        }
        for (unsigned k = 0; k < COUNT; k++) {
            const struct kind *kind = &KINDS[order[k]];
            nanosleep(&pause, NULL);
            uint64_t took = cloned(kind->flags);
            if (took == 0) {
                fprintf(stderr, "ringfence-probe: clone3 with namespaces: %s: %s\n", kind->name, strerror(errno));
                return PROBE_FAILED;
            }
            printf("%s %" PRIu64 "\n", kind->name, took);
        }
    }
    return PROBE_OK;
}
