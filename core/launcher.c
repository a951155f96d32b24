/* The launcher: one small process beside each Python process. It takes plans, starts sandboxes in a mount namespace
 * of its own (so that a start doesn't depend on the host's mount table), and cleans up when Python is gone. */
#include "rf.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SANDBOXES_MAX 8192
#define OWNED_MAX 64
#define LATER_MAX 8
/* So many at a time: what a sandbox leaves must not keep us from the others. */
#define REAPED_AT_ONCE 64

struct sandbox { pid_t pid; bool has_uid; uint32_t uid, killer; };
struct later { int control; uint32_t id; size_t length; uint8_t payload[512]; };
enum owned_kind { OWNED_TREE = 1, OWNED_CGROUP = 2, OWNED_HELD = 3, OWNED_LEAF = 4 };
struct owned { enum owned_kind kind; int parent; char name[256]; };

struct launcher {
    int socket, signals, proc, host_mounts, host_root, host_network, own_namespace, own_root;
    int next_network; /* a network namespace in which nothing has run yet, or -1 */
    bool own_mounts, launched, wants_network, unreaped; /* unreaped: there may be more zombies */
    struct rf_ids ids; /* what sandboxes are run as */
    struct rf_maps maps;
    struct sandbox live[SANDBOXES_MAX];
    unsigned nlive;
    struct owned owned[OWNED_MAX];
    unsigned nowned;
    struct later later[LATER_MAX]; /* launches that wait for a quiet moment, oldest first */
    unsigned nlater;
    uint8_t packet[sizeof(struct rf_header) + RF_PACKET_MAX];
};

/* ---- the mount namespace ---- */

/* As root: a namespace that holds nothing but /proc and the trees that TEMPLATE makes. Copying it for each sandbox
 * costs the same on a host with ten mounts and on one with ten thousand. */
static int own_mount_namespace(struct launcher *s, struct rf_error *e) {
    static const struct rf_mount steps[] = {
        {.kind = RF_DIR, .mode = 0555, .fd = -1, .source = "", .fstype = "", .target = "/proc", .data = ""},
        {.kind = RF_DIR, .mode = 0755, .fd = -1, .source = "", .fstype = "", .target = "/t", .data = ""},
        {.kind = RF_DIR, .mode = 0755, .fd = -1, .source = "", .fstype = "", .target = "/new", .data = ""},
        {.kind = RF_FS, .flags = RF_M_NOSUID | RF_M_NODEV | RF_M_NOEXEC, .fd = -1, .source = "proc", .fstype = "proc", .target = "/proc", .data = ""},
    };
    s->host_mounts = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    s->host_root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    s->host_network = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (s->host_mounts < 0 || s->host_root < 0 || s->host_network < 0) return rf_fail(e, "launcher", "open", "the host's namespaces");
    if (unshare(CLONE_NEWNS) < 0) return rf_fail(e, "launcher", "unshare", "CLONE_NEWNS");
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0) return rf_fail(e, "launcher", "mount", "MS_PRIVATE");
    int root = rf_tree_build(steps, RF_LEN(steps), "/proc", "mode=0755", NULL, e);
    if (root < 0 || rf_tree_enter(root, e) < 0) return -1;
    close(root);
    s->own_namespace = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    s->own_root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (s->own_namespace < 0 || s->own_root < 0) return rf_fail(e, "launcher", "open", "its own mount namespace");
    s->own_mounts = true;
    return 0;
}

static int enter_host_mounts(const struct launcher *s, struct rf_error *e) {
    if (!s->own_mounts) return 0;
    if (setns(s->host_mounts, CLONE_NEWNS) < 0) return rf_fail(e, "launch", "setns", "the host's mount namespace");
    if (fchdir(s->host_root) < 0 || chroot(".") < 0) return rf_fail(e, "launch", "chroot", "the caller's root");
    return 0;
}

static void back_to_own_mounts(const struct launcher *s) {
    /* What is started from the host's would have all of its mounts: end everything instead. */
    if (setns(s->own_namespace, CLONE_NEWNS) < 0 || fchdir(s->own_root) < 0 || chroot(".") < 0) _exit(1);
}

/* ---- network namespaces ---- */

