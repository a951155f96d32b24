/* ringfence core: what runs between clone and exec, as PID 1, and as the helper that starts both.
 *
 * Conventions: a function returns 0 (or a useful value >= 0), or -1 with the error record filled in. Only main exits.
 * No allocation: every buffer is in a context that the role's main function maps once. */
#pragma once

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <assert.h>
#include <errno.h>
#include <linux/filter.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

#define RF_LEN(a) (sizeof(a) / sizeof((a)[0]))

/* ---- error.c: the one error record --------------------------------------------------------------------------- */

struct rf_error {
    int err;          /* errno */
    char step[32];    /* which part of the launch: "mounts", "seccomp", "exec" … */
    char call[32];    /* the system call, or the check that failed */
    char detail[512]; /* its argument that matters */
};

/* Fills `e` from errno and returns -1. */
int rf_fail(struct rf_error *e, const char *step, const char *call, const char *detail);
int rf_fail_errno(struct rf_error *e, int err, const char *step, const char *call, const char *detail);

/* ---- frame.c: the wire format (docs/design/protocol.md) ------------------------------------------------------ */

#define RF_MAGIC 0x4652
#define RF_VERSION 1
#define RF_PAYLOAD_MAX (1u << 20)
#define RF_PACKET_MAX (64u << 10)
#define RF_FDS_MAX 64
#define RF_NO_FD 0xffffffffu
#define RF_CHUNK (64u << 10)

enum rf_type {
    RF_LAUNCH = 1, RF_TEMPLATE = 2, RF_OWN = 3, RF_USERNS = 4, RF_SETTLE = 6,
    RF_PLAN = 16, RF_EXEC = 17, RF_STDIN = 18, RF_SIGNAL = 19, RF_KILL = 20, RF_PUT = 21, RF_DATA = 22, RF_LIST = 23,
    RF_READ = 24, RF_SHUTDOWN = 25, RF_ASK_CLOCK = 26, RF_PING = 29, RF_CHANGES = 30,
    RF_LAUNCHED = 32, RF_READY = 33, RF_STARTED = 34, RF_ERROR = 35, RF_STDOUT = 36, RF_STDERR = 37, RF_EXITED = 38,
    RF_CREDIT = 39, RF_ENTRIES = 40, RF_DONE = 41, RF_LISTENER = 42, RF_SIZES = 43, RF_LAYER_END = 44, RF_CLOCK = 47,
    RF_PONG = 48,
};

struct rf_header {
    uint16_t magic;
    uint8_t version;
    uint8_t type;
    uint32_t length;
    uint32_t id;
    uint16_t nfds;
    uint16_t zero;
} __attribute__((packed));

struct rf_frame {
    uint8_t type;
    uint32_t id;
    const uint8_t *payload;
    size_t length;
    const int *fds; /* owned by the channel until taken with rf_frame_take_fds */
    unsigned nfds;
};

/* Checks a header against the constants; 0, or -1 with EPROTO. */
int rf_header_check(const struct rf_header *h, size_t payload_max, struct rf_error *e);

/* A cursor over the attributes of a payload. */
struct rf_reader { const uint8_t *at, *end; };
struct rf_attr { uint16_t tag; uint32_t length; const uint8_t *data; };
/* 1 with an attribute, 0 at the end, -1 where the payload is malformed. */
int rf_attr_next(struct rf_reader *r, struct rf_attr *a);
/* Each checks the length and returns 0, or -1. */
int rf_attr_u32(const struct rf_attr *a, uint32_t *v);
int rf_attr_u64(const struct rf_attr *a, uint64_t *v);
int rf_attr_string(const struct rf_attr *a, const char **s);
/* Takes the next NUL-terminated string of a packed run of them; -1 where none ends before `end`. */
int rf_take_string(const uint8_t **at, const uint8_t *end, const char **s);

/* Writes attributes into a bounded buffer; `full` says that something didn't fit. */
struct rf_writer { uint8_t *buf; size_t length, capacity; bool full; };
void rf_put(struct rf_writer *w, uint16_t tag, const void *data, size_t n);
void rf_put_u32(struct rf_writer *w, uint16_t tag, uint32_t v);
void rf_put_u64(struct rf_writer *w, uint16_t tag, uint64_t v);
void rf_put_string(struct rf_writer *w, uint16_t tag, const char *s);

