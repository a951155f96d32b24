/* The init of a sandbox: PID 1 in a container and in a guest, the subreaper of a process sandbox. It takes one PLAN,
 * then requests; starts commands, reaps everything, reports. */
#include "rf.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define COMMANDS_MAX 16
#define STDIN_CREDIT (256u << 10)
#define PIPE_BYTES (256u << 10)

enum { REASON_NONE = 0, REASON_CPU = 1, REASON_KILLED = 2 };

struct command {
    bool used, running, streams, once, warm, eof_in;
    uint32_t id, reason;
    pid_t pid;
    int status;            /* as wait(2) gives it */
    uint64_t reaped_ns;    /* CLOCK_MONOTONIC */
    int in, out[2];        /* our ends of the pipes, or -1; out: stdout, stderr */
    struct rusage before;
    size_t in_used;        /* bytes in `input` */
    uint8_t input[STDIN_CREDIT];
};

struct init {
    enum rf_where where;
    int signals, go;
    struct rf_launch launch;
    int cgroup_dir; /* the guest's cgroup of the commands, or -1 */
    int tap;        /* until it was asked for, or -1 */
    bool planned, leaving, announced, unreaped; /* unreaped: there may be more zombies */
    uint64_t uncounted_ns; /* CPU time that doesn't count to the limit */
    struct rf_channel channel;
    struct rf_plan plan;
    struct rf_exec exec;
    struct rf_prefork prefork;
    struct rf_listen listen;
    struct rf_transfer transfer;
    struct rf_layer layer;
    struct rf_ahead ahead; /* a guest's */
    struct command commands[COMMANDS_MAX];
    uint8_t plan_payload[RF_PAYLOAD_MAX];
    uint8_t in[sizeof(struct rf_header) + RF_PAYLOAD_MAX];
    uint8_t chunk[RF_CHUNK];
};

int rf_die_with_parent(const struct rf_launch *l, struct rf_error *e) {
    /* In a PID namespace the kernel kills all with init; elsewhere init has to do it, so it must be told. */
    int number = (l->clone_flags & CLONE_NEWPID) ? SIGKILL : SIGTERM;
    return prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) < 0 ? rf_fail(e, "launch", "prctl", "PR_SET_PDEATHSIG") : 0;
}

/* ---- killing and reaping ---- */

static void note_exit(struct init *s, pid_t pid, int status) {
    if (pid == s->prefork.pid) rf_prefork_gone(&s->prefork);
    for (unsigned i = 0; i < COMMANDS_MAX; i++) {
        struct command *c = &s->commands[i];
        if (!c->used || !c->running || c->pid != pid) continue; /* its number may be another one's by now */
        c->running = false;
        c->status = status;
        c->reaped_ns = rf_monotonic_ns();
    }
}

/* So many at a time: a workload that leaves zombies as fast as they are reaped must not keep us from the clock and the
 * channel. */
#define REAPED_AT_ONCE 64

static void reap_ready(struct init *s) {
    int status, left = REAPED_AT_ONCE;
    for (pid_t pid; left > 0 && (pid = waitpid(-1, &status, WNOHANG)) > 0; left--) note_exit(s, pid, status);
    s->unreaped = left == 0;
}

static void kill_everything(struct init *s) {
    struct rf_error ignored;
    if (s->where != RF_IN_PROCESS) {
        kill(-1, SIGKILL); /* all of the PID namespace but ourselves */
    } else if (s->launch.has_kill_uid) {
        /* By the ids of our own user namespace, where the sandbox has one. */
        const struct rf_launch *l = &s->launch;
        rf_kill_uid(l->uid_map ? l->kill_uid - l->slot_base : l->kill_uid, (l->uid_map ? 0 : l->slot_base) + RF_KILLER_INIT, &ignored);
        rf_die_with_parent(&s->launch, &ignored); /* the changes of ids have cleared it */
    } else {
        rf_kill_descendants(NULL, 0, 0);
    }
}

/* Kills all that runs in the sandbox and waits until nothing is left of it. Every descendant is our child in the end,
 * as its own parent dies, so "no child" means nobody. */
