/* A guest's network card: the tap behind it, in the network namespace of the VMM's jail, and its end in the guest. */
#include "rf.h"

#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/neighbour.h>
#include <linux/rtnetlink.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int fail(struct rf_error *e, const char *call, const char *detail) { return rf_fail(e, "network card", call, detail); }

int rf_tap_make(int dir, struct rf_error *e) {
    /* A tap is made in the network namespace of who opens the node, so nobody else can do it for us. */
    int fd = openat(dir, "tun", O_RDWR | O_CLOEXEC);
    if (fd < 0) return fail(e, "openat", "/dev/net/tun");
    /* Frames as they are: no header of the kernel's own, by which it would be told to cut them up or to sum them. */
    struct ifreq request = {.ifr_name = RF_TAP, .ifr_flags = IFF_TAP | IFF_NO_PI};
    if (ioctl(fd, TUNSETIFF, &request) == 0) return fd;
    fail(e, "ioctl", "TUNSETIFF");
    close(fd);
    return -1;
}

/* ---- the guest's end ---- */

struct message {
    struct nlmsghdr header;
    uint8_t body[256];
};

static void begin(struct message *m, uint16_t type, uint16_t flags, const void *body, size_t n) {
    memset(m, 0, sizeof *m);
    m->header = (struct nlmsghdr){.nlmsg_len = (uint32_t)NLMSG_LENGTH(n), .nlmsg_type = type, .nlmsg_flags = (uint16_t)(flags | NLM_F_REQUEST | NLM_F_ACK)};
    memcpy(m->body, body, n);
}

static void add(struct message *m, uint16_t kind, const void *data, size_t n) {
    struct rtattr a = {.rta_len = (uint16_t)RTA_LENGTH(n), .rta_type = kind};
    uint8_t *at = (uint8_t *)m + NLMSG_ALIGN(m->header.nlmsg_len);
    memcpy(at, &a, sizeof a);
    memcpy(at + RTA_LENGTH(0), data, n);
    m->header.nlmsg_len = (uint32_t)(NLMSG_ALIGN(m->header.nlmsg_len) + RTA_ALIGN(a.rta_len));
}

static int exchange(int fd, struct message *m, const char *what, struct rf_error *e) {
    struct { struct nlmsghdr header; struct nlmsgerr error; uint8_t rest[512]; } answer;
    if (send(fd, m, m->header.nlmsg_len, 0) < 0) return fail(e, "send", what);
    ssize_t n = recv(fd, &answer, sizeof answer, 0);
    if (n < 0) return fail(e, "recv", what);
    if ((size_t)n < sizeof answer.header + sizeof answer.error.error || answer.header.nlmsg_type != NLMSG_ERROR) return rf_fail_errno(e, EPROTO, "network card", "recv", what);
    return answer.error.error ? rf_fail_errno(e, -answer.error.error, "network card", "netlink", what) : 0;
}

static int link_up(int fd, int index, struct rf_error *e) {
    const struct ifinfomsg link = {.ifi_index = index, .ifi_flags = IFF_UP, .ifi_change = IFF_UP};
    struct message m;
    begin(&m, RTM_NEWLINK, 0, &link, sizeof link);
    return exchange(fd, &m, "RTM_NEWLINK", e);
}

/* One family: the address, the way to everything else, and who is there, which nobody has to be asked then. */
static int configure(int fd, int index, int family, const uint8_t *address, const uint8_t *gateway, const uint8_t *mac, struct rf_error *e) {
    const size_t size = family == AF_INET ? 4 : 16;
    struct message m;
    const struct ifaddrmsg own = {.ifa_family = (uint8_t)family, .ifa_prefixlen = (uint8_t)(size * 8), .ifa_flags = IFA_F_NODAD, .ifa_index = (uint32_t)index};
    begin(&m, RTM_NEWADDR, NLM_F_CREATE, &own, sizeof own);
    add(&m, IFA_LOCAL, address, size);
    add(&m, IFA_ADDRESS, address, size);
    if (exchange(fd, &m, "RTM_NEWADDR", e) < 0) return -1;
    const struct ndmsg neighbour = {.ndm_family = (uint8_t)family, .ndm_ifindex = index, .ndm_state = NUD_PERMANENT};
    begin(&m, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &neighbour, sizeof neighbour);
    add(&m, NDA_DST, gateway, size);
    add(&m, NDA_LLADDR, mac, 6);
    if (exchange(fd, &m, "RTM_NEWNEIGH", e) < 0) return -1;
    const struct rtmsg route = {.rtm_family = (uint8_t)family, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC, .rtm_type = RTN_UNICAST, .rtm_flags = RTNH_F_ONLINK};
    begin(&m, RTM_NEWROUTE, NLM_F_CREATE, &route, sizeof route);
    add(&m, RTA_OIF, &index, sizeof index);
    add(&m, RTA_GATEWAY, gateway, size);
    return exchange(fd, &m, "RTM_NEWROUTE", e);
}

int rf_card_up(const struct rf_card *c, struct rf_error *e) {
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0) return fail(e, "socket", "AF_NETLINK");
    struct ifreq request = {.ifr_name = "eth0"};
    int r = ioctl(fd, SIOCGIFINDEX, &request) < 0 ? fail(e, "ioctl", "SIOCGIFINDEX eth0") : 0;
    int index = request.ifr_ifindex;
    if (r == 0) r = link_up(fd, index, e);
    if (r == 0) r = configure(fd, index, AF_INET, c->address, c->gateway, c->mac, e);
    if (r == 0 && c->ipv6) {
        r = configure(fd, index, AF_INET6, c->address6, c->gateway6, c->mac, e);
        if (r < 0 && (e->err == EOPNOTSUPP || e->err == EAFNOSUPPORT)) r = 0; /* a kernel without IPv6 has none */
    }
    close(fd);
    return r;
}
