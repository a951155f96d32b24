/* Verbs for exit status, signals, streams, arguments, environment. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "probe.h"

enum { CHUNK = 65536 };

extern char **environ;

int verb_exit(int argc, char **argv)
{
    (void)argc;
    uint64_t status;
    if (parse_number(argv[1], &status) < 0 || status > 255)
        return bad_argument("an exit status", argv[1]);
    return (int)status;
}

int verb_signal(int argc, char **argv)
{
    (void)argc;
    uint64_t number;
    if (parse_number(argv[1], &number) < 0 || number < 1 || number > 64)
        return bad_argument("a signal", argv[1]);
    int sig = (int)number;
    /* A core_pattern that starts with a pipe runs even at RLIMIT_CORE 0; not so for an undumpable process. */
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    if (sig != SIGKILL && sig != SIGSTOP && signal(sig, SIG_DFL) == SIG_ERR)
        return complain_failed("signal");
    sigset_t unblocked;
    sigemptyset(&unblocked);
    sigaddset(&unblocked, sig);
    sigprocmask(SIG_UNBLOCK, &unblocked, NULL);
    if (kill(getpid(), sig) < 0)
        return complain_failed("kill");
    fprintf(stderr, "ringfence-probe: signal %d didn't end this process\n", sig);
    return PROBE_FAILED;
}

int verb_cat(int argc, char **argv)
{
    (void)argc, (void)argv;
    char chunk[CHUNK];
    for (;;) {
        ssize_t n = read(STDIN_FILENO, chunk, sizeof chunk);
        if (n == 0)
            return PROBE_OK;
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return complain_failed("read");
        if (write_all(STDOUT_FILENO, chunk, (size_t)n) < 0)
            return complain_failed("write");
    }
}

int verb_count(int argc, char **argv)
{
    (void)argc, (void)argv;
    unsigned char chunk[CHUNK];
    uint64_t total = 0, hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a, 64 bits: offset basis and prime */
    for (;;) {
        ssize_t n = read(STDIN_FILENO, chunk, sizeof chunk);
        if (n == 0)
            break;
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return complain_failed("read");
        total += (uint64_t)n;
        for (ssize_t i = 0; i < n; i++)
            hash = (hash ^ chunk[i]) * UINT64_C(0x100000001b3);
    }
    printf("%" PRIu64 " %016" PRIx64 "\n", total, hash);
    return PROBE_OK;
}

int verb_emit(int argc, char **argv)
{
    uint64_t left;
    if (parse_size(argv[1], &left) < 0)
        return bad_argument("a size", argv[1]);
    uint64_t value = 'x';
    unsigned period = 1;
    if (argc > 2 && strcmp(argv[2], "pattern") == 0)
        period = 251; /* prime: a lost or repeated block of 2^n bytes shows */
    else if (argc > 2 && strcmp(argv[2], "all") == 0)
        period = 256;
    else if (argc > 2 && (parse_number(argv[2], &value) < 0 || value > 255))
        return bad_argument("a byte or pattern", argv[2]);

    unsigned char chunk[251 * 256]; /* a multiple of every period */
    for (unsigned i = 0; i < sizeof chunk; i++)
        chunk[i] = period == 1 ? (unsigned char)value : (unsigned char)(i % period);
    while (left > 0) {
        size_t size = left < sizeof chunk ? (size_t)left : sizeof chunk;
        if (write_all(STDOUT_FILENO, chunk, size) < 0)
            return complain_failed("write");
        left -= size;
    }
    return PROBE_OK;
}

int verb_both(int argc, char **argv)
{
    uint64_t lines = 100;
    if (argc > 1 && parse_number(argv[1], &lines) < 0)
        return bad_argument("a number of lines", argv[1]);
    for (uint64_t i = 0; i < lines; i++) {
        /* dprintf doesn't buffer, so the two streams really interleave. */
        if (dprintf(STDOUT_FILENO, "out %" PRIu64 "\n", i) < 0 || dprintf(STDERR_FILENO, "err %" PRIu64 "\n", i) < 0)
            return complain_failed("write");
    }
    return PROBE_OK;
}

int verb_argv(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        fwrite(argv[i], 1, strlen(argv[i]) + 1, stdout);
    return PROBE_OK;
}

int verb_env(int argc, char **argv)
{
    (void)argc, (void)argv;
    for (char **entry = environ; *entry; entry++)
        fwrite(*entry, 1, strlen(*entry) + 1, stdout);
    return PROBE_OK;
}

int verb_cwd(int argc, char **argv)
{
    (void)argc, (void)argv;
    char path[PATH_MAX];
    if (!getcwd(path, sizeof path))
        return complain_failed("getcwd");
    puts(path);
    return PROBE_OK;
}

int verb_closeout(int argc, char **argv)
{
    (void)argc;
    double seconds;
    if (parse_seconds(argv[1], &seconds) < 0)
        return bad_argument("seconds", argv[1]);
    close(STDOUT_FILENO);
    close(STDERR_FILENO);
    sleep_seconds(seconds);
    return 7;
}

int verb_nostdin(int argc, char **argv)
{
    (void)argc, (void)argv;
    sleep_seconds(0.2);
    return PROBE_OK;
}
