/* Benches of files, all in the working directory, in a name of this process's own; what they make they remove. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "probe_bench.h"

enum { FILES = 32, BLOCK = 65536, SMALL = 4096, FILE_BYTES = 4 << 20, SOME = 128 };

int open_metadata(struct bench_state *state, char **args)
{
    (void)args;
    snprintf(state->path, sizeof state->path, "bench-%d", (int)getpid());
    if (mkdir(state->path, 0700) < 0)
        return bench_failed(state, "mkdir");
    state->in = open(state->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return state->in < 0 ? bench_failed(state, "open") : 0;
}

int batch_metadata(struct bench_state *state, struct tally *tallies)
{
    char names[FILES][8];
    struct stat found;
    for (int i = 0; i < FILES; i++)
        snprintf(names[i], sizeof names[i], "%d", i);
    uint64_t marks[4];
    marks[0] = bench_now();
    for (int i = 0; i < FILES; i++) {
        int fd = openat(state->in, names[i], O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0)
            return bench_failed(state, "openat");
        close(fd);
    }
    marks[1] = bench_now();
    for (int i = 0; i < FILES; i++)
        if (fstatat(state->in, names[i], &found, AT_SYMLINK_NOFOLLOW) < 0)
            return bench_failed(state, "fstatat");
    marks[2] = bench_now();
    for (int i = 0; i < FILES; i++)
        if (unlinkat(state->in, names[i], 0) < 0)
            return bench_failed(state, "unlinkat");
    marks[3] = bench_now();
    for (int i = 0; i < 3; i++) {
        tallies[i].ns += marks[i + 1] - marks[i];
        tallies[i].count += FILES;
    }
    return 0;
}

void close_metadata(struct bench_state *state)
{
    if (state->in < 0)
        return;
    for (int i = 0; i < FILES; i++) { /* of a batch that failed in its middle */
        char name[8];
        snprintf(name, sizeof name, "%d", i);
        unlinkat(state->in, name, 0);
    }
    close(state->in);
    rmdir(state->path);
}

static int write_file(struct bench_state *state)
{
    for (off_t at = 0; at < FILE_BYTES; at += BLOCK)
        if (pwrite(state->out, state->memory, BLOCK, at) != BLOCK)
            return bench_failed(state, "pwrite");
    return 0;
}

int open_io(struct bench_state *state, char **args)
{
    (void)args;
    if (bench_memory(state, BLOCK) < 0)
        return -1;
    snprintf(state->path, sizeof state->path, "bench-%d", (int)getpid());
    state->out = open(state->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    return state->out < 0 ? bench_failed(state, "open") : write_file(state);
}

static off_t somewhere(struct bench_state *state)
{
    return (off_t)(bench_random(state) % (FILE_BYTES / SMALL)) * SMALL;
}

int batch_io(struct bench_state *state, struct tally *tallies)
{
    uint64_t marks[5];
    if (ftruncate(state->out, 0) < 0)
        return bench_failed(state, "ftruncate");
    marks[0] = bench_now();
    if (write_file(state) < 0)
        return -1;
    marks[1] = bench_now();
    for (off_t at = 0; at < FILE_BYTES; at += BLOCK)
        if (pread(state->out, state->memory, BLOCK, at) != BLOCK)
            return bench_failed(state, "pread");
    marks[2] = bench_now();
    for (int i = 0; i < SOME; i++)
        if (pwrite(state->out, state->memory, SMALL, somewhere(state)) != SMALL)
            return bench_failed(state, "pwrite");
    marks[3] = bench_now();
    for (int i = 0; i < SOME; i++)
        if (pread(state->out, state->memory, SMALL, somewhere(state)) != SMALL)
            return bench_failed(state, "pread");
    marks[4] = bench_now();
    for (int i = 0; i < 4; i++) {
        tallies[i].ns += marks[i + 1] - marks[i];
        tallies[i].count += i < 2 ? FILE_BYTES : SOME;
    }
    return 0;
}

int batch_sync(struct bench_state *state, struct tally *tallies)
{
    uint64_t began = bench_now();
    if (pwrite(state->out, state->memory, SMALL, somewhere(state)) != SMALL)
        return bench_failed(state, "pwrite");
    if (fdatasync(state->out) < 0)
        return bench_failed(state, "fdatasync");
    tallies->ns += bench_now() - began;
    tallies->count += 1;
    return 0;
}

void close_io(struct bench_state *state)
{
    if (state->out < 0)
        return;
    close(state->out);
    unlink(state->path);
}