/* Room for the descriptors of a message, aligned as the kernel wants it. */
#define RF_CONTROL(n) union { char bytes[CMSG_SPACE((n) * sizeof(int))]; struct cmsghdr align; }
struct msghdr;
/* Has a message carry descriptors. `control`: zeroed room for `n` of them. */
void rf_fds_attach(struct msghdr *msg, void *control, const int *fds, unsigned n);
/* Adds those that came with a message to `fds` (RF_FDS_MAX of them, `nfds` in use); closes what doesn't fit. -1 where some
 * were lost. */
int rf_fds_take(struct msghdr *msg, int *fds, unsigned *nfds);

/* A stream of frames, over a socket with descriptors or over a virtio port without. */
struct rf_channel {
    int fd;
    bool port;           /* a virtio-serial port: read and write, not recvmsg */
    uint8_t *in;         /* RF_PAYLOAD_MAX + header */
    size_t filled, used; /* bytes in `in`; bytes of them that the last frame took */
    int fds[RF_FDS_MAX]; /* arrived and not yet taken, in order */
    unsigned nfds;
};
/* Reads once. 1 where bytes came, 0 at the end of the stream, -1 on error (EAGAIN included). */
int rf_channel_fill(struct rf_channel *ch, struct rf_error *e);
/* 1 with the next whole frame, 0 where more must be read first, -1 where the peer broke the protocol. */
int rf_channel_next(struct rf_channel *ch, struct rf_frame *f, struct rf_error *e);
/* Sends one frame, waiting as long as it takes. */
int rf_channel_send(struct rf_channel *ch, uint8_t type, uint32_t id, const void *payload, size_t n);
int rf_channel_send_error(struct rf_channel *ch, uint32_t id, const struct rf_error *e);
/* The same on any socket, as the launcher answers. `passed` travels along unless it is -1. */
int rf_send_error(int fd, uint32_t id, const struct rf_error *e);
int rf_send(int fd, bool port, uint8_t type, uint32_t id, const void *payload, size_t n, int passed);

/* ---- plan.c: what PLAN says ---------------------------------------------------------------------------------- */

#define RF_MOUNTS_MAX 256
#define RF_RLIMITS_MAX 16
#define RF_CGROUPS_MAX 8
#define RF_BPF_MAX 4096 /* the kernel's BPF_MAXINSNS */

enum rf_mount_kind { RF_DIR = 1, RF_SYMLINK, RF_FILE, RF_BIND, RF_FS, RF_MASK, RF_READONLY, RF_LAYER, RF_OVERLAY, RF_PLACE, RF_DISK };
enum {
    RF_M_RDONLY = 1, RF_M_NOSUID = 2, RF_M_NODEV = 4, RF_M_NOEXEC = 8, RF_M_ATTRS = 15,
    RF_M_RECURSIVE = 0x100, RF_M_OPTIONAL = 0x200, RF_M_INSIDE = 0x400, RF_M_TOLD = 0x800, RF_M_NOFOLLOW = 0x1000,
};
enum { RF_P_CGROUP_NS = 1, RF_P_ENTER = 2, RF_P_NO_NEW_PRIVS = 4, RF_P_ALL = 7 };

/* notify: the filter has a listener, which goes to Python. foreign: the filter, or that there is none, is the caller's own
 * choice, so that nothing can be read back behind it, and it may allow keyctl(2). log, spec_allow: flags of seccomp(2).
 * audit: what a guest's filter denies is let through. */
enum { RF_S_NOTIFY = 1, RF_S_FOREIGN = 2, RF_S_LOG = 4, RF_S_SPEC_ALLOW = 8, RF_S_AUDIT = 16, RF_S_ALL = 31 };

struct rf_mount {
    uint8_t kind;
    uint16_t flags;
    uint32_t mode;
    int fd; /* or -1 */
    const char *source, *fstype, *target, *data;
};

