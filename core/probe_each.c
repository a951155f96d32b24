/* each: many attempts in one run, each in a child of its own, so that one that is killed, crashes or hangs is told and not
 * fatal. What is tried comes by stdin, a line each, so no shell is needed inside.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "probe.h"

enum { MAX_WORDS = 8, MAX_SAID = 1 << 20, DEFAULT_LIMIT = 5 };

static int split(char *line, char **words)
{
    int count = 0;
    for (char *rest = line, *word; (word = strsep(&rest, " \n")) && count < MAX_WORDS;)
        if (*word)
            words[count++] = word;
    words[count] = NULL;
    return count;
}

/* A crash must not leave a core file, and its report not start a handler of the host's. */
void leave_no_core(void)
{
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}

static _Noreturn void attempt(int count, char **words, int out)
{
    setpgid(0, 0); /* so that its own children can be ended with it */
    /* A handler behind a pipe is started at a limit of 0, too; at 1 the kernel makes no core at all (core(5)). */
    struct rlimit none = {1, 1};
    setrlimit(RLIMIT_CORE, &none);
    dup2(out, STDOUT_FILENO);
    dup2(out, STDERR_FILENO);
    int status = run_verb(count, words);
    fflush(stdout);
    _exit(status);
}

/* Until all writers are gone or the time is over; what doesn't fit is read and dropped. Returns 0 at the time limit. */
static int drain(int in, double seconds, char *said, size_t *used)
{
    double end = monotonic_seconds() + seconds;
    for (;;) {
        struct pollfd ready = {.fd = in, .events = POLLIN};
        double left = end - monotonic_seconds();
        if (left <= 0)
            return 0;
        int r = poll(&ready, 1, (int)(left * 1000) + 1);
        if (r <= 0)
            continue;
        char rest[4096];
        char *to = *used < MAX_SAID ? said + *used : rest;
        ssize_t n = read(in, to, *used < MAX_SAID ? MAX_SAID - *used : sizeof rest);
        if (n <= 0)
            return 1;
        if (to != rest)
            *used += (size_t)n;
    }
}

static void print_line(const char *said, size_t size)
{
    while (size > 0 && said[size - 1] == '\n')
        size--;
    for (size_t i = 0; i < size; i++) {
        if (said[i] == '\n')
            fputs("; ", stdout);
        else
            putchar(said[i] ? said[i] : ' ');
    }
    putchar('\n');
}

static int one(char *line, double seconds, char *said)
{
    char *words[MAX_WORDS + 1];
    int pipes[2], count = split(line, words);
    if (pipe(pipes) < 0)
        return complain_failed("pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child < 0)
        return complain_failed("fork");
    if (child == 0) {
        close(pipes[0]);
        attempt(count, words, pipes[1]);
    }
    close(pipes[1]);
    size_t used = 0;
    int status, in_time = drain(pipes[0], seconds, said, &used);
    close(pipes[0]);
    if (!in_time) {
        kill(-child, SIGKILL);
        kill(child, SIGKILL); /* where it had no time for a group of its own */
    }
    if (waitpid(child, &status, 0) < 0)
        return complain_failed("waitpid");
    if (!in_time)
        puts("timeout");
    else if (WIFSIGNALED(status))
        printf("died signal %d\n", WTERMSIG(status));
    else if (used == 0)
        puts(WEXITSTATUS(status) == PROBE_OK ? "ok" : "nothing said");
    else
        print_line(said, used);
    return PROBE_OK;
}

/* The kernel loads a module for a family of sockets or a device that it hasn't yet, and the module stays: what the
 * unconfined run must not leave on a machine is tried where it is there already. */
int verb_if_listed(int argc, char **argv)
{
    if (!is_missing_in(argv[1], argv[2]))
        return run_verb(argc - 3, argv + 3);
    errno = ENODEV;
    return say_failed("not-loaded");
}

int verb_each(int argc, char **argv)
{
    double seconds = DEFAULT_LIMIT;
    if (argc > 1 && parse_seconds(argv[1], &seconds) < 0)
        return bad_argument("seconds", argv[1]);
    char *line = NULL, *said = malloc(MAX_SAID);
    size_t size = 0;
    int status = said ? PROBE_OK : complain_failed("malloc");
    while (status == PROBE_OK && getline(&line, &size, stdin) > 0)
        status = one(line, seconds, said);
    free(line);
    free(said);
    return status;
}
