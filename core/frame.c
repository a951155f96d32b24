/* The wire format: frames, attributes, and the channel that carries them. See docs/design/protocol.md. */
#include "rf.h"

#include <endian.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#if __BYTE_ORDER != __LITTLE_ENDIAN
#error "the wire format is little-endian and this code reads it in place"
#endif

int rf_header_check(const struct rf_header *h, size_t payload_max, struct rf_error *e) {
    if (h->magic != RF_MAGIC || h->zero != 0) return rf_fail_errno(e, EPROTO, "protocol", "header", "not a ringfence frame");
    if (h->version != RF_VERSION) return rf_fail_errno(e, EPROTO, "protocol", "header", "another protocol version");
    if (h->length > payload_max) return rf_fail_errno(e, EPROTO, "protocol", "header", "payload too long");
    if (h->nfds > RF_FDS_MAX) return rf_fail_errno(e, EPROTO, "protocol", "header", "too many descriptors");
    return 0;
}

/* ---- attributes ---- */

int rf_attr_next(struct rf_reader *r, struct rf_attr *a) {
    size_t left = (size_t)(r->end - r->at);
    if (left == 0) return 0;
    if (left < 8) return -1;
    uint16_t zero;
    memcpy(&a->tag, r->at, 2);
    memcpy(&zero, r->at + 2, 2);
    memcpy(&a->length, r->at + 4, 4);
    if (zero != 0 || a->length > left - 8) return -1;
    a->data = r->at + 8;
    r->at += 8 + a->length;
    return 1;
}

int rf_attr_u32(const struct rf_attr *a, uint32_t *v) {
    if (a->length != 4) return -1;
    memcpy(v, a->data, 4);
    return 0;
}

int rf_attr_u64(const struct rf_attr *a, uint64_t *v) {
    if (a->length != 8) return -1;
    memcpy(v, a->data, 8);
    return 0;
}

int rf_attr_string(const struct rf_attr *a, const char **s) {
    if (a->length == 0 || memchr(a->data, 0, a->length) != a->data + a->length - 1) return -1;
    *s = (const char *)a->data;
    return 0;
}

int rf_take_string(const uint8_t **at, const uint8_t *end, const char **s) {
    const uint8_t *nul = memchr(*at, 0, (size_t)(end - *at));
    if (!nul) return -1;
    *s = (const char *)*at;
    *at = nul + 1;
    return 0;
}

void rf_put(struct rf_writer *w, uint16_t tag, const void *data, size_t n) {
    if (w->full || n > UINT32_MAX || w->capacity - w->length < 8 || w->capacity - w->length - 8 < n) {
        w->full = true;
        return;
    }
    uint16_t zero = 0;
    uint32_t length = (uint32_t)n;
    memcpy(w->buf + w->length, &tag, 2);
    memcpy(w->buf + w->length + 2, &zero, 2);
    memcpy(w->buf + w->length + 4, &length, 4);
    if (n) memcpy(w->buf + w->length + 8, data, n);
    w->length += 8 + n;
}

void rf_put_u32(struct rf_writer *w, uint16_t tag, uint32_t v) { rf_put(w, tag, &v, sizeof v); }
void rf_put_u64(struct rf_writer *w, uint16_t tag, uint64_t v) { rf_put(w, tag, &v, sizeof v); }
void rf_put_string(struct rf_writer *w, uint16_t tag, const char *s) { rf_put(w, tag, s, strlen(s) + 1); }

/* ---- the channel ---- */

void rf_fds_attach(struct msghdr *msg, void *control, const int *fds, unsigned n) {
    msg->msg_control = control;
    msg->msg_controllen = CMSG_SPACE(n * sizeof(int));
    struct cmsghdr *c = CMSG_FIRSTHDR(msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(n * sizeof(int));
    memcpy(CMSG_DATA(c), fds, n * sizeof(int));
}

int rf_fds_take(struct msghdr *msg, int *fds, unsigned *nfds) {
    int lost = (msg->msg_flags & MSG_CTRUNC) ? -1 : 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
            if (*nfds < RF_FDS_MAX) {
                fds[(*nfds)++] = fd;
            } else {
                close(fd);
                lost = -1;
            }
        }
    }
    return lost;
}

