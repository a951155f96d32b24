/* The channel: a stream that arrives in pieces, with descriptors, must give the same frames as the whole of it.
 *
 * The input is a run of pieces: a byte whose low 6 bits, times 7, are the length, and whose high 2 bits are the number
 * of descriptors that come with it. */
#include "fuzz.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>

static struct rf_channel channel;
static uint8_t *stream;
static size_t stream_length;

static void send_piece(int fd, const uint8_t *data, size_t n, unsigned nfds) {
    union {
        char bytes[CMSG_SPACE(3 * sizeof(int))];
        struct cmsghdr align;
    } control;
    memset(&control, 0, sizeof control);
    struct iovec iov = {.iov_base = (void *)(uintptr_t)data, .iov_len = n};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (nfds) {
        msg.msg_control = control.bytes;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        int some[3] = {2, 2, 2};
        memcpy(CMSG_DATA(c), some, nfds * sizeof(int));
    }
    CHECK(sendmsg(fd, &msg, MSG_NOSIGNAL) == (ssize_t)n);
}

/* The next frame of the whole stream at `at`, read the plain way: its length, 0 where it isn't whole, -1 where it is none. */
static ssize_t expected(size_t at, struct rf_header *h) {
    struct rf_error e;
    if (stream_length - at < sizeof *h) return 0;
    memcpy(h, stream + at, sizeof *h);
    if (rf_header_check(h, RF_PAYLOAD_MAX, &e) < 0) return -1;
    return stream_length - at - sizeof *h < h->length ? 0 : (ssize_t)(sizeof *h + h->length);
}

/* As init's take_fds: the frame's descriptors are the first that came. */
static void take_fds(unsigned n) {
    for (unsigned i = 0; i < n; i++) {
        CHECK(fcntl(channel.fds[i], F_GETFD) == FD_CLOEXEC);
        close(channel.fds[i]);
    }
    memmove(channel.fds, channel.fds + n, (channel.nfds - n) * sizeof *channel.fds);
    channel.nfds -= n;
}

/* Takes all whole frames; -1 where the channel is over. `at` is where the next frame begins in the stream. */
static int take_frames(size_t *at) {
    struct rf_frame f;
    struct rf_error e;
    int got;
    while ((got = rf_channel_next(&channel, &f, &e)) > 0) {
        struct rf_header h;
        CHECK(expected(*at, &h) == (ssize_t)(sizeof h + f.length));
        CHECK(f.type == h.type && f.id == h.id && f.nfds == h.nfds && f.nfds <= channel.nfds);
        if (f.length) CHECK(memcmp(f.payload, stream + *at + sizeof h, f.length) == 0);
        *at += sizeof h + f.length;
        take_fds(f.nfds);
    }
    if (got < 0) check_error(&e);
    return got;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (!channel.in) {
        channel.in = malloc(sizeof(struct rf_header) + RF_PAYLOAD_MAX);
        stream = malloc(1 << 20);
    }
    int lowest = lowest_free_fd(), ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    CHECK(fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0);
    channel.fd = ends[0];
    channel.filled = channel.used = 0;
    channel.nfds = 0;
    stream_length = 0;
    size_t at = 0;
    for (bool going = true; going && n > 1 && stream_length < (1 << 20) - 512;) {
        size_t length = (size_t)(data[0] & 63) * 7;
        unsigned nfds = data[0] >> 6;
        data++, n--;
        if (length > n) length = n;
        if (length == 0) continue;
        memcpy(stream + stream_length, data, length);
        stream_length += length;
        send_piece(ends[1], data, length, nfds);
        data += length, n -= length;
        struct rf_error e;
        int r;
        while (going && (r = rf_channel_fill(&channel, &e)) > 0) going = take_frames(&at) >= 0;
        if (going) CHECK(r < 0);
        if (going && e.err != EAGAIN) going = false;
        CHECK(channel.nfds <= RF_FDS_MAX);
    }
    for (unsigned i = 0; i < channel.nfds; i++) close(channel.fds[i]);
    close(ends[0]);
    close(ends[1]);
    CHECK(lowest_free_fd() == lowest);
    return 0;
}