struct rf_rlimit { uint32_t resource; uint64_t soft, hard; };

/* What a guest's network card is told: whose frames come to it, and addresses. */
struct rf_card {
    uint8_t mac[6]; /* the gateway's */
    uint8_t address[4], gateway[4], address6[16], gateway6[16];
    bool ipv6;
};

struct rf_plan {
    const char *hostname, *workdir;
    bool loopback, has_ids, give_back;
    uint32_t uid, gid, flags, seccomp_flags;
    int channel_fd; /* where a listener is sent */
    pid_t init_pid; /* whose child the command must be */
    uint64_t capabilities, cpu_limit_ns, realtime_ns;
    uint64_t realtime_at_ns; /* CLOCK_MONOTONIC when it was realtime_ns; 0 for now */
    struct sock_fprog filter, answers; /* answers: a guest's filter before a listener was put into it */
    struct rf_listen *listen;          /* a guest's, or NULL */
    int landlock_fd, cpu_fd;
    int sockets_fd; /* on which requests for sockets come, or -1 */
    int tun_fd;     /* the folder of the node tun, or -1 */
    bool has_card;
    struct rf_card card;
    int cgroup_fds[RF_CGROUPS_MAX];
    unsigned ncgroups, nmounts, nrlimits;
    struct rf_rlimit rlimits[RF_RLIMITS_MAX];
    struct rf_mount mounts[RF_MOUNTS_MAX];
    const uint8_t *entropy;
    size_t entropy_length;
    const cpu_set_t *cpus; /* which CPUs the command may use, where its start is kept on one; or NULL */
    bool has_guest_limits;
    uint64_t guest_memory, guest_pids, guest_cpu_ns;
};

/* Reads a PLAN payload. The plan points into `payload` and refers to `fds`, which must both outlive it. */
int rf_plan_parse(const uint8_t *payload, size_t n, const int *fds, unsigned nfds, struct rf_plan *p, struct rf_error *e);
int rf_mount_parse(const struct rf_attr *a, const int *fds, unsigned nfds, struct rf_mount *m);

#define RF_ARGS_MAX 8192

struct rf_exec {
    char *argv[RF_ARGS_MAX + 1];
    char *envp[RF_ARGS_MAX + 1];
    const char *cwd;
    uint32_t flags, id;
    int program; /* what is executed in place of argv[0]'s file, or -1 */
};
/* warm: it is ours, and no CPU time of it or of what came before counts to the limit. own: a guest's init itself. */
enum { RF_X_ONCE = 1, RF_X_STREAMS = 2, RF_X_WARM = 4, RF_X_OWN = 8, RF_X_ALL = 15 };
int rf_exec_parse(const uint8_t *payload, size_t n, struct rf_exec *x, struct rf_error *e);

/* The ids that this host has for sandboxes, RF_SLOT_IDS of them for each (ringfence.linux.ids). */
#define RF_SLOT_IDS 65536u
struct rf_ids { uint32_t first, count; };

#define RF_JOINS_MAX 8
struct rf_join { uint64_t flag; int fd; };

struct rf_launch {
    uint64_t clone_flags;
    struct rf_join joins[RF_JOINS_MAX]; /* namespaces that exist already; none of them is in clone_flags */
    unsigned njoins;
    bool joins_user, has_offsets;
    int64_t monotonic_ns, boottime_ns; /* how far the clocks of the time namespace in clone_flags are ahead */
    const char *uid_map, *gid_map;
    bool has_kill_uid, host_mounts;
    bool later;         /* once a sandbox has ended, or after a pause */
    bool own_network; /* its network namespace belongs to its user namespace: never one from stock */
    cpu_set_t cpus;     /* those of the launcher, which stays on one of them during the start */
    bool network_ready; /* the network namespace was made before, its loopback is up, and it isn't ours to change */
    uint32_t kill_uid;
    uint32_t slot_base; /* where the ids begin that kill_uid is one of; with id maps they are 0 and up inside */
};
/* ids: those that kill_uid must be one of. The joins refer to `fds`. */
int rf_launch_parse(const uint8_t *payload, size_t n, const int *fds, unsigned nfds, const struct rf_ids *ids, struct rf_launch *l,
                    struct rf_error *e);