static void end_everything(struct init *s) {
    for (;;) {
        int status, left = REAPED_AT_ONCE;
        pid_t pid = 0;
        while (left > 0 && (pid = waitpid(-1, &status, WNOHANG)) > 0) note_exit(s, pid, status), left--;
        if (pid < 0 && errno == ECHILD) return;
        kill_everything(s);
        if (left == 0) continue;
        struct timespec pause = {.tv_nsec = 100000}; /* they die on another processor; look again in 0.1 ms */
        nanosleep(&pause, NULL);
    }
}

static void end_for(struct init *s, uint32_t reason) {
    for (unsigned i = 0; i < COMMANDS_MAX; i++)
        if (s->commands[i].used && s->commands[i].running) s->commands[i].reason = reason;
    end_everything(s);
}

/* ---- reports ---- */

/* Before the first report: our own pidfd, by which Python waits for our end (a number would be another one's outside).
 * Not earlier: it would only wake Python once more. */
static void announce(struct init *s) {
    if (s->announced || s->where == RF_IN_GUEST) return;
    s->announced = true;
    int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    rf_send(s->channel.fd, false, RF_LAUNCHED, 0, NULL, 0, pidfd);
    if (pidfd >= 0) close(pidfd);
}

static void send_error(struct init *s, uint32_t id, const struct rf_error *e) {
    announce(s);
    rf_channel_send_error(&s->channel, id, e);
}

static void send_exited(struct init *s, const struct command *c) {
    struct rf_ending end = {.id = c->id, .reason = c->reason, .status = c->status, .reaped_ns = c->reaped_ns, .before = &c->before, .cgroup_dir = s->cgroup_dir};
    rf_report_exited(&s->channel, &end);
}

static void send_started(struct init *s, uint32_t id, pid_t pid, const struct rf_readback *rb) {
    announce(s);
    rf_report_started(&s->channel, id, pid, rb, s->where != RF_IN_GUEST);
}

/* ---- commands ---- */

static void close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static void close_fds(int *fds, unsigned n) {
    for (unsigned i = 0; i < n; i++) close_fd(&fds[i]);
}

static void close_command(struct command *c) {
    close_fd(&c->in);
    close_fds(c->out, 2);
    c->used = false;
}

/* Passes on what a stream holds; false once it is at its end, or empty. */
static bool pump_output(struct init *s, struct command *c, int i) {
    ssize_t n = read(c->out[i], s->chunk, sizeof s->chunk);
    if (n < 0) return errno == EINTR;
    rf_channel_send(&s->channel, (uint8_t)(RF_STDOUT + i), c->id, s->chunk, (size_t)n);
    if (n == 0) close_fd(&c->out[i]);
    return n > 0;
}

static int cpu_used(const struct init *s, uint64_t *ns) {
    *ns = 0;
    if (rf_read_number(s->plan.cpu_fd, "usage_usec", ns) == 0) return *ns *= 1000, 0;
    return rf_read_number(s->plan.cpu_fd, NULL, ns);
}

/* A command is over when it was reaped and its streams were passed on. What a process that it left behind in a lasting
 * sandbox writes later has no reader any more, as when a shell's pipe is closed. */
static void finish_commands(struct init *s) {
    for (unsigned i = 0; i < COMMANDS_MAX; i++) {
        struct command *c = &s->commands[i];
        if (!c->used || c->running) continue;
        if (c->once || c->warm) end_everything(s); /* what ours has left would be under no limit of the caller's command */
        if (c->once) {
            if (s->plan.give_back && s->plan.workdir) rf_give_back(s->plan.workdir, s->plan.uid, s->plan.gid);
        }
        /* No more than the pipe held: in a lasting sandbox somebody may write for ever. */
        for (int o = 0; o < 2; o++)
            for (size_t left = PIPE_BYTES; c->out[o] >= 0 && left && pump_output(s, c, o);) left -= left < RF_CHUNK ? left : RF_CHUNK;
        if (s->plan.listen) rf_listen_report(&s->listen, &s->channel, c->id);
        rf_layer_end(&s->layer, &s->channel, c->id);
        send_exited(s, c);
        if (c->warm && s->plan.cpu_fd >= 0) (void)cpu_used(s, &s->uncounted_ns);
        if (c->once && s->where != RF_IN_GUEST) s->leaving = true;
        close_command(c);
    }
}

