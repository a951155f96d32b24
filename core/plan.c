/* Reads the payloads that tell what to do. They come from Python, which is trusted, and are checked as if they didn't. */
#include "rf.h"

#include <linux/sched.h>
#include <stdio.h>
#include <unistd.h>

/* What LAUNCH may ask of clone3. Another flag, CLONE_VM above all, would let init run in the launcher's own memory. */
#define NAMESPACES \
    (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_NEWTIME)

static int malformed(struct rf_error *e, const char *what, const char *detail) {
    return rf_fail_errno(e, EPROTO, "protocol", what, detail);
}

/* Whether a tag (at most 63) was met before. */
static bool again(uint64_t *seen, uint16_t tag) {
    bool before = *seen & 1ull << tag;
    *seen |= 1ull << tag;
    return before;
}

/* An index into the frame's descriptors. */
static int attr_fd(const struct rf_attr *a, const int *fds, unsigned nfds, int *fd) {
    uint32_t i;
    if (rf_attr_u32(a, &i) < 0 || i >= nfds) return -1;
    *fd = fds[i];
    return 0;
}

int rf_mount_parse(const struct rf_attr *a, const int *fds, unsigned nfds, struct rf_mount *m) {
    if (a->length < 12) return -1;
    uint32_t fd;
    m->kind = a->data[0];
    memcpy(&m->flags, a->data + 2, 2);
    memcpy(&m->mode, a->data + 4, 4);
    memcpy(&fd, a->data + 8, 4);
    if (a->data[1] != 0 || m->kind < RF_DIR || m->kind > RF_DISK) return -1;
    if (m->flags & ~(RF_M_ATTRS | RF_M_RECURSIVE | RF_M_OPTIONAL | RF_M_INSIDE | RF_M_TOLD | RF_M_NOFOLLOW)) return -1;
    if (m->mode > 07777) return -1;
    if (fd == RF_NO_FD) m->fd = -1;
    else if (fd < nfds) m->fd = fds[fd];
    else return -1;
    const uint8_t *at = a->data + 12, *end = a->data + a->length;
    if (rf_take_string(&at, end, &m->source) < 0 || rf_take_string(&at, end, &m->fstype) < 0 ||
        rf_take_string(&at, end, &m->target) < 0 || rf_take_string(&at, end, &m->data) < 0 || at != end)
        return -1;
    return m->target[0] == '/' ? 0 : -1;
}

static int parse_rlimit(const struct rf_attr *a, struct rf_plan *p) {
    uint32_t zero;
    if (a->length != 24 || p->nrlimits == RF_RLIMITS_MAX) return -1;
    struct rf_rlimit *r = &p->rlimits[p->nrlimits++];
    memcpy(&r->resource, a->data, 4);
    memcpy(&zero, a->data + 4, 4);
    if (zero != 0) return -1;
    memcpy(&r->soft, a->data + 8, 8);
    memcpy(&r->hard, a->data + 16, 8);
    return 0;
}

static int parse_filter(const struct rf_attr *a, struct sock_fprog *program) {
    size_t n = a->length / sizeof(struct sock_filter);
    if (n == 0 || n > RF_BPF_MAX || a->length % sizeof(struct sock_filter)) return -1;
    program->len = (unsigned short)n;
    program->filter = (struct sock_filter *)(uintptr_t)a->data; /* the kernel copies it from any alignment */
    return 0;
}

static int parse_seccomp(const struct rf_attr *a, struct rf_plan *p) {
    if (a->length < 4) return -1;
    memcpy(&p->seccomp_flags, a->data, 4);
    if (p->seccomp_flags & ~(uint32_t)RF_S_ALL) return -1;
    const struct rf_attr rest = {.length = a->length - 4, .data = a->data + 4};
    return rest.length ? parse_filter(&rest, &p->answers) : 0;
}

static int parse_guest_limits(const struct rf_attr *a, struct rf_plan *p) {
    if (a->length != 24) return -1;
    p->has_guest_limits = true;
    memcpy(&p->guest_memory, a->data, 8);
    memcpy(&p->guest_pids, a->data + 8, 8);
    memcpy(&p->guest_cpu_ns, a->data + 16, 8);
    return 0;
}

/* The gateway's MAC, then address and gateway of IPv4, and of IPv6 where there is any. */
static int parse_card(const struct rf_attr *a, struct rf_plan *p) {
    struct rf_card *c = &p->card;
    const size_t v4 = sizeof c->mac + sizeof c->address + sizeof c->gateway, v6 = sizeof c->address6 + sizeof c->gateway6;
    if (a->length != v4 && a->length != v4 + v6) return -1;
    p->has_card = true;
    memcpy(c->mac, a->data, 6);
    memcpy(c->address, a->data + 6, 4);
    memcpy(c->gateway, a->data + 10, 4);
    c->ipv6 = a->length > v4;
    if (!c->ipv6) return 0;
    memcpy(c->address6, a->data + v4, 16);
    memcpy(c->gateway6, a->data + v4 + 16, 16);
    return 0;
}

