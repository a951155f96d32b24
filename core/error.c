/* The error record, and the few helpers that everybody needs. */
#include "rf.h"

#include <poll.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int rf_fail_errno(struct rf_error *e, int err, const char *step, const char *call, const char *detail) {
    e->err = err;
    snprintf(e->step, sizeof e->step, "%s", step);
    snprintf(e->call, sizeof e->call, "%s", call);
    snprintf(e->detail, sizeof e->detail, "%s", detail ? detail : "");
    return -1;
}

int rf_fail(struct rf_error *e, const char *step, const char *call, const char *detail) {
    return rf_fail_errno(e, errno, step, call, detail);
}

uint64_t rf_monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int rf_write_all(int fd, const void *data, size_t n) {
    const uint8_t *at = data;
    while (n > 0) {
        ssize_t w = write(fd, at, n);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0 && errno == EAGAIN) {
            struct pollfd wait = {.fd = fd, .events = POLLOUT};
            poll(&wait, 1, -1);
            continue;
        }
        if (w < 0) return -1;
        at += w;
        n -= (size_t)w;
    }
    return 0;
}

char *rf_decimal(char *buf, uint64_t v) {
    snprintf(buf, 21, "%llu", (unsigned long long)v);
    return buf;
}

int rf_read_number(int fd, const char *key, uint64_t *v) {
    char text[4096];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    if (n < 0) return -1;
    text[n] = 0;
    const char *at = text;
    if (key) {
        at = strstr(text, key);
        if (!at) return -1;
        at += strlen(key);
    }
    while (*at == ' ') at++;
    if (*at < '0' || *at > '9') return -1; /* "max", for one */
    uint64_t sum = 0;
    for (; *at >= '0' && *at <= '9'; at++) {
        uint64_t digit = (uint64_t)(*at - '0');
        if (sum > (UINT64_MAX - digit) / 10) return -1;
        sum = sum * 10 + digit;
    }
    *v = sum;
    return 0;
}
