/* Benches of TCP, and the server that they talk to. A message is its length, 8 bytes, and as many bytes; its answer is
 * one byte. So a message of length 0 measures the way there and back, and a long one the stream.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "probe.h"
#include "probe_bench.h"

enum { ROUNDS = 16, CHUNK = 65536, STREAM = 1 << 20, ATTEMPTS = 100 };
static const uint64_t LAST = UINT64_MAX; /* a message that ends the server */

static int read_all(int fd, void *data, size_t size)
{
    char *at = data;
    while (size > 0) {
        ssize_t n = recv(fd, at, size, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            if (n == 0)
                errno = ECONNRESET;
            return -1;
        }
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

/* 0: the connection ended; 1: and so shall the server. */
static int serve_one(int fd, char *buffer)
{
    uint64_t length;
    char answer = 'a';
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    while (read_all(fd, &length, sizeof length) == 0) {
        length = le64toh(length);
        if (length == LAST)
            return 1;
        for (uint64_t left = length; left > 0;) {
            size_t size = left < CHUNK ? (size_t)left : CHUNK;
            if (read_all(fd, buffer, size) < 0)
                return 0;
            left -= size;
        }
        if (send(fd, &answer, 1, MSG_NOSIGNAL) != 1)
            return 0;
    }
    return 0;
}

/* The address in network order. Returns a listening socket, or -1 with *call set. */
static int listen_on(in_addr_t address, uint16_t port, const char **call)
{
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {address}};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    *call = "socket";
    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    *call = "bind";
    if (bind(fd, (struct sockaddr *)&own, sizeof own) == 0) {
        *call = "listen";
        if (listen(fd, 4) == 0)
            return fd;
    }
    int saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

static int serve(int listener)
{
    char buffer[CHUNK];
    for (int over = 0; !over;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0 && errno != EINTR && errno != ECONNABORTED)
            return -1;
        if (fd >= 0) {
            over = serve_one(fd, buffer);
            close(fd);
        }
    }
    return 0;
}

int verb_bench_serve(int argc, char **argv)
{
    uint64_t port;
    double seconds;
    struct in_addr address = {.s_addr = htonl(INADDR_LOOPBACK)};
    if (parse_number(argv[1], &port) < 0 || port < 1 || port > UINT16_MAX)
        return bad_argument("a port", argv[1]);
    if (parse_seconds(argv[2], &seconds) < 0 || seconds < 1)
        return bad_argument("seconds", argv[2]);
    if (argc > 3 && inet_pton(AF_INET, argv[3], &address) != 1)
        return bad_argument("an address", argv[3]);
    alarm((unsigned)seconds); /* whatever becomes of its client */
    const char *call;
    int listener = listen_on(address.s_addr, (uint16_t)port, &call);
    if (listener < 0)
        return complain_failed(call);
    return serve(listener) < 0 ? complain_failed("accept4") : PROBE_OK;
}

static int connect_to(struct bench_state *state, const struct sockaddr_in *to)
{
    int on = 1;
    state->out = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (state->out < 0)
        return bench_failed(state, "socket");
    if (connect(state->out, (const struct sockaddr *)to, sizeof *to) < 0)
        return bench_failed(state, "connect");
    setsockopt(state->out, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return 0;
}

static int exchange(struct bench_state *state, uint64_t length)
{
    uint64_t header = htole64(length);
    char answer;
    if (write_all(state->out, &header, sizeof header) < 0)
        return bench_failed(state, "send");
    for (uint64_t left = length; left > 0; left -= CHUNK)
        if (write_all(state->out, state->memory, CHUNK) < 0)
            return bench_failed(state, "send");
    return read_all(state->out, &answer, 1) < 0 ? bench_failed(state, "recv") : 0;
}

int open_loopback(struct bench_state *state, char **args)
{
    (void)args;
    const char *call;
    struct sockaddr_in own;
    socklen_t size = sizeof own;
    int listener = listen_on(htonl(INADDR_LOOPBACK), 0, &call);
    if (listener < 0)
        return bench_failed(state, call);
    if (getsockname(listener, (struct sockaddr *)&own, &size) < 0 || (state->child = fork()) < 0) {
        close(listener);
        return bench_failed(state, "fork");
    }
    if (state->child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        _exit(serve(listener) < 0);
    }
    close(listener);
    return bench_memory(state, CHUNK) < 0 ? -1 : connect_to(state, &own);
}

/* A server that is behind a gateway may be reached before it listens: then the connection ends without an answer. */
int open_client(struct bench_state *state, char **args)
{
    uint64_t port;
    struct sockaddr_in to = {.sin_family = AF_INET};
    errno = EINVAL;
    if (inet_pton(AF_INET, args[0], &to.sin_addr) != 1 || parse_number(args[1], &port) < 0 || port > UINT16_MAX)
        return bench_failed(state, "inet_pton");
    to.sin_port = htons((uint16_t)port);
    if (bench_memory(state, CHUNK) < 0)
        return -1;
    for (int attempt = 1;; attempt++) {
        if (connect_to(state, &to) == 0 && exchange(state, 0) == 0)
            return 0;
        if (attempt == ATTEMPTS)
            return -1;
        close(state->out);
        state->out = -1;
        sleep_seconds(0.05);
    }
}

int batch_net(struct bench_state *state, struct tally *tallies)
{
    uint64_t began = bench_now();
    for (int i = 0; i < ROUNDS; i++)
        if (exchange(state, 0) < 0)
            return -1;
    uint64_t between = bench_now();
    if (exchange(state, STREAM) < 0)
        return -1;
    tallies[0].ns += between - began;
    tallies[0].count += ROUNDS;
    tallies[1].ns += bench_now() - between;
    tallies[1].count += STREAM;
    return 0;
}

void close_net(struct bench_state *state)
{
    uint64_t last = htole64(LAST);
    if (state->out >= 0) {
        (void)!write(state->out, &last, sizeof last);
        close(state->out);
    }
    bench_end_child(state);
}