static void back_to_host_network(const struct launcher *s) {
    /* What is started from the wrong namespace would have the wrong network: end everything instead. */
    if (setns(s->host_network, CLONE_NEWNET) < 0) _exit(1);
}

/* Making one is the dearest step of a launch, so the next sandbox's is made before it is asked for. Nobody has been in
 * it, and it belongs to the host's user namespace: not even root inside can change it. */
static void prepare_network(struct launcher *s) {
    struct rf_error ignored; /* without one in stock, clone3 makes it */
    s->wants_network = false;
    if (!s->own_mounts || s->next_network >= 0) return;
    if (unshare(CLONE_NEWNET) < 0) return;
    if (rf_loopback_up(&ignored) == 0) s->next_network = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    back_to_host_network(s);
}

/* Never two sandboxes in one: it is given up whatever became of the clone. */
static void use_up_network(struct launcher *s) {
    close(s->next_network);
    s->next_network = -1;
}

/* Init by way of a process that goes ahead, into namespaces that exist already. */
static pid_t clone_elsewhere(struct launcher *s, struct rf_launch *l, struct rf_error *e) {
    struct rf_launch changed = *l;
    bool stock = (l->clone_flags & CLONE_NEWNET) && !l->own_network && s->next_network >= 0;
    if (stock) {
        static_assert(RF_JOINS_MAX >= 8, "there is room for one more: mounts are never joined");
        changed.joins[changed.njoins++] = (struct rf_join){.flag = CLONE_NEWNET, .fd = s->next_network};
        changed.clone_flags &= ~(uint64_t)CLONE_NEWNET;
        l->network_ready = true;
    }
    pid_t pid = rf_clone_elsewhere(s->proc, &changed, e);
    if (pid != 0 && stock) use_up_network(s);
    return pid;
}

/* clone3, with the network namespace that is in stock where there is one. */
static pid_t clone_sandbox(struct launcher *s, struct rf_launch *l, int *pidfd, struct rf_error *e) {
    if (l->njoins || l->has_offsets) return clone_elsewhere(s, l, e);
    uint64_t flags = l->clone_flags;
    int network = (flags & CLONE_NEWNET) && !l->own_network ? s->next_network : -1;
    if (network >= 0) {
        if (setns(network, CLONE_NEWNET) < 0) return rf_fail(e, "launch", "setns", "the next network namespace");
        flags &= ~(uint64_t)CLONE_NEWNET;
        l->network_ready = true;
    }
    pid_t pid = rf_clone(flags, pidfd);
    if (pid < 0) rf_fail(e, "launch", "clone3", "");
    if (pid != 0 && network >= 0) {
        use_up_network(s);
        back_to_host_network(s);
    }
    return pid;
}

/* ---- LAUNCH ---- */

/* From clone3 to init's loop, in the child. */
static int become_init(const struct launcher *s, const struct rf_launch *l, int control, int go, struct rf_error *e) {
    if (l->host_mounts && enter_host_mounts(s, e) < 0) return -1;
    /* With id maps to come init does so once it has them: until then /proc/PID/uid_map must be its user's to write. */
    if (go < 0 && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0) return rf_fail(e, "launch", "prctl", "PR_SET_DUMPABLE");
    if (rf_die_with_parent(l, e) < 0) return -1;
    /* 3 is the channel, 4 what tells that the id maps are written. Nothing else of the launcher's stays. */
    int high = go < 0 ? -1 : fcntl(go, F_DUPFD_CLOEXEC, 10);
    if (dup2(control, 3) < 0 || (high >= 0 && dup2(high, 4) < 0)) return rf_fail(e, "launch", "dup2", "");
    if (syscall(SYS_close_range, go < 0 ? 4 : 5, ~0U, 0) < 0) return rf_fail(e, "launch", "close_range", "");
    return 0;
}

/* A launch is a relay: launcher, init, command, one after the other. Spread over idle CPUs each hand-over would be a
 * wake-up from idle, which costs more than the step that it starts. `before`: the CPUs that we may use; the command gets
 * them back before it is executed, and init once it has started it. */
