/* What the probe's benches have in common: see probe_bench.c. */
#ifndef RINGFENCE_PROBE_BENCH_H
#define RINGFENCE_PROBE_BENCH_H

#include <stdint.h>
#include <sys/types.h>

enum { BENCH_FIGURES = 4 };

/* How a figure follows from nanoseconds and operations (or bytes). */
enum figure_kind { NS_EACH, NS_A_MILLION, PER_SECOND };

struct figure {
    const char *name; /* as in ringfence's table of measures; NULL: none */
    enum figure_kind kind;
};

/* What one figure has of a sample so far. */
struct tally {
    uint64_t ns;
    uint64_t count; /* operations, or bytes */
};

/* What a bench keeps from one batch to the next. Which of it, is its own affair. */
struct bench_state {
    const char *failed; /* the call that failed, errno being its error */
    int in, out;        /* descriptors; -1: none */
    pid_t child;        /* 0: none */
    char *memory;
    size_t size;
    uint64_t seed;
    char path[32];
};

struct bench {
    const char *name;
    struct figure figures[BENCH_FIGURES];
    int (*open)(struct bench_state *state, char **args); /* may be NULL */
    int (*batch)(struct bench_state *state, struct tally *tallies);
    void (*close)(struct bench_state *state); /* may be NULL */
    int args;                                 /* how many it takes */
};

/* probe_bench.c. -1 with state->failed set. */
uint64_t bench_now(void);
int bench_failed(struct bench_state *state, const char *call);
int bench_memory(struct bench_state *state, size_t size);
uint64_t bench_random(struct bench_state *state);
void bench_end_child(struct bench_state *state);

/* probe_bench_io.c */
int open_metadata(struct bench_state *state, char **args);
int batch_metadata(struct bench_state *state, struct tally *tallies);
void close_metadata(struct bench_state *state);
int open_io(struct bench_state *state, char **args);
int batch_io(struct bench_state *state, struct tally *tallies);
int batch_sync(struct bench_state *state, struct tally *tallies);
void close_io(struct bench_state *state);

/* probe_bench_net.c */
int open_loopback(struct bench_state *state, char **args);
int open_client(struct bench_state *state, char **args);
int batch_net(struct bench_state *state, struct tally *tallies);
void close_net(struct bench_state *state);

#endif