static void pump_input(struct init *s, struct command *c) {
    uint32_t credit = 0;
    while (c->in >= 0 && c->in_used > 0) {
        ssize_t n = write(c->in, c->input, c->in_used);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n < 0) { /* nobody reads it any more: take the rest and drop it, as a pipe's writer gets EPIPE */
            n = (ssize_t)c->in_used;
            close_fd(&c->in);
        }
        memmove(c->input, c->input + n, c->in_used - (size_t)n);
        c->in_used -= (size_t)n;
        credit += (uint32_t)n;
    }
    if (c->in_used == 0 && c->eof_in) close_fd(&c->in);
    if (credit) rf_channel_send(&s->channel, RF_CREDIT, c->id, &credit, sizeof credit);
}

static int take_stdin(struct init *s, const struct rf_frame *f, struct rf_error *e) {
    for (unsigned i = 0; i < COMMANDS_MAX; i++) {
        struct command *c = &s->commands[i];
        if (!c->used || c->id != f->id || !c->streams) continue;
        if (f->length > sizeof c->input - c->in_used) return rf_fail_errno(e, EPROTO, "protocol", "stdin", "more than the credit");
        memcpy(c->input + c->in_used, f->payload, f->length);
        c->in_used += f->length;
        if (f->length == 0) c->eof_in = true;
        if (c->in < 0) { /* closed already: give the credit back, so that the sender can go on to its end */
            uint32_t credit = (uint32_t)c->in_used;
            c->in_used = 0;
            if (credit) rf_channel_send(&s->channel, RF_CREDIT, c->id, &credit, sizeof credit);
        } else {
            pump_input(s, c);
        }
        return 0;
    }
    return 0; /* of a command that is over: it was on its way */
}

/* Pipes for a command whose streams travel as frames: `child` gets its ends, the command keeps ours. */
static int make_pipes(struct command *c, int *child, struct rf_error *e) {
    for (int i = 0; i < 3; i++) {
        int p[2];
        if (pipe2(p, O_CLOEXEC) < 0) return rf_fail(e, "start", "pipe2", "");
        int ours = i == 0 ? p[1] : p[0];
        child[i] = i == 0 ? p[0] : p[1];
        if (fcntl(ours, F_SETFL, O_NONBLOCK) < 0) return rf_fail(e, "start", "fcntl", "O_NONBLOCK");
        fcntl(ours, F_SETPIPE_SZ, PIPE_BYTES); /* only to be quicker */
        if (i == 0) c->in = ours;
        else c->out[i - 1] = ours;
    }
    return 0;
}

static int start_command(struct init *s, const struct rf_frame *f, struct rf_error *e) {
    struct command *c = NULL;
    for (unsigned i = 0; i < COMMANDS_MAX && !c; i++)
        if (!s->commands[i].used) c = &s->commands[i];
    if (!c) return rf_fail_errno(e, EAGAIN, "start", "commands", "too many at once");
    if (rf_exec_parse(f->payload, f->length, &s->exec, e) < 0) return -1;
    if (s->exec.flags & RF_X_OWN) {
        if (s->where != RF_IN_GUEST || !(s->exec.flags & RF_X_WARM)) return rf_fail_errno(e, EPROTO, "protocol", "exec", "only a guest is warmed up by its init");
        if (s->ahead.program < 0) return rf_fail_errno(e, ENOENT, "exec", "execveat", "/init");
        s->exec.program = s->ahead.program;
    }
    bool streams = s->exec.flags & RF_X_STREAMS;
    if (streams ? f->nfds != 0 : f->nfds < 3) return rf_fail_errno(e, EPROTO, "protocol", "exec", "descriptors");
    c->in = c->out[0] = c->out[1] = -1;
    c->streams = streams;
    c->once = s->exec.flags & RF_X_ONCE;
    c->warm = s->exec.flags & RF_X_WARM;
    c->eof_in = false;
    c->in_used = 0;
    c->reason = REASON_NONE;
    c->id = f->id;
    int pipes[3] = {-1, -1, -1};
    struct rf_readback rb = {0};
    int r = streams ? make_pipes(c, pipes, e) : 0;
    getrusage(RUSAGE_CHILDREN, &c->before);
    bool notify = s->plan.seccomp_flags & RF_S_NOTIFY;
    if (notify) announce(s); /* the listener isn't to be our first word */
    s->exec.id = f->id;
    const int *fds = streams ? pipes : f->fds;
    if (r == 0 && !streams) r = rf_prefork_exec(&s->prefork, f->payload, f->length, f->fds, f->nfds, &c->pid, &rb, e);
    if (r == 0) r = (notify ? rf_spawn_watched : rf_spawn)(&s->plan, &s->exec, fds, streams ? 3 : f->nfds, &c->pid, &rb, e);
    if (r >= 0 && (s->plan.seccomp_flags & RF_S_FOREIGN)) rb.seccomp = rf_seccomp_mode(c->pid);
    close_fds(pipes, 3);
    if (r < 0) {
        close_command(c);
        return -1;
    }
    /* Off the one CPU of the start, so that what follows is not in the command's way. */
    if (s->plan.cpus) sched_setaffinity(0, sizeof *s->plan.cpus, s->plan.cpus);
    s->plan.cpus = NULL;
    c->used = c->running = true;
    send_started(s, c->id, c->pid, &rb);
    return 0;
}