/* ---- rootfs.c: the file tree --------------------------------------------------------------------------------- */

struct rf_layer;

/* Makes a tmpfs, runs the steps in it, and returns a descriptor of its root; -1 on error. Must be called in a mount
 * namespace of our own. `at` is an existing directory to hang it on. `layer`: or NULL, where no step may ask for one. */
int rf_tree_build(const struct rf_mount *m, unsigned n, const char *at, const char *options, struct rf_layer *layer, struct rf_error *e);
/* One step, in a tree that is being made. */
int rf_tree_step(int *root, const struct rf_mount *m, struct rf_layer *layer, struct rf_error *e);
/* Makes the tree at `root` this process's root and lets go of everything else. */
int rf_tree_enter(int root, struct rf_error *e);
/* The same where pivot_root can't work: PID 1 on the initramfs. */
int rf_tree_switch(int root, struct rf_error *e);

/* What the steps are made of. Each gives a descriptor, or 0; -1 with errno set, but for rf_mount_new, which fills `e`. */
int rf_open_in(int root, const char *path, int flags);
int rf_mount_new(const char *fstype, const char *source, const char *options, uint16_t flags, struct rf_error *e);
int rf_mount_clone(int dir, const char *path, uint16_t flags);
int rf_mount_private(int mount, bool recursive);
int rf_mount_set(int mount, uint16_t flags);
int rf_mount_attach(int mount, int target);
int rf_mount_mask(int root, const char *target, struct rf_error *e);

/* ---- layer.c: what of a sandbox's root can be written to, and what became of it -------------------------------- */

#define RF_OVERLAYS_MAX 64

struct rf_overlay { int upper, lower; const char *target; };

/* What a disk shows at the top of the tree: folders and files. */
#define RF_DISK_NAMES_MAX 40
struct rf_disk_name { char target[260]; bool directory; };
struct rf_disk { struct rf_disk_name names[RF_DISK_NAMES_MAX]; unsigned nnames; };

/* One file system, or directory, that holds all that a workload may write to in its root and in its work directory. */
struct rf_layer {
    int fd;               /* its directory, or -1 */
    uint32_t uid, gid;    /* whose the directories of PLACE steps are */
    bool user_namespace;  /* overlays are made in one: their marks are user.*, as trusted.* are real root's alone */
    struct rf_overlay overlays[RF_OVERLAYS_MAX];
    unsigned noverlays, nplaces;
    struct rf_disk disk;
};

/* Takes a LAYER step's file system, hangs it on `at`, and makes its directories. `mount` is given up. */
int rf_layer_open(struct rf_layer *l, const struct rf_mount *m, int mount, const char *at, struct rf_error *e);
/* A directory of the layer to hang the root on. */
int rf_layer_hang(const struct rf_layer *l, struct rf_error *e);
/* An overlay with `lower`, a detached mount or one below the layer's root, as its lower layer; a detached mount. */
int rf_layer_overlay(struct rf_layer *l, int lower, const char *target, struct rf_error *e);
/* Masks what of the lower layer of the last overlay, below its folder `below`, isn't open to everybody. */
int rf_layer_hide_private(const struct rf_layer *l, int root, const char *below, struct rf_error *e);
/* The directory `source` of the layer, made for the command's user; a detached mount. */
int rf_layer_place(struct rf_layer *l, const struct rf_mount *m, struct rf_error *e);
/* SIZES: of each file system whose step has RF_M_TOLD, as the kernel tells it; with the layer's directory. */
int rf_layer_sizes(const struct rf_layer *l, const struct rf_mount *m, unsigned n, int root, struct rf_channel *ch, struct rf_error *e);
/* LAYER_END: how full it is, and what the overlays' upper layers say was changed. */
void rf_layer_end(const struct rf_layer *l, struct rf_channel *ch, uint32_t id);

/* ---- listen.c: a guest's own answers for what its filter denies ------------------------------------------------ */