static void stay_on_this_cpu(cpu_set_t *before) {
    int cpu = sched_getcpu();
    if (sched_getaffinity(0, sizeof *before, before) < 0) CPU_ZERO(before);
    if (cpu < 0 || CPU_COUNT(before) < 2) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((size_t)cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
}

/* Whether a launch for later was put off: while a sandbox lives, its start or its end is what matters. */
static bool put_off(struct launcher *s, const struct rf_frame *f) {
    if (s->nlive == 0 || s->nlater == LATER_MAX || f->nfds != 1 || f->length > sizeof s->later[0].payload) return false;
    struct later *later = &s->later[s->nlater];
    later->control = fcntl(f->fds[0], F_DUPFD_CLOEXEC, 0);
    if (later->control < 0) return false;
    later->id = f->id;
    later->length = f->length;
    memcpy(later->payload, f->payload, f->length);
    s->nlater++;
    return true;
}

static int launch(struct launcher *s, const struct rf_frame *f, struct rf_error *e) {
    struct rf_launch l;
    if (rf_launch_parse(f->payload, f->length, f->fds, f->nfds, &s->ids, &l, e) < 0) return -1;
    if (l.later && put_off(s, f)) return 0;
    if (s->nlive == SANDBOXES_MAX) return rf_fail_errno(e, EAGAIN, "launch", "sandboxes", "too many at once");
    int go[2] = {-1, -1}, pidfd = -1;
    if (l.uid_map && pipe2(go, O_CLOEXEC) < 0) return rf_fail(e, "launch", "pipe2", "");
    int control = f->fds[0];
    stay_on_this_cpu(&l.cpus);
    pid_t pid = clone_sandbox(s, &l, &pidfd, e);
    if (pid != 0) sched_setaffinity(0, sizeof l.cpus, &l.cpus);
    if (pid == 0) {
        if (become_init(s, &l, control, go[0], e) == 0)
            _exit(rf_init_main(3, (l.clone_flags & CLONE_NEWPID) ? RF_IN_CONTAINER : RF_IN_PROCESS, &l, go[0] < 0 ? -1 : 4));
        rf_send_error(control, 0, e);
        _exit(1);
    }
    int r = pid < 0 ? -1 : 0;
    if (r == 0) s->live[s->nlive++] = (struct sandbox){.pid = pid, .has_uid = l.has_kill_uid, .uid = l.kill_uid, .killer = l.slot_base + RF_KILLER_LAUNCHER};
    if (r == 0) r = rf_write_maps(s->proc, pid, &l, s->own_mounts, e);
    if (r == 0 && rf_remember_maps(&l, s->own_mounts, &s->maps) < 0) r = rf_fail_errno(e, E2BIG, "user namespace", "maps", "too many ranges");
    if (r == 0 && go[1] >= 0 && write(go[1], "1", 1) != 1) r = rf_fail(e, "launch", "write", "go");
    if (go[0] >= 0) close(go[0]), close(go[1]); /* without its byte the child ends by itself */
    if (pidfd >= 0) close(pidfd);
    /* Not after the first one: a caller that starts a single sandbox ends with it. */
    s->wants_network |= r == 0 && s->launched && (l.clone_flags & CLONE_NEWNET) && !l.own_network;
    s->launched = true;
    return r;
}

/* What was put off, now that it is in nobody's way. */
static void launch_later(struct launcher *s) {
    unsigned n = s->nlater;
    s->nlater = LATER_MAX; /* full: none of them is put off again */
    for (unsigned i = 0; i < n; i++) {
        struct later *later = &s->later[i];
        struct rf_frame f = {.type = RF_LAUNCH, .id = later->id, .payload = later->payload, .length = later->length, .fds = &later->control, .nfds = 1};
        struct rf_error e = {0};
        if (launch(s, &f, &e) < 0) rf_send_error(later->control, 0, &e);
        close(later->control);
    }
    s->nlater = 0;
}

/* ---- TEMPLATE, USERNS, OWN ---- */

/* What its steps name by path is the caller's, where our own namespace has nothing of it. */
static int clone_sources(const struct launcher *s, struct rf_mount *steps, unsigned n, struct rf_error *e) {
    int r = enter_host_mounts(s, e);
    for (unsigned i = 0; r == 0 && i < n; i++) {
        struct rf_mount *m = &steps[i];
        if (m->kind != RF_BIND || m->fd >= 0 || !m->source[0] || (m->flags & RF_M_INSIDE)) continue;
        m->fd = rf_mount_clone(AT_FDCWD, m->source, m->flags);
        if (m->fd < 0) r = rf_fail(e, "template", "open_tree", m->source);
    }
    back_to_own_mounts(s);
    return r;
}

static int template(struct launcher *s, const struct rf_frame *f, struct rf_error *e) {
    struct rf_mount steps[RF_MOUNTS_MAX];
    unsigned n = 0;
    const char *name = NULL;
    struct rf_reader r = {f->payload, f->payload + f->length};
    struct rf_attr a;
    int got;
    while ((got = rf_attr_next(&r, &a)) > 0) {
        int ok = a.tag == 9 ? rf_attr_string(&a, &name) : a.tag == 3 && n < RF_LEN(steps) ? rf_mount_parse(&a, f->fds, f->nfds, &steps[n++]) : -1;
        if (ok < 0) return rf_fail_errno(e, EPROTO, "protocol", "template", "malformed");
    }
    if (got < 0 || !name || !name[0] || strchr(name, '/') || name[0] == '.') return rf_fail_errno(e, EPROTO, "protocol", "template", "no name");
    if (!s->own_mounts) return rf_fail_errno(e, EPERM, "template", "mount namespace", "the launcher has none of its own");
    char at[300];
    snprintf(at, sizeof at, "/t/%s", name);
    if (mkdir(at, 0755) < 0 && errno != EEXIST) return rf_fail(e, "template", "mkdir", at);
    int root = clone_sources(s, steps, n, e) < 0 ? -1 : rf_tree_build(steps, n, at, "mode=0755", NULL, e);
    if (root >= 0) {
        close(root);
        return 0;
    }
    /* Which of them it has given up before, nobody tells; nothing was opened since that would have their numbers. */
    for (unsigned i = 0; i < n; i++)
        if (steps[i].fd >= 0) close(steps[i].fd);
    return -1;
}

/* A user namespace lives as long as somebody holds it: a child makes it, we open it, the child goes. */
static int user_namespace(struct launcher *s, const struct rf_frame *f, int *result, struct rf_error *e) {
    struct rf_launch l;
    if (rf_launch_parse(f->payload, f->length, f->fds, f->nfds, &s->ids, &l, e) < 0) return -1;
    int pidfd = -1;
    pid_t pid = rf_clone(CLONE_NEWUSER, &pidfd);
    if (pid < 0) return rf_fail(e, "user namespace", "clone3", "");
    if (pid == 0) {
        /* Not to be left behind with our socket, should we be killed just now. */
        if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0) _exit(1);
        for (;;) pause();
    }
    int r = rf_write_maps(s->proc, pid, &l, s->own_mounts, e);
    if (r == 0) {
        char path[64];
        snprintf(path, sizeof path, "%d/ns/user", pid);
        *result = openat(s->proc, path, O_RDONLY | O_CLOEXEC);
        if (*result < 0) r = rf_fail(e, "user namespace", "open", path);
    }
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(pidfd);
    return r;
}