int rf_channel_fill(struct rf_channel *ch, struct rf_error *e) {
    size_t room = sizeof(struct rf_header) + RF_PAYLOAD_MAX - ch->filled;
    if (room == 0) return rf_fail_errno(e, EPROTO, "protocol", "buffer", "a frame that doesn't fit");
    ssize_t n;
    if (ch->port) {
        n = read(ch->fd, ch->in + ch->filled, room);
    } else {
        RF_CONTROL(RF_FDS_MAX) control;
        struct iovec iov = {.iov_base = ch->in + ch->filled, .iov_len = room};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
        n = recvmsg(ch->fd, &msg, MSG_CMSG_CLOEXEC);
        if (n >= 0 && rf_fds_take(&msg, ch->fds, &ch->nfds) < 0) return rf_fail_errno(e, EPROTO, "protocol", "descriptors", "too many in flight");
    }
    if (n < 0) return rf_fail(e, "channel", "read", "");
    if (n == 0) return 0;
    ch->filled += (size_t)n;
    return 1;
}

/* Drops the frame handed out last, with those of its descriptors that nobody took. */
static void drop_used(struct rf_channel *ch) {
    if (ch->used == 0) return;
    memmove(ch->in, ch->in + ch->used, ch->filled - ch->used);
    ch->filled -= ch->used;
    ch->used = 0;
}

int rf_channel_next(struct rf_channel *ch, struct rf_frame *f, struct rf_error *e) {
    drop_used(ch);
    if (ch->filled < sizeof(struct rf_header)) return 0;
    struct rf_header h;
    memcpy(&h, ch->in, sizeof h);
    if (rf_header_check(&h, RF_PAYLOAD_MAX, e) < 0) return -1;
    if (ch->filled < sizeof h + h.length) return 0;
    if (h.nfds > ch->nfds) return rf_fail_errno(e, EPROTO, "protocol", "descriptors", "named more than came");
    *f = (struct rf_frame){.type = h.type, .id = h.id, .payload = ch->in + sizeof h, .length = h.length, .nfds = h.nfds};
    f->fds = ch->fds;
    ch->used = sizeof h + h.length;
    return 1;
}

int rf_send(int fd, bool port, uint8_t type, uint32_t id, const void *payload, size_t n, int passed) {
    struct rf_header h = {
        .magic = RF_MAGIC, .version = RF_VERSION, .type = type, .length = (uint32_t)n, .id = id, .nfds = passed >= 0 ? 1 : 0};
    if (port) {
        if (rf_write_all(fd, &h, sizeof h) < 0) return -1;
        return n ? rf_write_all(fd, payload, n) : 0;
    }
    RF_CONTROL(1) control = {.bytes = {0}};
    struct iovec iov[2] = {{.iov_base = &h, .iov_len = sizeof h}, {.iov_base = (void *)(uintptr_t)payload, .iov_len = n}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n ? 2 : 1};
    if (passed >= 0) rf_fds_attach(&msg, &control, &passed, 1);
    size_t left = sizeof h + n;
    while (left > 0) {
        ssize_t w = sendmsg(fd, &msg, MSG_NOSIGNAL);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0 && errno == EAGAIN) {
            struct pollfd wait = {.fd = fd, .events = POLLOUT};
            poll(&wait, 1, -1);
            continue;
        }
        if (w < 0) return -1;
        left -= (size_t)w;
        msg.msg_control = NULL;
        msg.msg_controllen = 0;
        for (size_t done = (size_t)w; done > 0 && msg.msg_iovlen > 0;) {
            size_t step = done < msg.msg_iov->iov_len ? done : msg.msg_iov->iov_len;
            msg.msg_iov->iov_base = (uint8_t *)msg.msg_iov->iov_base + step;
            msg.msg_iov->iov_len -= step;
            done -= step;
            if (msg.msg_iov->iov_len == 0) {
                msg.msg_iov++;
                msg.msg_iovlen--;
            }
        }
    }
    return 0;
}

int rf_channel_send(struct rf_channel *ch, uint8_t type, uint32_t id, const void *payload, size_t n) {
    return rf_send(ch->fd, ch->port, type, id, payload, n, -1);
}

/* The record as attributes; how many bytes of `buf`, which is large enough for the longest. */
static size_t encode_error(const struct rf_error *e, uint8_t *buf, size_t capacity) {
    struct rf_writer w = {.buf = buf, .capacity = capacity};
    rf_put_u32(&w, 1, (uint32_t)e->err);
    rf_put_string(&w, 2, e->step);
    rf_put_string(&w, 3, e->call);
    rf_put_string(&w, 4, e->detail);
    return w.length;
}

int rf_send_error(int fd, uint32_t id, const struct rf_error *e) {
    uint8_t buf[sizeof *e + 64];
    return rf_send(fd, false, RF_ERROR, id, buf, encode_error(e, buf, sizeof buf), -1);
}

int rf_channel_send_error(struct rf_channel *ch, uint32_t id, const struct rf_error *e) {
    uint8_t buf[sizeof *e + 64];
    return rf_channel_send(ch, RF_ERROR, id, buf, encode_error(e, buf, sizeof buf));
}