struct rf_denial { uint32_t arch, number; int32_t err; uint32_t zero; uint64_t count, args[6]; }; /* err: -1 is none */
struct rf_listen {
    int fd; /* or -1 */
    bool audit;
    struct sock_fprog answers;
    unsigned n;
    uint64_t others;
    struct rf_denial found[256];
};
struct seccomp_data;
uint32_t rf_filter_answer(const struct sock_fprog *program, const struct seccomp_data *d);
/* Answers what waits; closes the listener where nobody can ask any more. */
void rf_listen_serve(struct rf_listen *l);
int rf_listen_report(struct rf_listen *l, struct rf_channel *ch, uint32_t id);
/* The listener, out of the LISTENER frame that the middle process has sent. */
int rf_listen_take(struct rf_listen *l, int socket, struct rf_error *e);

/* ---- restrict.c: what a command gives up, in one fixed order ------------------------------------------------- */

struct rf_readback {
    uint64_t clock_ns;
    uint32_t pid, no_new_privs, seccomp, landlock;
    int listener; /* of the filter, in the command's table of descriptors, or -1 */
    uint64_t caps[5]; /* effective, permitted, inheritable, bounding, ambient */
    uint32_t ids[6];
    struct rf_rlimit rlimits[RF_RLIMITS_MAX];
    unsigned nrlimits;
    char cgroup_namespace[64]; /* as in /proc/self/ns; the others are init's too */
    char hostname[65], release[65];
};

/* Runs in the command's process, between clone and exec. `fds` become 0, 1, 2, …; nothing else stays open. */
int rf_restrict(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, struct rf_readback *rb,
                struct rf_error *e);
/* The same in two parts, for a process that is restricted before its command is known; the first does all but what the
 * command itself says. */
int rf_restrict_ahead(const struct rf_plan *p, struct rf_readback *rb, struct rf_error *e);
int rf_restrict_rest(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, struct rf_error *e);
/* The seccomp mode of a process, as /proc tells it to us; 0 where it can't be read. */
uint32_t rf_seccomp_mode(pid_t pid);
/* execve, with PATH searched as execvp does; returns only on failure. */
int rf_exec_path(const struct rf_exec *x, struct rf_error *e);

/* ---- report.c: what init tells of a command ------------------------------------------------------------------- */

struct rf_ending {
    uint32_t id, reason;
    int status;                  /* as wait(2) gives it */
    uint64_t reaped_ns;          /* CLOCK_MONOTONIC */
    const struct rusage *before; /* of init's children, when the command was started */
    int cgroup_dir;              /* the guest's cgroup of the commands, or -1 */
};

int rf_report_exited(struct rf_channel *ch, const struct rf_ending *end);
/* namespaces: whether it says which ones. A guest's are its own kernel's first. */
int rf_report_started(struct rf_channel *ch, uint32_t id, pid_t pid, const struct rf_readback *rb, bool namespaces);
int rf_report_ready(struct rf_channel *ch, int cgroup_dir);

/* ---- nest.c -------------------------------------------------------------------------------------------------- */

/* Puts init where the capabilities of the plan count for the command, and only there. After the tree was entered. */
int rf_nest(const struct rf_plan *p, const struct rf_launch *l, struct rf_error *e);

/* ---- spawn.c ------------------------------------------------------------------------------------------------- */

/* Starts the command of `x` under `p`. 0 with *pid, or -1 with the error of whatever step failed in the child. */
int rf_spawn(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, pid_t *pid, struct rf_readback *rb,
             struct rf_error *e);
/* A command between clone and exec. It runs in init's memory, and both look at this. */
struct rf_start {
    const struct rf_plan *plan;
    const struct rf_exec *exec;
    const int *fds;
    unsigned nfds;
    struct rf_readback *readback;
    struct rf_error *error;
    bool failed, restricted; /* restricted: it has read itself back */
};
/* What the new process does; it never returns. */
_Noreturn void rf_start_command(struct rf_start *s);
/* Whether a command of which clone has returned is one: 0, or -1 with it reaped. */
int rf_started(pid_t pid, const struct rf_start *s);
/* notify.c: the same for a command whose filter has a listener. It was sent, in LISTENER, before this returns. */
int rf_spawn_watched(const struct rf_plan *p, const struct rf_exec *x, const int *fds, unsigned nfds, pid_t *pid,
                     struct rf_readback *rb, struct rf_error *e);