static int own(struct launcher *s, struct rf_frame *f, struct rf_error *e) {
    struct rf_reader r = {f->payload, f->payload + f->length};
    struct rf_attr a;
    uint32_t kind = 0;
    const char *name = NULL;
    int got;
    while ((got = rf_attr_next(&r, &a)) > 0)
        if ((a.tag == 1 ? rf_attr_u32(&a, &kind) : a.tag == 2 ? rf_attr_string(&a, &name) : -1) < 0) break;
    if (got != 0 || f->nfds != 2 || kind < OWNED_TREE || kind > OWNED_LEAF || !name || !name[0] || strchr(name, '/') || strcmp(name, ".") == 0 ||
        strcmp(name, "..") == 0 || strlen(name) >= sizeof s->owned[0].name)
        return rf_fail_errno(e, EPROTO, "protocol", "own", "malformed");
    if (s->nowned == OWNED_MAX) return rf_fail_errno(e, EAGAIN, "own", "owned", "too many");
    struct owned *o = &s->owned[s->nowned];
    o->parent = fcntl(f->fds[1], F_DUPFD_CLOEXEC, 0);
    if (o->parent < 0) return rf_fail(e, "own", "fcntl", "");
    o->kind = (enum owned_kind)kind;
    strcpy(o->name, name);
    s->nowned++;
    return 0;
}

