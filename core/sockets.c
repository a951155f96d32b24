/* Sockets of a sandbox's network namespace, made on request for the gateway outside. A socket stays in the network
 * namespace that it was made in, whoever holds it. */
#include "rf.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

struct request { uint32_t domain, type, protocol; };

static int answer(int fd, int passed) {
    int32_t err = passed < 0 ? errno : 0;
    RF_CONTROL(1) control = {.bytes = {0}};
    struct iovec iov = {.iov_base = &err, .iov_len = sizeof err};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (passed >= 0) rf_fds_attach(&msg, &control, &passed, 1);
    /* Without waiting: a gateway that doesn't read its answers gets none, and doesn't hold us up. */
    return sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -1 : 0;
}

int rf_sockets_serve(int fd, int *tap) {
    struct request r;
    ssize_t n = recv(fd, &r, sizeof r, MSG_DONTWAIT | MSG_TRUNC);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    if (n != (ssize_t)sizeof r) return 0;
    int made;
    if (r.domain == AF_UNSPEC && *tap >= 0) made = *tap, *tap = -1;
    else made = socket((int)r.domain, (int)r.type | SOCK_CLOEXEC, (int)r.protocol);
    int sent = answer(fd, made);
    if (made >= 0) close(made);
    return sent == 0;
}

void rf_sockets_any_port(void) {
    /* Ports below 1024 are for root to keep others from posing as the host's services, which are elsewhere. Where /proc/sys
     * can't be written a workload that wants one is told so by bind(2). */
    int fd = open("/proc/sys/net/ipv4/ip_unprivileged_port_start", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    ssize_t ignored = write(fd, "0", 1);
    (void)ignored;
    close(fd);
}