/* SIGKILL to every process of `uid`, at once. `killer`: the real uid meanwhile, one of the sandbox's own that nothing runs as. */
int rf_kill_uid(uint32_t uid, uint32_t killer, struct rf_error *e);
/* Which of a slot's ids those are. */
#define RF_KILLER_INIT 65532u
#define RF_KILLER_LAUNCHER 65533u
/* SIGKILL to every descendant of this process, by /proc, but `n` children and their own. For a subreaper that has no
 * better means. `spared`: where the first one's pid is; the next is `stride` bytes on. */
void rf_kill_descendants(const pid_t *spared, size_t stride, unsigned n);
/* ---- prefork.c: a command's process, made before the command is known ------------------------------------------------- */

#define RF_PREFORK_MAX (64u << 10)
struct rf_prefork { pid_t pid; int socket; }; /* pid 0: there is none */
/* Starts one under `p`, or doesn't. `buf` (RF_PREFORK_MAX bytes) and `x` are its to use, in its own copy of memory. */
void rf_prefork_make(struct rf_prefork *st, const struct rf_plan *p, uint8_t *buf, struct rf_exec *x);
/* Has it execute what an EXEC payload says: 1, or -1 with the error of what failed. 0 where there is none that could. */
int rf_prefork_exec(struct rf_prefork *st, const uint8_t *payload, size_t n, const int *fds, unsigned nfds, pid_t *pid, struct rf_readback *rb,
                 struct rf_error *e);
void rf_prefork_drop(struct rf_prefork *st); /* ends it */
void rf_prefork_gone(struct rf_prefork *st); /* it was reaped */

/* clone3 without CLONE_VM: returns 0 in the child, the pid in the parent. */
pid_t rf_clone(uint64_t flags, int *pidfd);

/* join.c: the same into the namespaces that the launch joins, and with its clocks; the child is the caller's. `proc`: /proc.
 * -1 with the error of whoever went ahead. */
pid_t rf_clone_elsewhere(int proc, const struct rf_launch *l, struct rf_error *e);

/* ---- sockets.c: sockets of a sandbox's network namespace, for those who stay outside --------------------------- */

/* Serves what has come on `fd`, a packet each: u32 domain, type, protocol. The answer is i32 errno, and with 0 the new
 * socket; AF_UNSPEC asks for the tap instead, which is given away then. 0 at the end of `fd`. */
int rf_sockets_serve(int fd, int *tap);
/* Lets every user of this network namespace, which is ours alone, listen on every port. */
void rf_sockets_any_port(void);

/* card.c: a tap in this process's network namespace. `dir`: the folder of the node tun. Its descriptor, or -1. */
#define RF_TAP "tap0"
int rf_tap_make(int dir, struct rf_error *e);
/* In a guest: gives eth0 its addresses and routes, and brings it up. */
int rf_card_up(const struct rf_card *c, struct rf_error *e);

/* Brings up lo of this process's network namespace. */
int rf_loopback_up(struct rf_error *e);

/* ---- init.c, launcher.c, guest.c, files.c -------------------------------------------------------------------- */

enum rf_where { RF_IN_PROCESS, RF_IN_CONTAINER, RF_IN_GUEST };
/* `go`: where a byte tells that the id maps are written, or -1 where there are none. */
int rf_init_main(int channel_fd, enum rf_where where, const struct rf_launch *l, int go);
/* A signal at the launcher's death. To be asked for anew after each change of ids, which clears it. */
int rf_die_with_parent(const struct rf_launch *l, struct rf_error *e);
/* maps.c. The id maps of the child `pid`, by /proc or, where an unprivileged caller has more than its own id, by newuidmap. */
int rf_write_maps(int proc, pid_t pid, const struct rf_launch *l, bool privileged, struct rf_error *e);
/* What has subordinate ids is removed by the same maps as it was made. Kept of the first launch that has such. */
struct rf_maps { char uid[1024], gid[1024]; };
int rf_remember_maps(const struct rf_launch *l, bool privileged, struct rf_maps *m);
void rf_remove_mapped(int proc, const struct rf_maps *m, int parent, const char *name);