static void signal_command(struct init *s, const struct rf_frame *f) {
    uint32_t number;
    if (f->length != sizeof number) return;
    memcpy(&number, f->payload, sizeof number);
    for (unsigned i = 0; i < COMMANDS_MAX; i++)
        if (s->commands[i].used && s->commands[i].running && s->commands[i].id == f->id && number < NSIG) kill(s->commands[i].pid, (int)number);
}

/* ---- PLAN ---- */

/* A plan may only change what is this sandbox's own. The same request in a namespace of the host's would rename the host
 * or mount over its /proc. */
static int check_plan(const struct init *s, struct rf_error *e) {
    const struct rf_plan *p = &s->plan;
    bool guest = s->where == RF_IN_GUEST;
    uint64_t own = guest ? ~0ull : s->launch.clone_flags;
    bool network = p->loopback || p->sockets_fd >= 0;
    if ((p->hostname && !(own & CLONE_NEWUTS)) || (network && !(own & CLONE_NEWNET)) || ((p->flags & RF_P_ENTER) && !(own & CLONE_NEWNS)))
        return rf_fail_errno(e, EPROTO, "protocol", "plan", "it would change a namespace of the host's");
    if (!guest && (!(p->flags & RF_P_NO_NEW_PRIVS) || ((own & CLONE_NEWNS) && !(p->flags & RF_P_ENTER))))
        return rf_fail_errno(e, EPROTO, "protocol", "plan", "a command without its restrictions");
    /* What makes a tap needs power over the network namespace, and the tap has to be given away. */
    if (p->tun_fd >= 0 && (guest || !s->launch.own_network || p->sockets_fd < 0)) return rf_fail_errno(e, EPROTO, "protocol", "plan", "a tap of somebody else's");
    /* Else it would be root's, or one that killing by the uid doesn't reach. */
    const struct rf_launch *l = &s->launch;
    if (l->has_kill_uid && (!p->has_ids || p->uid != l->kill_uid - (l->uid_map ? l->slot_base : 0)))
        return rf_fail_errno(e, EPROTO, "protocol", "plan", "another uid than the sandbox's own");
    if (p->capabilities && !guest && !(own & CLONE_NEWUSER)) return rf_fail_errno(e, EPROTO, "protocol", "plan", "capabilities on the host");
    bool answers = p->seccomp_flags & (RF_S_NOTIFY | RF_S_AUDIT);
    if (guest ? answers != (p->answers.len > 0) : p->answers.len > 0 || (p->seccomp_flags & RF_S_AUDIT)) return rf_fail_errno(e, EPROTO, "protocol", "plan", "answers for a listener");
    if (!guest && (p->realtime_ns || p->entropy || p->has_guest_limits || p->has_card)) return rf_fail_errno(e, EPROTO, "protocol", "plan", "only a guest can do this");
    for (unsigned i = 0; !guest && i < p->nmounts; i++)
        if (p->mounts[i].kind == RF_DISK) return rf_fail_errno(e, EPROTO, "protocol", "plan", "only a guest has a disk");
    if (!guest && p->cpu_limit_ns && p->cpu_fd < 0) return rf_fail_errno(e, EPROTO, "protocol", "plan", "a CPU time limit, and nothing to read it by");
    return 0;
}

