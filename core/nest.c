/* What granted capabilities need of namespaces: they count only in those that belong to the sandbox's own user namespace,
 * and must not count in the one that made its mounts. */
#include "rf.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define CAP(c) (1ull << (c))
/* Those that count in the user namespace of a network namespace. */
#define NETWORK (CAP(CAP_NET_BIND_SERVICE) | CAP(CAP_NET_BROADCAST) | CAP(CAP_NET_ADMIN) | CAP(CAP_NET_RAW))

/* An id map (as in /proc/PID/uid_map) as the nested namespace has it: each id that ours has is the same one there. */
static int same_ids(const char *map, char *text, size_t capacity) {
    size_t used = 0;
    unsigned long inside, outside, count;
    for (int n; *map && sscanf(map, "%lu %lu %lu%n", &inside, &outside, &count, &n) == 3; map += n) {
        int w = snprintf(text + used, capacity - used, "%lu %lu %lu\n", inside, inside, count);
        if (w < 0 || (size_t)w >= capacity - used) return -1;
        used += (size_t)w;
    }
    return used ? 0 : -1;
}

static int write_map(pid_t pid, const char *file, const char *map) {
    char path[64], text[1024];
    if (same_ids(map, text, sizeof text) < 0) return -1;
    snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    size_t length = strlen(text);
    ssize_t n = write(fd, text, length); /* a map is written by one write */
    close(fd);
    return n == (ssize_t)length ? 0 : -1;
}

/* Stays behind in the outer user namespace, which alone may write the maps of the inner one. */
static void map_nested(int go, pid_t init, const struct rf_launch *l) {
    char byte;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0 || read(go, &byte, 1) != 1) _exit(1);
    _exit(write_map(init, "uid_map", l->uid_map) < 0 || write_map(init, "gid_map", l->gid_map) < 0 ? 2 : 0);
}

static int enter_nested(uint64_t namespaces, const struct rf_launch *l, struct rf_error *e) {
    int go[2];
    if (pipe2(go, O_CLOEXEC) < 0) return rf_fail(e, "nested namespaces", "pipe2", "");
    pid_t self = getpid(), helper = fork();
    if (helper == 0) {
        close(go[1]);
        map_nested(go[0], self, l);
    }
    close(go[0]);
    int r = helper < 0 ? rf_fail(e, "nested namespaces", "fork", "") : 0;
    if (r == 0 && unshare((int)namespaces) < 0) r = rf_fail(e, "nested namespaces", "unshare", "CLONE_NEWUSER | CLONE_NEWNS");
    if (r == 0 && write(go[1], "1", 1) != 1) r = rf_fail(e, "nested namespaces", "write", "go");
    close(go[1]); /* without its byte the helper ends by itself */
    int status = 0;
    if (helper > 0 && waitpid(helper, &status, 0) != helper && r == 0) r = rf_fail(e, "nested namespaces", "waitpid", "");
    if (r == 0 && status != 0) r = rf_fail_errno(e, EPERM, "nested namespaces", "write", "uid_map, gid_map");
    return r;
}

/* CAP_SYS_ADMIN is power over every mount whose mount namespace belongs to the holder's user namespace: it could take off
 * the masks of /proc and make what is read-only writable. A mount namespace that is copied into another user namespace has
 * its mounts locked together, with their read-only, nodev and nosuid flags (mount_namespaces(7)). So the tree is built in
 * one user namespace, and the command lives in another one below it. The PID namespace stays the outer one's: no new proc
 * can be mounted either. */
static int nest(const struct rf_launch *l, struct rf_error *e) {
    /* The helper opens /proc/1/uid_map, which is ours to write only while we are dumpable. Nothing of the workload runs
     * yet, and outside nobody has our ids. */
    if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) < 0) return rf_fail(e, "nested namespaces", "prctl", "PR_SET_DUMPABLE");
    uint64_t namespaces = CLONE_NEWUSER | CLONE_NEWNS | (l->clone_flags & (CLONE_NEWUTS | CLONE_NEWIPC));
    int r = enter_nested(namespaces, l, e);
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0) return rf_fail(e, "nested namespaces", "prctl", "PR_SET_DUMPABLE");
    return r < 0 ? r : rf_die_with_parent(l, e);
}

int rf_nest(const struct rf_plan *p, const struct rf_launch *l, struct rf_error *e) {
    if ((p->capabilities & CAP(CAP_SYS_ADMIN)) && nest(l, e) < 0) return -1;
    /* The launcher's ready network namespace belongs to the host's user namespace, and one that clone3 made to the outer
     * one. */
    if (!(p->capabilities & NETWORK) || !(l->clone_flags & CLONE_NEWNET)) return 0;
    if (l->own_network && !(p->capabilities & CAP(CAP_SYS_ADMIN))) return 0; /* it belongs to the command's own already */
    if (unshare(CLONE_NEWNET) < 0) return rf_fail(e, "network", "unshare", "CLONE_NEWNET");
    return p->loopback ? rf_loopback_up(e) : 0;
}