/* An id to become or to kill. -1 is none: to setresuid(2) it means "as it is", which here is root. */
static int attr_id(const struct rf_attr *a, uint32_t *id) { return rf_attr_u32(a, id) < 0 || *id == UINT32_MAX ? -1 : 0; }

static int plan_attr(const struct rf_attr *a, const int *fds, unsigned nfds, struct rf_plan *p) {
    switch (a->tag) {
    case 1: return rf_attr_string(a, &p->hostname);
    case 2: p->loopback = true; return a->length ? -1 : 0;
    case 3: return p->nmounts == RF_MOUNTS_MAX ? -1 : rf_mount_parse(a, fds, nfds, &p->mounts[p->nmounts++]);
    case 4: p->has_ids = true; return attr_id(a, &p->uid);
    case 5: p->has_ids = true; return attr_id(a, &p->gid);
    case 6: return parse_filter(a, &p->filter);
    case 7: return parse_rlimit(a, p);
    case 8: return attr_fd(a, fds, nfds, &p->landlock_fd);
    case 9: return p->ncgroups == RF_CGROUPS_MAX ? -1 : attr_fd(a, fds, nfds, &p->cgroup_fds[p->ncgroups++]);
    case 10: return rf_attr_u64(a, &p->cpu_limit_ns);
    case 11: return attr_fd(a, fds, nfds, &p->cpu_fd);
    case 12: return rf_attr_u32(a, &p->flags) < 0 || (p->flags & ~(uint32_t)RF_P_ALL) ? -1 : 0;
    case 14: return rf_attr_string(a, &p->workdir);
    case 15: return rf_attr_u64(a, &p->capabilities);
    case 16: return rf_attr_u64(a, &p->realtime_ns);
    case 17: p->entropy = a->data; p->entropy_length = a->length; return a->length > 512 ? -1 : 0;
    case 18: return parse_guest_limits(a, p);
    case 19: return parse_seccomp(a, p);
    case 20: return rf_attr_u64(a, &p->realtime_at_ns);
    case 22: return attr_fd(a, fds, nfds, &p->tun_fd);
    case 23: return attr_fd(a, fds, nfds, &p->sockets_fd);
    case 24: return parse_card(a, p);
    case 27: p->give_back = true; return a->length ? -1 : 0;
    default: return -1;
    }
}

/* Tags that may come more than once: mount, rlimit, cgroup. */
static bool repeats(uint16_t tag) { return tag == 3 || tag == 7 || tag == 9; }

int rf_plan_parse(const uint8_t *payload, size_t n, const int *fds, unsigned nfds, struct rf_plan *p, struct rf_error *e) {
    memset(p, 0, sizeof *p);
    p->landlock_fd = p->cpu_fd = p->sockets_fd = p->tun_fd = -1;
    struct rf_reader r = {payload, payload + n};
    struct rf_attr a;
    uint64_t seen = 0;
    int got;
    while ((got = rf_attr_next(&r, &a)) > 0) {
        char tag[21];
        if (plan_attr(&a, fds, nfds, p) < 0 || (again(&seen, a.tag) && !repeats(a.tag))) return malformed(e, "plan attribute", rf_decimal(tag, a.tag));
    }
    if (got < 0) return malformed(e, "plan", "an attribute passes the end");
    /* Without a filter there is nothing that could tell, or have flags. */
    if (p->filter.len == 0 && (p->seccomp_flags & ~(uint32_t)RF_S_FOREIGN)) return malformed(e, "plan", "seccomp flags without a filter");
    if (!(seen & 1ull << 4) != !(seen & 1ull << 5)) return malformed(e, "plan", "a uid without a gid, or the other way");
    return 0;
}

/* A run of NUL-terminated strings into a NULL-terminated vector. */
static int split(const struct rf_attr *a, char **v) {
    const uint8_t *at = a->data, *end = a->data + a->length;
    unsigned n = 0;
    while (at < end) {
        const char *s;
        if (n == RF_ARGS_MAX || rf_take_string(&at, end, &s) < 0) return -1;
        v[n++] = (char *)(uintptr_t)s; /* execve doesn't write to them */
    }
    v[n] = NULL;
    return (int)n;
}

int rf_exec_parse(const uint8_t *payload, size_t n, struct rf_exec *x, struct rf_error *e) {
    x->argv[0] = x->envp[0] = NULL;
    x->cwd = "/";
    x->flags = 0;
    x->program = -1;
    struct rf_reader r = {payload, payload + n};
    struct rf_attr a;
    uint64_t seen = 0;
    int got;
    while ((got = rf_attr_next(&r, &a)) > 0) {
        int ok;
        switch (a.tag) {
        case 1: ok = split(&a, x->argv) > 0 ? 0 : -1; break;
        case 2: ok = split(&a, x->envp) >= 0 ? 0 : -1; break;
        case 3: ok = rf_attr_string(&a, &x->cwd); break;
        case 4: ok = rf_attr_u32(&a, &x->flags) < 0 || (x->flags & ~(uint32_t)RF_X_ALL) ? -1 : 0; break;
        default: ok = -1;
        }
        char tag[21];
        if (ok < 0 || again(&seen, a.tag)) return malformed(e, "exec attribute", rf_decimal(tag, a.tag));
    }
    if (got < 0 || !x->argv[0]) return malformed(e, "exec", "no argv, or an attribute passes the end");
    return 0;
}