/* ---- ends ---- */

static void reap(struct launcher *s) {
    int status, left = REAPED_AT_ONCE;
    bool orphans = false;
    for (pid_t pid; left > 0 && (pid = waitpid(-1, &status, WNOHANG)) > 0; left--) {
        for (unsigned i = 0; i < s->nlive; i++) {
            if (s->live[i].pid != pid) continue;
            struct rf_error ignored;
            /* An init that ended by itself left nothing; one that was killed from outside may have. */
            bool clean = WIFEXITED(status) && WEXITSTATUS(status) == 0;
            if (!clean && s->live[i].has_uid) rf_kill_uid(s->live[i].uid, s->live[i].killer, &ignored);
            orphans |= !clean && !s->live[i].has_uid;
            s->live[i] = s->live[--s->nlive];
            break;
        }
    }
    s->unreaped = left == 0;
    if (!orphans) return;
    /* We are the next subreaper, so what such an init left behind are our children now. The other sandboxes' are not. */
    static_assert(offsetof(struct sandbox, pid) == 0, "an array of sandboxes is read as one of pids");
    rf_kill_descendants(&s->live[0].pid, sizeof s->live[0], s->nlive);
}

static void end_all(struct launcher *s) {
    struct rf_error ignored;
    for (unsigned i = 0; i < s->nowned; i++)
        if (s->owned[i].kind == OWNED_CGROUP) rf_thaw_cgroups(s->owned[i].parent, s->owned[i].name);
    for (unsigned i = 0; i < s->nlive; i++) {
        kill(s->live[i].pid, SIGKILL);
        if (s->live[i].has_uid) rf_kill_uid(s->live[i].uid, s->live[i].killer, &ignored);
    }
    /* A process sandbox's descendants come to us once their init is dead: we are the next subreaper. */
    for (;;) {
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid < 0 && errno == ECHILD) break;
        if (pid > 0) continue;
        rf_kill_descendants(NULL, 0, 0);
        struct timespec pause = {.tv_nsec = 200000};
        nanosleep(&pause, NULL);
    }
    for (unsigned i = 0; i < s->nowned; i++) {
        struct owned *o = &s->owned[i];
        if (o->kind == OWNED_TREE) {
            rf_remove_mapped(s->proc, &s->maps, o->parent, o->name);
            rf_remove_tree(o->parent, o->name);
        }
        if (o->kind == OWNED_CGROUP) rf_remove_cgroup(o->parent, o->name);
    }
    for (unsigned i = 0; i < s->nowned; i++) {
        struct owned *o = &s->owned[i];
        if (o->kind == OWNED_LEAF) rf_remove_leaf(o->parent, o->name);
    }
}

/* ---- the loop ---- */

static void serve(struct launcher *s, struct rf_frame *f) {
    struct rf_error e = {0};
    int r, result = -1;
    switch (f->type) {
    case RF_LAUNCH: r = launch(s, f, &e); break;
    case RF_TEMPLATE: r = template(s, f, &e); break;
    case RF_USERNS: r = user_namespace(s, f, &result, &e); break;
    case RF_OWN: r = own(s, f, &e); break;
    case RF_SETTLE:
        do reap(s);
        while (s->unreaped);
        r = 0;
        break;
    default: r = rf_fail_errno(&e, EPROTO, "protocol", "request", "of no known type");
    }
    if (r < 0) rf_send_error(f->fds[0], 0, &e);
    else if (f->type != RF_LAUNCH) rf_send(f->fds[0], false, RF_DONE, 0, NULL, 0, result);
    if (result >= 0) close(result);
}

