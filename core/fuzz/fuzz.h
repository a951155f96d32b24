/* What the harnesses share. Each feeds one parser of ../ what a fuzzer makes up, under ASan and UBSan (see ./run), and
 * checks what the parser promises of all that it accepts. */
#pragma once

#include "../rf.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CHECK(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
            abort(); \
        } \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* As many descriptors as a frame may carry. Their numbers are never used, only compared. */
static inline const int *fake_fds(void) {
    static int fds[RF_FDS_MAX];
    for (int i = 0; i < RF_FDS_MAX; i++) fds[i] = 1000 + i;
    return fds;
}

static inline bool fake_fd(int fd, unsigned nfds) { return fd >= 1000 && fd < 1000 + (int)nfds; }

/* Reads all of a string, so that ASan sees where it ends, and checks that it lies in the payload. */
static inline void check_string(const char *s, const uint8_t *data, size_t n) {
    CHECK((const uint8_t *)s >= data && (const uint8_t *)s < data + n);
    CHECK((const uint8_t *)s + strlen(s) < data + n);
}

static inline void check_error(const struct rf_error *e) {
    CHECK(e->err > 0 && e->err < 4096);
    CHECK(memchr(e->step, 0, sizeof e->step) && memchr(e->call, 0, sizeof e->call) && memchr(e->detail, 0, sizeof e->detail));
}

static inline void check_mount(const struct rf_mount *m, unsigned nfds, const uint8_t *data, size_t n) {
    CHECK(m->kind >= RF_DIR && m->kind <= RF_DISK && m->mode <= 07777);
    CHECK(m->fd == -1 || fake_fd(m->fd, nfds));
    check_string(m->source, data, n);
    check_string(m->fstype, data, n);
    check_string(m->target, data, n);
    check_string(m->data, data, n);
    CHECK(m->target[0] == '/');
}

/* The lowest free descriptor: the same before and after, where nothing was leaked. */
static inline int lowest_free_fd(void) {
    int fd = dup(2);
    close(fd);
    return fd;
}
