/* The process of a command that isn't known yet. It is restricted as the plan says and then waits to be told what to
 * execute, so that of a start only exec is left. It runs our own code all the while, under every restriction of the
 * command's, and keeps nothing of init's but a socket. */
#include "rf.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* What it says: first how its restrictions went, later, should it come to that, why it couldn't execute. */
struct said {
    bool failed;
    struct rf_error error;
    struct rf_readback readback;
};

static void tell(int socket, const struct said *s) {
    if (send(socket, s, sizeof *s, MSG_NOSIGNAL) < 0) _exit(127); /* init is gone */
}

/* One message with its descriptors; how many bytes, or -1. */
static ssize_t listen_to(int socket, uint8_t *buf, size_t capacity, int *fds, unsigned *nfds) {
    RF_CONTROL(RF_FDS_MAX) control;
    struct iovec iov = {.iov_base = buf, .iov_len = capacity};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t n;
    do n = recvmsg(socket, &msg, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    *nfds = 0;
    if (n <= 0 || rf_fds_take(&msg, fds, nfds) < 0 || (msg.msg_flags & MSG_TRUNC)) return -1;
    return n;
}

static _Noreturn void wait_for_command(const struct rf_plan *p, int socket, uint8_t *buf, struct rf_exec *x) {
    struct said s = {0};
    int fds[RF_FDS_MAX];
    unsigned nfds;
    /* Above all that the command puts in its place. */
    socket = fcntl(socket, F_DUPFD_CLOEXEC, 2 * RF_FDS_MAX);
    if (socket < 0) _exit(127);
    s.failed = rf_restrict_ahead(p, &s.readback, &s.error) < 0;
    if (p->cpus) sched_setaffinity(0, sizeof *p->cpus, p->cpus);
    /* All but the socket: init's channel above all, at whose end Python must see that init is gone. */
    if (!s.failed && ((socket > 0 && syscall(SYS_close_range, 0, (unsigned)socket - 1, 0) < 0) || syscall(SYS_close_range, (unsigned)socket + 1, ~0U, 0) < 0))
        s.failed = true, rf_fail(&s.error, "descriptors", "close_range", "");
    tell(socket, &s);
    if (s.failed) _exit(127);
    ssize_t n = listen_to(socket, buf, RF_PREFORK_MAX, fds, &nfds);
    if (n <= 0) _exit(127);
    if (rf_exec_parse(buf, (size_t)n, x, &s.error) == 0 && rf_restrict_rest(p, x, fds, nfds, &s.error) == 0) rf_exec_path(x, &s.error);
    s.failed = true;
    tell(socket, &s);
    _exit(127);
}

void rf_prefork_make(struct rf_prefork *st, const struct rf_plan *p, uint8_t *buf, struct rf_exec *x) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) return;
    pid_t pid = fork();
    if (pid == 0) wait_for_command(p, pair[1], buf, x);
    close(pair[1]);
    if (pid < 0) close(pair[0]);
    else *st = (struct rf_prefork){.pid = pid, .socket = pair[0]};
}

void rf_prefork_gone(struct rf_prefork *st) {
    if (st->pid > 0) close(st->socket);
    st->pid = 0;
}

void rf_prefork_drop(struct rf_prefork *st) {
    if (st->pid <= 0) return;
    kill(st->pid, SIGKILL);
    waitpid(st->pid, NULL, 0);
    rf_prefork_gone(st);
}

static int hear(int socket, struct said *s) {
    ssize_t n;
    do n = recv(socket, s, sizeof *s, 0);
    while (n < 0 && errno == EINTR);
    return n == 0 ? 0 : n == (ssize_t)sizeof *s ? 1 : -1;
}

static int hand_over(int socket, const uint8_t *payload, size_t n, const int *fds, unsigned nfds) {
    RF_CONTROL(RF_FDS_MAX) control = {.bytes = {0}};
    struct iovec iov = {.iov_base = (void *)(uintptr_t)payload, .iov_len = n};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    rf_fds_attach(&msg, &control, fds, nfds);
    return sendmsg(socket, &msg, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

int rf_prefork_exec(struct rf_prefork *st, const uint8_t *payload, size_t n, const int *fds, unsigned nfds, pid_t *pid, struct rf_readback *rb,
                 struct rf_error *e) {
    struct said s;
    if (st->pid <= 0) return 0;
    /* It is taken only where it says that it is restricted: whatever else became of it, the command is started anew. */
    if (n > RF_PREFORK_MAX || hear(st->socket, &s) != 1 || s.failed) {
        rf_prefork_drop(st);
        return 0;
    }
    /* A hand-over to an idle CPU costs more than what is left to do there (launcher.c): to ours, as far as it goes. */
    int cpu = sched_getcpu();
    cpu_set_t one;
    CPU_ZERO(&one);
    if (cpu >= 0) CPU_SET((size_t)cpu, &one), sched_setaffinity(st->pid, sizeof one, &one);
    *rb = s.readback;
    rb->clock_ns = rf_monotonic_ns();
    if (hand_over(st->socket, payload, n, fds, nfds) < 0) {
        rf_prefork_drop(st);
        return 0;
    }
    int heard = hear(st->socket, &s); /* nothing, at the end of the socket: exec has closed it */
    if (heard < 0 && errno == ECONNRESET) {
        rf_prefork_drop(st); /* killed, and what we sent unread: it has executed nothing */
        return 0;
    }
    *pid = st->pid;
    rf_prefork_gone(st);
    if (heard == 0) return 1;
    waitpid(*pid, NULL, 0);
    if (heard < 0) return rf_fail_errno(e, EPROTO, "start", "recv", "");
    *e = s.error;
    return -1;
}
