/* The verb `bench`: small measurements that time themselves, so that no start of a process or of a sandbox is in them.
 *
 * A bench has batches, each of which does something some times and adds what that took to its figures' tallies. A sample
 * is as many batches as fill its time, so that a figure is as exact where it is slow as where it is quick. Printed is a
 * line for each figure, its name and its samples; the file system, where files are made; and what CLOCK_MONOTONIC was at
 * the beginning and at the end, by which whoever started the probe can tell whether this clock runs as his does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "probe.h"
#include "probe_bench.h"

enum { MOST_SAMPLES = 1000, STEPS = 50000, CALLS = 256, SWITCHES = 64, PAGES = 256, COPY_BYTES = 8 << 20 };
/* No bench goes on for longer, however slow it is here: it then has fewer samples. */
static const uint64_t MOST_NS = UINT64_C(5000000000);

uint64_t bench_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

int bench_failed(struct bench_state *state, const char *call)
{
    state->failed = call;
    return -1;
}

int bench_memory(struct bench_state *state, size_t size)
{
    state->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (state->memory == MAP_FAILED)
        return bench_failed(state, "mmap");
    state->size = size;
    memset(state->memory, 1, size); /* not zeros: no shared zero page */
    return 0;
}

uint64_t bench_random(struct bench_state *state)
{
    uint64_t x = state->seed;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17; /* xorshift64: Marsaglia, 2003 */
    return state->seed = x;
}

void bench_end_child(struct bench_state *state)
{
    if (state->child <= 0)
        return;
    kill(state->child, SIGKILL);
    waitpid(state->child, NULL, 0);
    state->child = 0;
}

/* ---- cpu ---- */

static int batch_integer(struct bench_state *state, struct tally *tally)
{
    uint64_t x = state->seed, began = bench_now();
    for (uint64_t i = 0; i < STEPS; i++)
        x ^= x << 13, x ^= x >> 7, x = x * 5 + i; /* each step needs the one before */
    tally->ns += bench_now() - began;
    tally->count += STEPS;
    state->seed = x | 1; /* used, so that it isn't left out */
    return 0;
}

static int batch_float(struct bench_state *state, struct tally *tally)
{
    volatile double start = 1 + (double)(state->seed & 1), end;
    double x = start;
    uint64_t began = bench_now();
    for (int i = 0; i < STEPS; i++)
        x = x * 0.99999 + 0.25 / (x + 1);
    end = x;
    tally->ns += bench_now() - began;
    tally->count += STEPS;
    return end > 0 ? 0 : bench_failed(state, "float"); /* it converges to about 158 */
}

static int open_copy(struct bench_state *state, char **args)
{
    (void)args;
    return bench_memory(state, 2 * (size_t)COPY_BYTES);
}

static int batch_copy(struct bench_state *state, struct tally *tally)
{
    uint64_t began = bench_now();
    memcpy(state->memory, state->memory + COPY_BYTES, COPY_BYTES);
    __asm__ volatile("" : : "r"(state->memory) : "memory");
    tally->ns += bench_now() - began;
    tally->count += COPY_BYTES;
    return 0;
}

/* ---- kernel ---- */

static int batch_syscall(struct bench_state *state, struct tally *tally)
{
    (void)state;
    uint64_t began = bench_now();
    for (int i = 0; i < CALLS; i++)
        syscall(SYS_getppid); /* by number: no library keeps its answer */
    tally->ns += bench_now() - began;
    tally->count += CALLS;
    return 0;
}

/* Both on one CPU: between two, a wake-up of an idle one would be measured. */
static int open_switch(struct bench_state *state, char **args)
{
    (void)args;
    cpu_set_t one;
    CPU_ZERO(&one);
    int cpu = sched_getcpu();
    if (cpu < 0 || cpu >= CPU_SETSIZE)
        return bench_failed(state, "getcpu");
    CPU_SET((unsigned)cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) < 0)
        return bench_failed(state, "sched_setaffinity");
    int there[2], back[2];
    if (pipe2(there, O_CLOEXEC) < 0 || pipe2(back, O_CLOEXEC) < 0)
        return bench_failed(state, "pipe2");
    state->child = fork();
    if (state->child < 0)
        return bench_failed(state, "fork");
    if (state->child == 0) {
        close(there[1]), close(back[0]);
        char byte;
        while (read(there[0], &byte, 1) == 1 && write(back[1], &byte, 1) == 1)
            ;
        _exit(0);
    }
    close(there[0]), close(back[1]);
    state->in = back[0], state->out = there[1];
    return 0;
}

static int batch_switch(struct bench_state *state, struct tally *tally)
{
    char byte = 0;
    uint64_t began = bench_now();
    for (int i = 0; i < SWITCHES; i++)
        if (write(state->out, &byte, 1) != 1 || read(state->in, &byte, 1) != 1)
            return bench_failed(state, "pipe");
    tally->ns += bench_now() - began;
    tally->count += 2 * SWITCHES;
    return 0;
}

static int batch_fault(struct bench_state *state, struct tally *tally)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = page * PAGES;
    char *fresh = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED)
        return bench_failed(state, "mmap");
    madvise(fresh, size, MADV_NOHUGEPAGE); /* a kernel without huge pages has nothing to be told */
    uint64_t began = bench_now();
    for (size_t at = 0; at < size; at += page)
        ((volatile char *)fresh)[at] = 1;
    tally->ns += bench_now() - began;
    tally->count += PAGES;
    munmap(fresh, size);
    return 0;
}