/* A namespace to enter: exactly one type, once, and not the mounts, which are always a sandbox's own. Descriptor 0 is where
 * the answer goes. */
static int parse_join(const struct rf_attr *a, const int *fds, unsigned nfds, struct rf_launch *l) {
    uint32_t index;
    struct rf_join j;
    if (a->length != 12 || l->njoins == RF_JOINS_MAX) return -1;
    memcpy(&j.flag, a->data, 8);
    memcpy(&index, a->data + 8, 4);
    if (index == 0 || index >= nfds || !(j.flag & NAMESPACES) || (j.flag & (j.flag - 1)) || j.flag == CLONE_NEWNS) return -1;
    for (unsigned i = 0; i < l->njoins; i++)
        if (l->joins[i].flag == j.flag) return -1;
    j.fd = fds[index];
    l->joins_user |= j.flag == CLONE_NEWUSER;
    l->joins[l->njoins++] = j;
    return 0;
}

static int parse_offsets(const struct rf_attr *a, struct rf_launch *l) {
    if (a->length != 16) return -1;
    l->has_offsets = true;
    memcpy(&l->monotonic_ns, a->data, 8);
    memcpy(&l->boottime_ns, a->data + 8, 8);
    return 0;
}

/* What a uid to kill by must be: a sandbox's. Never root, nor an account: all that such a uid runs would be killed. */
static int check_kill_uid(const struct rf_ids *ids, struct rf_launch *l, struct rf_error *e) {
    if (!l->has_kill_uid) return 0;
    uint32_t at = l->kill_uid - ids->first; /* wraps far beyond count for a smaller one */
    uint32_t inside = at % RF_SLOT_IDS;
    if (l->kill_uid < ids->first || at >= ids->count || inside == RF_KILLER_INIT || inside == RF_KILLER_LAUNCHER)
        return malformed(e, "launch", "not a sandbox's own uid");
    l->slot_base = l->kill_uid - inside;
    if (!l->uid_map) return 0;
    /* Init kills by the ids inside. They are these only where 0 is the slot's first. */
    char begin[32];
    int n = snprintf(begin, sizeof begin, "0 %u ", l->slot_base);
    return strncmp(l->uid_map, begin, (size_t)n) == 0 ? 0 : malformed(e, "launch", "an id map that is not the uid's slot");
}

int rf_launch_parse(const uint8_t *payload, size_t n, const int *fds, unsigned nfds, const struct rf_ids *ids, struct rf_launch *l,
                    struct rf_error *e) {
    memset(l, 0, sizeof *l);
    struct rf_reader r = {payload, payload + n};
    struct rf_attr a;
    uint64_t seen = 0;
    int got;
    while ((got = rf_attr_next(&r, &a)) > 0) {
        int ok;
        switch (a.tag) {
        case 1: ok = rf_attr_u64(&a, &l->clone_flags) < 0 || (l->clone_flags & ~(uint64_t)NAMESPACES) ? -1 : 0; break;
        case 2: ok = rf_attr_string(&a, &l->uid_map); break;
        case 3: ok = rf_attr_string(&a, &l->gid_map); break;
        case 5: ok = attr_id(&a, &l->kill_uid); l->has_kill_uid = true; break;
        case 6: ok = a.length ? -1 : 0; l->host_mounts = true; break;
        case 7: ok = parse_join(&a, fds, nfds, l); break;
        case 8: ok = parse_offsets(&a, l); break;
        case 9: ok = a.length ? -1 : 0; l->own_network = true; break;
        case 10: ok = a.length ? -1 : 0; l->later = true; break;
        default: ok = -1;
        }
        char tag[21];
        if (ok < 0 || (again(&seen, a.tag) && a.tag != 7)) return malformed(e, "launch attribute", rf_decimal(tag, a.tag));
    }
    if (got < 0) return malformed(e, "launch", "an attribute passes the end");
    if (!l->uid_map != !l->gid_map) return malformed(e, "launch", "one id map without the other");
    for (unsigned i = 0; i < l->njoins; i++)
        if (l->clone_flags & l->joins[i].flag) return malformed(e, "launch", "a namespace that is both new and joined");
    if (l->joins_user && l->uid_map) return malformed(e, "launch", "id maps for a user namespace that has its own");
    if (l->has_offsets && !(l->clone_flags & CLONE_NEWTIME)) return malformed(e, "launch", "clocks without a time namespace");
    return check_kill_uid(ids, l, e);
}
