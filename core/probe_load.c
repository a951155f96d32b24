/* Verbs that load or outlive: stubborn processes, daemons, CPU, memory, forks. All are bounded in time. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "probe.h"

enum { DEFAULT_SECONDS = 60, MAX_CHILDREN = 100000 };

static void ignore_polite_signals(void)
{
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
}

static int optional_seconds(int argc, char **argv, int index, double *seconds)
{
    *seconds = DEFAULT_SECONDS;
    if (argc > index && parse_seconds(argv[index], seconds) < 0)
        return bad_argument("seconds", argv[index]);
    return PROBE_OK;
}

static void burn(double seconds)
{
    double end = monotonic_seconds() + seconds;
    volatile uint64_t work = 0;
    while (monotonic_seconds() < end)
        for (int i = 0; i < 100000; i++)
            work = work * 31 + 7;
}

int verb_stubborn(int argc, char **argv)
{
    double seconds;
    if (optional_seconds(argc, argv, 1, &seconds) != PROBE_OK)
        return PROBE_USAGE;
    ignore_polite_signals();
    if (dprintf(STDOUT_FILENO, "ready\n") < 0)
        return complain_failed("write");
    sleep_seconds(seconds);
    return PROBE_OK;
}

/* The daemon: a session and a process group of its own, no parent, deaf to TERM. Its pid goes to ready_fd. */
static _Noreturn void be_daemon(int ready_fd, double seconds, int detached)
{
    setsid();
    pid_t second = fork();
    if (second != 0)
        _exit(second < 0 ? 1 : 0);
    ignore_polite_signals();
    if (detached) { /* else it holds the workload's stdout open, as a careless daemon does */
        int null = open("/dev/null", O_RDWR | O_CLOEXEC);
        for (int fd = 0; null >= 0 && fd < 3; fd++)
            dup2(null, fd);
    }
    pid_t self = getpid();
    if (write_all(ready_fd, &self, sizeof self) < 0)
        _exit(1);
    close(ready_fd);
    sleep_seconds(seconds);
    _exit(0);
}

static int start_daemon(double seconds, int detached)
{
    int ready[2];
    if (pipe2(ready, O_CLOEXEC) < 0)
        return complain_failed("pipe2");
    pid_t first = fork();
    if (first < 0)
        return complain_failed("fork");
    if (first == 0) {
        close(ready[0]);
        be_daemon(ready[1], seconds, detached);
    }
    close(ready[1]);
    pid_t daemon_pid;
    ssize_t n = read(ready[0], &daemon_pid, sizeof daemon_pid);
    close(ready[0]);
    waitpid(first, NULL, 0);
    if (n != (ssize_t)sizeof daemon_pid) {
        errno = EAGAIN;
        return complain_failed("fork");
    }
    if (dprintf(STDOUT_FILENO, "ready %d\n", (int)daemon_pid) < 0)
        return complain_failed("write");
    return PROBE_OK;
}

static int orphan(int argc, char **argv, int stay)
{
    double seconds;
    if (optional_seconds(argc, argv, 1, &seconds) != PROBE_OK)
        return PROBE_USAGE;
    int detached = argc > 2;
    if (detached && strcmp(argv[2], "detached") != 0)
        return bad_argument("the second argument", argv[2]);
    int status = start_daemon(seconds, detached);
    if (status == PROBE_OK && stay)
        sleep_seconds(seconds);
    return status;
}

int verb_orphan(int argc, char **argv)
{
    return orphan(argc, argv, 1);
}

int verb_orphan_exit(int argc, char **argv)
{
    return orphan(argc, argv, 0);
}

int verb_spin(int argc, char **argv)
{
    double seconds;
    if (optional_seconds(argc, argv, 1, &seconds) != PROBE_OK)
        return PROBE_USAGE;
    burn(seconds);
    return PROBE_OK;
}

int verb_spin_children(int argc, char **argv)
{
    uint64_t count;
    double seconds;
    if (parse_number(argv[1], &count) < 0 || count > 1024)
        return bad_argument("a number of children", argv[1]);
    if (optional_seconds(argc, argv, 2, &seconds) != PROBE_OK)
        return PROBE_USAGE;
    int status = PROBE_OK;
    uint64_t started = 0;
    for (; started < count && status == PROBE_OK; started++) {
        pid_t child = fork();
        if (child == 0) {
            burn(seconds);
            _exit(0);
        }
        if (child < 0) {
            status = complain_failed("fork");
            break;
        }
    }
    dprintf(STDOUT_FILENO, "ready %" PRIu64 "\n", started);
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    return status;
}

int verb_hog(int argc, char **argv)
{
    (void)argc;
    enum { STEP = 1 << 20, REPORT = 16 << 20 };
    uint64_t size;
    if (parse_size(argv[1], &size) < 0)
        return bad_argument("a size", argv[1]);
    uint64_t touched = 0;
    while (touched < size) {
        size_t step = size - touched < STEP ? (size_t)(size - touched) : STEP;
        char *chunk = mmap(NULL, step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (chunk == MAP_FAILED)
            return say_failed("mmap");
        memset(chunk, (int)(touched / STEP % 255) + 1, step); /* not zeros: no shared zero page */
        touched += step;
        /* Unbuffered: the last line before the OOM killer comes is the one that counts. */
        if ((touched % REPORT == 0 || touched == size) && dprintf(STDOUT_FILENO, "touched %" PRIu64 "\n", touched) < 0)
            return complain_failed("write");
    }
    sleep_seconds(1);
    puts("hogged");
    return PROBE_OK;
}

/* Each child waits for the end of a pipe that only the parent holds open, so none outlives the parent. */
static int fork_waiting_child(const int hold[2])
{
    pid_t child = fork();
    if (child != 0)
        return child < 0 ? -1 : 0;
    close(hold[1]);
    char byte;
    while (read(hold[0], &byte, 1) < 0 && errno == EINTR)
        ;
    _exit(0);
}

int verb_forkbomb(int argc, char **argv)
{
    (void)argc;
    uint64_t max, forked = 0;
    if (parse_number(argv[1], &max) < 0 || max > MAX_CHILDREN)
        return bad_argument("a number of children", argv[1]);
    int hold[2];
    if (pipe2(hold, O_CLOEXEC) < 0)
        return complain_failed("pipe2");
    int err = 0;
    while (forked < max && !err) {
        if (fork_waiting_child(hold) < 0)
            err = errno;
        else
            forked++;
    }
    close(hold[1]); /* ends them all */
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    printf("forked %" PRIu64 " %s\n", forked, err ? errno_name(err) : "ok");
    return PROBE_OK;
}