static int batch_fork(struct bench_state *state, struct tally *tally)
{
    uint64_t began = bench_now();
    pid_t child = fork();
    if (child < 0)
        return bench_failed(state, "fork");
    if (child == 0)
        _exit(0);
    if (waitpid(child, NULL, 0) != child)
        return bench_failed(state, "waitpid");
    tally->ns += bench_now() - began;
    tally->count += 1;
    return 0;
}

/* ---- all of them ---- */

static const struct bench benches[] = {
    {"integer", {{"cpu_integer", NS_A_MILLION}}, NULL, batch_integer, NULL, 0},
    {"float", {{"cpu_float", NS_A_MILLION}}, NULL, batch_float, NULL, 0},
    {"copy", {{"memory_bandwidth", PER_SECOND}}, open_copy, batch_copy, NULL, 0},
    {"syscall", {{"system_call", NS_EACH}}, NULL, batch_syscall, NULL, 0},
    {"switch", {{"context_switch", NS_EACH}}, open_switch, batch_switch, bench_end_child, 0},
    {"fault", {{"page_fault", NS_EACH}}, NULL, batch_fault, NULL, 0},
    {"fork", {{"process_start", NS_EACH}}, NULL, batch_fork, NULL, 0},
    {"metadata",
     {{"file_create", NS_EACH}, {"file_stat", NS_EACH}, {"file_unlink", NS_EACH}},
     open_metadata,
     batch_metadata,
     close_metadata,
     0},
    {"io",
     {{"write_sequential", PER_SECOND}, {"read_sequential", PER_SECOND}, {"write_random", NS_EACH}, {"read_random", NS_EACH}},
     open_io,
     batch_io,
     close_io,
     0},
    {"sync", {{"write_synced", NS_EACH}}, open_io, batch_sync, close_io, 0},
    {"loopback",
     {{"loopback_latency", NS_EACH}, {"loopback_throughput", PER_SECOND}},
     open_loopback,
     batch_net,
     close_net,
     0},
    {"client", {{"host_latency", NS_EACH}, {"host_throughput", PER_SECOND}}, open_client, batch_net, close_net, 2},
};

static double value_of(enum figure_kind kind, const struct tally *tally)
{
    double ns = (double)tally->ns, count = (double)tally->count;
    if (kind == PER_SECOND)
        return count * 1e9 / ns;
    return kind == NS_A_MILLION ? ns * 1e6 / count : ns / count;
}

/* One sample of each figure. A clock that went back, or that stands still, gives none. */
static int take_sample(const struct bench *bench, struct bench_state *state, uint64_t ns, double *values)
{
    struct tally tallies[BENCH_FIGURES] = {{0, 0}};
    uint64_t spent = 0, batches = 0;
    do {
        if (bench->batch(state, tallies) < 0)
            return -1;
        uint64_t before = spent;
        spent = 0;
        for (int i = 0; i < BENCH_FIGURES && bench->figures[i].name; i++)
            spent += tallies[i].ns;
        errno = ERANGE;
        if (spent < before || spent - before > UINT64_C(100) * MOST_NS || ++batches > 100000000)
            return bench_failed(state, "clock_gettime");
    } while (spent < ns);
    for (int i = 0; i < BENCH_FIGURES && bench->figures[i].name; i++) {
        if (tallies[i].ns == 0)
            return bench_failed(state, "clock_gettime");
        values[i] = value_of(bench->figures[i].kind, &tallies[i]);
    }
    return 0;
}

static int run_bench(const struct bench *bench, struct bench_state *state, unsigned samples, uint64_t ns, char **args)
{
    double values[MOST_SAMPLES][BENCH_FIGURES], warming[BENCH_FIGURES];
    unsigned taken = 0;
    uint64_t began = bench_now();
    /* The first sample fills caches, and isn't told. */
    if ((bench->open && bench->open(state, args) < 0) || take_sample(bench, state, ns, warming) < 0)
        return -1;
    while (taken < samples && (taken == 0 || bench_now() - began < MOST_NS)) {
        if (take_sample(bench, state, ns, values[taken]) < 0)
            return -1;
        taken++;
    }
    struct statfs where;
    if (bench->open == open_metadata || bench->open == open_io)
        if (statfs(".", &where) == 0)
            printf("filesystem %lx\n", (unsigned long)where.f_type);
    for (int i = 0; i < BENCH_FIGURES && bench->figures[i].name; i++) {
        printf("%s", bench->figures[i].name);
        for (unsigned at = 0; at < taken; at++)
            printf(" %.2f", values[at][i]);
        putchar('\n');
    }
    printf("clock %" PRIu64 " %" PRIu64 "\n", began, bench_now());
    return 0;
}

int verb_bench(int argc, char **argv)
{
    uint64_t samples, us;
    if (parse_number(argv[2], &samples) < 0 || samples < 1 || samples > MOST_SAMPLES)
        return bad_argument("a number of samples", argv[2]);
    if (parse_number(argv[3], &us) < 0 || us < 1 || us > 1000000)
        return bad_argument("microseconds of a sample", argv[3]);
    const struct bench *bench = NULL;
    for (size_t i = 0; i < sizeof benches / sizeof benches[0]; i++)
        if (strcmp(benches[i].name, argv[1]) == 0)
            bench = &benches[i];
    if (!bench || argc - 4 != bench->args)
        return bad_argument("a bench, or its arguments,", argv[1]);
    signal(SIGPIPE, SIG_IGN); /* EPIPE tells which call it was */
    struct bench_state state = {.in = -1, .out = -1, .seed = UINT64_C(88172645463325252)};
    int status = run_bench(bench, &state, (unsigned)samples, us * 1000, argv + 4) < 0 ? complain_failed(state.failed) : PROBE_OK;
    if (bench->close)
        bench->close(&state);
    return status;
}
