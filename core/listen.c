/* Answers for what a guest's filter denies, and a list of it. No descriptor passes a virtio port, so in a guest init does
 * what Python does elsewhere (ringfence.levels.denials). */
#include "rf.h"

#include <linux/seccomp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* So many are answered before init looks at its other descriptors again. */
#define AT_ONCE 64

static uint32_t word(const struct seccomp_data *d, uint32_t at) {
    uint32_t v = 0;
    if (at <= sizeof *d - sizeof v) memcpy(&v, (const uint8_t *)d + at, sizeof v);
    return v;
}

/* The kernel has checked a program of the same shape, but not this one: an instruction that leads out of it denies. Jumps
 * only lead forward, so it ends. */
uint32_t rf_filter_answer(const struct sock_fprog *program, const struct seccomp_data *d) {
    uint32_t a = 0;
    for (size_t at = 0; at < program->len;) {
        struct sock_filter i; /* it lies in a payload, at any alignment */
        memcpy(&i, (const uint8_t *)program->filter + at++ * sizeof i, sizeof i);
        switch (i.code) {
        case BPF_LD | BPF_W | BPF_ABS: a = word(d, i.k); break;
        case BPF_ALU | BPF_AND | BPF_K: a &= i.k; break;
        case BPF_JMP | BPF_JA: at += i.k; break;
        case BPF_JMP | BPF_JEQ | BPF_K: at += a == i.k ? i.jt : i.jf; break;
        case BPF_JMP | BPF_JGT | BPF_K: at += a > i.k ? i.jt : i.jf; break;
        case BPF_JMP | BPF_JGE | BPF_K: at += a >= i.k ? i.jt : i.jf; break;
        case BPF_JMP | BPF_JSET | BPF_K: at += a & i.k ? i.jt : i.jf; break;
        case BPF_RET | BPF_K: return i.k;
        default: return SECCOMP_RET_ERRNO | EPERM;
        }
    }
    return SECCOMP_RET_ERRNO | EPERM;
}

static void note(struct rf_listen *l, const struct seccomp_data *d, int32_t err) {
    for (unsigned i = 0; i < l->n; i++) {
        struct rf_denial *one = &l->found[i];
        if (one->number != (uint32_t)d->nr || one->arch != d->arch || one->err != err) continue;
        one->count++;
        return;
    }
    if (l->n == RF_LEN(l->found)) {
        l->others++; /* numbers can be made up */
        return;
    }
    struct rf_denial *one = &l->found[l->n++];
    *one = (struct rf_denial){.arch = d->arch, .number = (uint32_t)d->nr, .err = err, .count = 1};
    memcpy(one->args, d->args, sizeof one->args);
}

static void answer(struct rf_listen *l) {
    struct seccomp_notif request = {0}; /* the kernel wants it to be zero */
    if (ioctl(l->fd, SECCOMP_IOCTL_NOTIF_RECV, &request) < 0) return; /* who asked was killed meanwhile */
    uint32_t says = rf_filter_answer(&l->answers, &request.data);
    int32_t err = (says & SECCOMP_RET_ACTION_FULL) == SECCOMP_RET_ERRNO ? (int32_t)(says & SECCOMP_RET_DATA) : EPERM;
    struct seccomp_notif_resp response = {.id = request.id, .error = -err};
    if (l->audit) response.error = 0, response.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    note(l, &request.data, l->audit ? -1 : err);
    ioctl(l->fd, SECCOMP_IOCTL_NOTIF_SEND, &response); /* ENOENT: likewise */
}

void rf_listen_serve(struct rf_listen *l) {
    for (int i = 0; i < AT_ONCE && l->fd >= 0; i++) {
        struct pollfd wait = {.fd = l->fd, .events = POLLIN};
        if (poll(&wait, 1, 0) <= 0) return;
        if (wait.revents & POLLIN) {
            answer(l);
            continue;
        }
        close(l->fd); /* POLLHUP: nobody has that filter any more */
        l->fd = -1;
    }
}

/* The frame's payload: how many were not listed, then those that were; then from the beginning again. */
int rf_listen_report(struct rf_listen *l, struct rf_channel *ch, uint32_t id) {
    uint8_t buf[8 + sizeof l->found];
    size_t n = l->n * sizeof l->found[0];
    memcpy(buf, &l->others, 8);
    memcpy(buf + 8, l->found, n);
    l->n = 0;
    l->others = 0;
    return rf_channel_send(ch, RF_LISTENER, id, buf, 8 + n);
}

int rf_listen_take(struct rf_listen *l, int socket, struct rf_error *e) {
    RF_CONTROL(1) control;
    struct rf_header h;
    struct iovec iov = {.iov_base = &h, .iov_len = sizeof h};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    if (recvmsg(socket, &msg, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) <= 0) return rf_fail(e, "seccomp", "recvmsg", "listener");
    int fds[RF_FDS_MAX];
    unsigned nfds = 0;
    if (rf_fds_take(&msg, fds, &nfds) < 0 || nfds != 1) return rf_fail_errno(e, EPROTO, "seccomp", "recvmsg", "no listener");
    if (l->fd >= 0) close(l->fd);
    l->fd = fds[0];
    return 0;
}