/* users.c. Becomes id 0 of the user namespace, once the launcher has written its maps and told so by `go`; or the first id of
 * one that was joined. What is made from here on has owners. */
int rf_init_ids(const struct rf_launch *l, int *go, struct rf_error *e);
/* Gives all in a work directory to the command's user: to whom they belong outside. For when nothing runs there any more. */
void rf_give_back(const char *workdir, uint32_t uid, uint32_t gid);
/* Gives up what an init without a user namespace doesn't need. */
int rf_init_limit(struct rf_error *e);
/* ids: what sandboxes are run as, where Python found all that it takes to change ids and mounts on the host; else NULL. */
int rf_launcher_main(int socket_fd, const struct rf_ids *ids);
int rf_guest_main(void);
/* Loads the modules of a set, if the initramfs has any of that name. */
int rf_guest_modules(const char *set, struct rf_error *e);
/* disk.c. DISK with a source: finds the file system on that disk, and makes the names at its top in the tree. Without one:
 * shows what these names hold. */
int rf_disk_open(int *root, const struct rf_mount *m, struct rf_layer *l, struct rf_error *e);
int rf_disk_show(int *root, const struct rf_mount *m, struct rf_layer *l, struct rf_error *e);
/* ahead.c. What a guest has made before its plan came, or -1 and false: its commands' cgroup, the random pool, init's own
 * program. */
struct rf_ahead { int cgroup, random, program; bool loopback; };
void rf_guest_ahead(struct rf_ahead *a);
/* One part of it: a descriptor, or -1. */
int rf_guest_cgroup(struct rf_error *e);
int rf_guest_random(struct rf_error *e);
/* warm.c. What init's own program does as a command that warms a guest up. */
int rf_warm_main(void);
/* Limits that cgroup, and fills in the plan's cgroup and CPU descriptors. */
int rf_guest_limits(struct rf_plan *p, struct rf_ahead *a, int *cgroup_dir, struct rf_error *e);
/* The wall clock, and a seed for the random pool that is in use at once: what a guest that was restored must have of its own. */
int rf_guest_clock(const struct rf_plan *p, struct rf_ahead *a, struct rf_error *e);

/* Transfers of files of the work directory, over the channel. */
struct rf_transfer { int fd; uint32_t id; uint64_t left; };
int rf_file_put(const char *workdir, const struct rf_frame *f, uint32_t uid, uint32_t gid, struct rf_transfer *t, struct rf_error *e);
int rf_file_data(struct rf_transfer *t, const struct rf_frame *f, struct rf_error *e);
int rf_file_list(struct rf_channel *ch, const char *workdir, uint32_t id, struct rf_error *e);
int rf_file_read(struct rf_channel *ch, const char *workdir, const struct rf_frame *f, struct rf_error *e);

/* ---- remove.c: each as far as it can, for a launcher that nobody listens to any more ------------------------- */

void rf_remove_tree(int parent, const char *name);
/* A cgroup with its children. Who is still in one of them is killed. */
void rf_remove_cgroup(int parent, const char *name);
/* Lets go on what was frozen in the children of a cgroup, which version 1 doesn't let die before. */
void rf_thaw_cgroups(int parent, const char *name);
/* A leaf of cgroup v2 that this process itself is in. */
void rf_remove_leaf(int parent, const char *name);

/* ---- small helpers (error.c) --------------------------------------------------------------------------------- */

uint64_t rf_monotonic_ns(void);
int rf_write_all(int fd, const void *data, size_t n);
/* Decimal text of `v` into `buf` (at least 21 bytes); returns buf. */
char *rf_decimal(char *buf, uint64_t v);
/* The number that follows the text `key`, or that a small file begins with where key is NULL; -1 where there is none. */
int rf_read_number(int fd, const char *key, uint64_t *v);