/* One packet. 0 at the end of the socket. */
static int receive(struct launcher *s) {
    RF_CONTROL(RF_FDS_MAX) control;
    struct iovec iov = {.iov_base = s->packet, .iov_len = sizeof s->packet};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t n = recvmsg(s->socket, &msg, MSG_CMSG_CLOEXEC);
    if (n < 0) return errno == EINTR || errno == EAGAIN ? 1 : 0;
    int fds[RF_FDS_MAX];
    unsigned nfds = 0;
    bool lost = rf_fds_take(&msg, fds, &nfds) < 0;
    struct rf_header h;
    struct rf_error e;
    if (n >= (ssize_t)sizeof h && !lost && !(msg.msg_flags & MSG_TRUNC) && nfds > 0) {
        memcpy(&h, s->packet, sizeof h);
        if (rf_header_check(&h, RF_PACKET_MAX, &e) == 0 && h.length == (size_t)n - sizeof h && h.nfds == nfds) {
            struct rf_frame f = {.type = h.type, .id = h.id, .payload = s->packet + sizeof h, .length = h.length, .fds = fds, .nfds = nfds};
            serve(s, &f);
        }
    }
    for (unsigned i = 0; i < nfds; i++) close(fds[i]); /* a malformed request is answered by the end of its socket */
    return n > 0;
}

/* By a raw call: libc keeps 32 and 33 to itself, and its posix_spawn starts us with both ignored. */
static void default_action(int number) {
    struct { void (*handler)(int); unsigned long flags; void (*restorer)(void); uint64_t mask; } action = {.handler = SIG_DFL};
    syscall(SYS_rt_sigaction, number, &action, NULL, sizeof action.mask);
}

/* None of us ever executes a program but to start a command, which gets capabilities, if any, by its ambient set. */
static void drop_bounding_set(void) {
    for (int c = 0; prctl(PR_CAPBSET_READ, c, 0, 0, 0) >= 0; c++) prctl(PR_CAPBSET_DROP, c, 0, 0, 0);
}

int rf_launcher_main(int socket_fd, const struct rf_ids *ids) {
    bool privileged = ids != NULL;
    struct launcher *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (s == MAP_FAILED) return 1;
    struct rf_error e = {0};
    s->socket = socket_fd;
    s->next_network = -1;
    if (ids) s->ids = *ids;
    fcntl(socket_fd, F_SETFD, FD_CLOEXEC);
    /* We were executed from a descriptor, whose number would be our name, and each init's. */
    prctl(PR_SET_NAME, "ringfence-core", 0, 0, 0);
    syscall(SYS_close_range, (unsigned)socket_fd + 1, ~0U, 0); /* whatever Python's extensions left inheritable */
    /* Python ignores SIGPIPE and SIGXFSZ, and an ignored signal stays ignored over exec: undone once, for all that is
     * started from here. */
    for (int number = 1; number < NSIG; number++) default_action(number);
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    umask(0);
    s->signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    if (s->signals < 0 || prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0) return 1;
    /* Not when unprivileged: the child inherits it, and then its id maps belong to root. It does so itself later. */
    if (privileged && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0) return 1;
    if (privileged && own_mount_namespace(s, &e) < 0) {
        /* Told to the first request: Python sees the end of its answer socket and reads this from ours. */
        rf_send_error(socket_fd, 0, &e);
        return 1;
    }
    if (privileged) drop_bounding_set();
    s->proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (s->proc < 0) return 1;
    prepare_network(s); /* while Python puts its first request together */
    for (;;) {
        struct pollfd wait[2] = {{.fd = s->socket, .events = POLLIN}, {.fd = s->signals, .events = POLLIN}};
        /* The next sandbox and its network namespace are made once this launch is out of the way, and not beside it. */
        const struct timespec pause = {.tv_nsec = 3000000};
        const struct timespec none = {0};
        int ready = ppoll(wait, 2, s->unreaped ? &none : s->wants_network || s->nlater ? &pause : NULL, NULL);
        if (ready < 0 && errno != EINTR) break;
        if (s->unreaped) reap(s);
        else if (ready == 0 && s->nlater) launch_later(s);
        else if (ready == 0) prepare_network(s);
        if (wait[1].revents) {
            struct signalfd_siginfo info[8];
            while (read(s->signals, info, sizeof info) > 0) continue;
            reap(s);
            if (s->nlater) launch_later(s);
        }
        if (wait[0].revents && receive(s) == 0) break;
    }
    end_all(s);
    return 0;
}