/* The sizes of those file systems that the plan asks about, before the command can be in them. */
static int tell_sizes(struct init *s, int root, struct rf_error *e) {
    bool asked = s->layer.fd >= 0;
    for (unsigned i = 0; i < s->plan.nmounts; i++) asked |= s->plan.mounts[i].flags & RF_M_TOLD;
    if (!asked) return 0;
    announce(s);
    return rf_layer_sizes(&s->layer, s->plan.mounts, s->plan.nmounts, root, &s->channel, e);
}

static int apply_plan(struct init *s, const struct rf_frame *f, struct rf_error *e) {
    if (s->planned) return rf_fail_errno(e, EPROTO, "protocol", "plan", "a second one");
    memcpy(s->plan_payload, f->payload, f->length);
    static_assert(sizeof s->plan_payload >= RF_PAYLOAD_MAX, "a payload fits");
    if (rf_plan_parse(s->plan_payload, f->length, f->fds, f->nfds, &s->plan, e) < 0) return -1;
    if (check_plan(s, e) < 0) return -1;
    if (s->where != RF_IN_GUEST) s->plan.cpus = &s->launch.cpus;
    s->plan.channel_fd = s->channel.fd;
    s->plan.init_pid = getpid();
    if (s->plan.answers.len) {
        s->plan.listen = &s->listen;
        s->listen.answers = s->plan.answers;
        s->listen.audit = s->plan.seccomp_flags & RF_S_AUDIT;
    }
    const struct rf_plan *p = &s->plan;
    if (s->where == RF_IN_GUEST) {
        if (rf_guest_clock(p, &s->ahead, e) < 0) return -1;
        if (rf_guest_limits(&s->plan, &s->ahead, &s->cgroup_dir, e) < 0) return -1;
    }
    if (p->hostname && sethostname(p->hostname, strlen(p->hostname)) < 0) return rf_fail(e, "hostname", "sethostname", p->hostname);
    if (p->loopback && !s->launch.network_ready && !s->ahead.loopback && rf_loopback_up(e) < 0) return -1;
    if (p->sockets_fd >= 0 || p->has_card) rf_sockets_any_port();
    if (p->has_card && rf_card_up(&p->card, e) < 0) return -1;
    if (p->tun_fd >= 0 && (s->tap = rf_tap_make(p->tun_fd, e)) < 0) return -1; /* the node may be root's on the host */
    if (rf_init_ids(&s->launch, &s->go, e) < 0) return -1;
    if (p->flags & RF_P_ENTER) {
        s->layer.uid = p->uid;
        s->layer.gid = p->gid;
        s->layer.user_namespace = s->where != RF_IN_GUEST;
        int root = rf_tree_build(p->mounts, p->nmounts, s->where == RF_IN_GUEST ? "/new" : "/proc", "mode=0755", &s->layer, e);
        if (root < 0) return -1;
        if (tell_sizes(s, root, e) < 0) return -1;
        int r = s->where == RF_IN_GUEST ? rf_tree_switch(root, e) : rf_tree_enter(root, e);
        close(root);
        if (r < 0) return -1;
    }
    if ((s->launch.clone_flags & CLONE_NEWNS) && !(s->launch.clone_flags & CLONE_NEWUSER) && !s->launch.joins_user && rf_init_limit(e) < 0) return -1;
    if (p->capabilities && s->where == RF_IN_CONTAINER && rf_nest(p, &s->launch, e) < 0) return -1;
    s->planned = true;
    /* Nobody waits for this sandbox yet, so there is time to make its command's process too. */
    if (s->launch.later && !p->seccomp_flags) rf_prefork_make(&s->prefork, p, s->in, &s->exec);
    /* What is to come will start on whichever CPU is free then, not on the one that was. */
    if (s->launch.later && p->cpus) sched_setaffinity(0, sizeof *p->cpus, p->cpus);
    return 0;
}

/* Our clock of now, by which Python knows what it was when the machine was saved. */
static int send_clock(struct init *s, uint32_t id) {
    uint64_t now = rf_monotonic_ns();
    return rf_channel_send(&s->channel, RF_CLOCK, id, &now, sizeof now);
}

/* ---- requests ---- */

/* The plan's descriptors stay ours, in the plan; EXEC's were given on to the command. */
static void take_fds(struct init *s, const struct rf_frame *f) {
    bool keep = f->type == RF_PLAN;
    for (unsigned i = 0; i < f->nfds && !keep; i++) close(s->channel.fds[i]);
    memmove(s->channel.fds, s->channel.fds + f->nfds, (s->channel.nfds - f->nfds) * sizeof *s->channel.fds);
    s->channel.nfds -= f->nfds;
}

static int file_request(struct init *s, const struct rf_frame *f, struct rf_error *e) {
    const char *dir = s->plan.workdir;
    if (!dir) return rf_fail_errno(e, EPROTO, "protocol", "files", "no work directory");
    switch (f->type) {
    case RF_PUT: return rf_file_put(dir, f, s->plan.uid, s->plan.gid, &s->transfer, e);
    case RF_DATA: {
        bool last = f->length == 0 && s->transfer.fd >= 0; /* one that failed was answered by its error */
        if (rf_file_data(&s->transfer, f, e) < 0) return -1;
        return last ? rf_channel_send(&s->channel, RF_DONE, f->id, NULL, 0) : 0;
    }
    case RF_LIST: return rf_file_list(&s->channel, dir, f->id, e);
    default: return rf_file_read(&s->channel, dir, f, e);
    }
}

static int serve(struct init *s, const struct rf_frame *f, struct rf_error *e) {
    bool before = f->type == RF_PLAN || f->type == RF_SHUTDOWN || f->type == RF_ASK_CLOCK;
    if (!s->planned && !before) return rf_fail_errno(e, EPROTO, "protocol", "request", "before the plan");
    switch (f->type) {
    case RF_PLAN:
        if (apply_plan(s, f, e) < 0) return -1;
        return s->where == RF_IN_GUEST ? rf_report_ready(&s->channel, s->cgroup_dir) : 0; /* elsewhere STARTED says it soon enough */
    case RF_EXEC: return start_command(s, f, e);
    case RF_STDIN: return take_stdin(s, f, e);
    case RF_SIGNAL: signal_command(s, f); return 0;
    case RF_KILL: end_for(s, REASON_KILLED); return 0;
    case RF_SHUTDOWN: s->leaving = true; return 0;
    case RF_ASK_CLOCK: return send_clock(s, f->id);
    case RF_PING: return rf_channel_send(&s->channel, RF_PONG, f->id, NULL, 0);
    case RF_CHANGES: rf_layer_end(&s->layer, &s->channel, f->id); return rf_channel_send(&s->channel, RF_DONE, f->id, NULL, 0);
    case RF_PUT:
    case RF_DATA:
    case RF_LIST:
    case RF_READ: return file_request(s, f, e);
    default: return rf_fail_errno(e, EPROTO, "protocol", "request", "of no known type");
    }
}

static int serve_all(struct init *s) {
    struct rf_error e = {0};
    struct rf_frame f;
    int got;
    while (!s->leaving && (got = rf_channel_next(&s->channel, &f, &e)) > 0) {
        int r = serve(s, &f, &e);
        take_fds(s, &f);
        if (r < 0) send_error(s, f.id, &e);
    }
    if (s->leaving || got == 0) return 0;
    send_error(s, 0, &e);
    return -1;
}

/* 0 where the channel is at its end or broken. */
static int read_channel(struct init *s) {
    struct rf_error e = {0};
    int r = rf_channel_fill(&s->channel, &e);
    if (r < 0 && (e.err == EAGAIN || e.err == EINTR)) return 1;
    if (r == 0 && s->channel.port) { /* a port reads as at its end until its other side is open */
        struct timespec pause = {.tv_nsec = 1000000};
        nanosleep(&pause, NULL);
        return 1;
    }
    return r > 0 && serve_all(s) == 0;
}

/* ---- the CPU time limit ---- */

/* How long until it makes sense to look again, ms; -1 where no limit is set or nothing runs. */
static int watch_cpu(struct init *s) {
    if (!s->plan.cpu_limit_ns || s->plan.cpu_fd < 0) return -1;
    bool running = false;
    for (unsigned i = 0; i < COMMANDS_MAX; i++) running |= s->commands[i].used && s->commands[i].running;
    if (!running) return -1;
    uint64_t used;
    if (cpu_used(s, &used) < 0) return 1000;
    used -= used < s->uncounted_ns ? used : s->uncounted_ns;
    if (used >= s->plan.cpu_limit_ns) {
        end_for(s, REASON_CPU);
        return 0;
    }
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t ms = (s->plan.cpu_limit_ns - used) / 1000000 / (uint64_t)(cpus > 0 ? cpus : 1);
    return ms < 2 ? 2 : ms > 1000 ? 1000 : (int)ms;
}

/* ---- the loop ---- */

static void leave(struct init *s) {
    end_everything(s);
    if (s->planned && s->plan.give_back && s->plan.workdir) rf_give_back(s->plan.workdir, s->plan.uid, s->plan.gid);
    if (s->where == RF_IN_GUEST) {
        sync();
        reboot(RB_POWER_OFF);
        reboot(RB_AUTOBOOT); /* where the machine can't power off, -no-reboot makes this the end */
    }
}

/* 0: go on. */
static int wait_and_serve(struct init *s) {
    struct pollfd wait[4 + 3 * COMMANDS_MAX];
    struct command *of[RF_LEN(wait)];
    nfds_t n = 4;
    wait[0] = (struct pollfd){.fd = s->channel.fd, .events = POLLIN};
    wait[1] = (struct pollfd){.fd = s->signals, .events = POLLIN};
    wait[2] = (struct pollfd){.fd = s->plan.sockets_fd, .events = POLLIN}; /* -1 is passed over */
    wait[3] = (struct pollfd){.fd = s->listen.fd, .events = POLLIN}; /* likewise */
    for (unsigned i = 0; i < COMMANDS_MAX; i++) {
        struct command *c = &s->commands[i];
        if (!c->used || !c->streams) continue;
        for (int o = 0; o < 2; o++)
            if (c->out[o] >= 0) of[n] = c, wait[n++] = (struct pollfd){.fd = c->out[o], .events = POLLIN};
        if (c->in >= 0 && c->in_used > 0) of[n] = c, wait[n++] = (struct pollfd){.fd = c->in, .events = POLLOUT};
    }
    int timeout = watch_cpu(s);
    if (s->unreaped) timeout = 0;
    if (poll(wait, n, timeout) < 0 && errno != EINTR) return -1;
    if (wait[3].revents) rf_listen_serve(&s->listen);
    for (nfds_t i = 4; i < n; i++) {
        struct command *c = of[i];
        if (!wait[i].revents) continue;
        if (wait[i].fd == c->in) pump_input(s, c);
        else pump_output(s, c, wait[i].fd == c->out[0] ? 0 : 1);
    }
    if (wait[1].revents) {
        struct signalfd_siginfo info;
        while (read(s->signals, &info, sizeof info) == (ssize_t)sizeof info)
            /* In a namespace of our own the kernel ends us by SIGKILL: a SIGTERM is the workload's. */
            if (info.ssi_signo == SIGTERM && s->where == RF_IN_PROCESS) return -1;
    }
    if (wait[1].revents || s->unreaped) reap_ready(s);
    if (wait[2].revents && rf_sockets_serve(s->plan.sockets_fd, &s->tap) == 0) close_fd(&s->plan.sockets_fd);
    if (wait[0].revents && !read_channel(s)) return -1;
    finish_commands(s);
    return s->leaving ? -1 : 0;
}

int rf_init_main(int channel_fd, enum rf_where where, const struct rf_launch *l, int go) {
    struct init *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (s == MAP_FAILED) return 1;
    s->where = where;
    s->tap = s->cgroup_dir = s->layer.fd = s->listen.fd = s->transfer.fd = s->plan.cpu_fd = s->plan.landlock_fd = s->plan.sockets_fd = s->plan.tun_fd = -1;
    s->go = go;
    if (l) s->launch = *l;
    s->channel.fd = channel_fd;
    s->channel.port = where == RF_IN_GUEST;
    s->channel.in = s->in;
    fcntl(channel_fd, F_SETFD, FD_CLOEXEC);
    umask(0);
    sigset_t all, wanted;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL); /* PID 1 ignores what it has no handler for, unless it is blocked */
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGCHLD);
    sigaddset(&wanted, SIGTERM);
    s->signals = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
    if (s->signals < 0) return 1;
    if (where == RF_IN_PROCESS && prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0) return 1;
    if (where == RF_IN_GUEST) rf_guest_ahead(&s->ahead);
    while (wait_and_serve(s) == 0) continue;
    leave(s);
    return 0;
}
