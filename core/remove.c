/* Removing what Python has left: trees that a workload filled, and cgroups. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define DEPTH_MAX 200 /* directories that a removal holds open at once */

/* A folder that an unprivileged caller's workload has closed to its own user. By what was opened, as fchmodat(2) follows
 * a symlink that took the name. */
static int open_closed(int dir, const char *name) {
    int held = openat(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (held < 0) return -1;
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", held);
    int r = chmod(path, 0700) < 0 ? -1 : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    close(held);
    return r;
}

/* Removes all below `dir`, and what lies deeper than DEPTH_MAX only after moving it up to `top`: a workload may have
 * made a tree deeper than the descriptors that we may hold. */
static int empty_tree(int dir, int top, unsigned depth) {
    int copy = fcntl(dir, F_DUPFD_CLOEXEC, 0);
    DIR *d = copy < 0 ? NULL : fdopendir(copy);
    if (!d) {
        if (copy >= 0) close(copy);
        return -1;
    }
    rewinddir(d); /* a copy of a descriptor shares its position: another round would see only what came meanwhile */
    int moved = 0;
    for (struct dirent *entry; (entry = readdir(d));) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) continue;
        if (unlinkat(dir, name, 0) == 0) continue;
        int child = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (child < 0 && errno == EACCES) child = open_closed(dir, name);
        if (child < 0) continue;
        if (depth < DEPTH_MAX) {
            int r = empty_tree(child, top, depth + 1);
            if (r > 0) moved = 1;
        } else {
            /* By a name that the workload could not foresee, and so not take. */
            char up[64];
            uint64_t random[2];
            if (getrandom(random, sizeof random, 0) == sizeof random) {
                snprintf(up, sizeof up, ".rf-%016llx%016llx", (unsigned long long)random[0], (unsigned long long)random[1]);
                if (renameat(dir, name, top, up) == 0) moved = 1;
            }
        }
        close(child);
        unlinkat(dir, name, AT_REMOVEDIR);
    }
    closedir(d);
    return moved;
}

void rf_remove_tree(int parent, const char *name) {
    int top = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (top >= 0) {
        for (int round = 0; round < 1000 && empty_tree(top, top, 0) > 0; round++) continue;
        close(top);
    }
    unlinkat(parent, name, AT_REMOVEDIR);
}

static ssize_t read_file(int dir, const char *file, char *buf, size_t n) {
    int fd = openat(dir, file, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, buf, n - 1);
    if (fd >= 0) close(fd);
    buf[got < 0 ? 0 : got] = 0;
    return got;
}

static void write_file(int dir, const char *file, const char *text) {
    int fd = openat(dir, file, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    if (write(fd, text, strlen(text)) < 0) { /* a process that has ended meanwhile, or a controller in use */ }
    close(fd);
}

#define AT_ONCE 64

static unsigned read_processes(int dir, int *pids) {
    char text[AT_ONCE * 12], *save = NULL;
    unsigned n = 0;
    if (read_file(dir, "cgroup.procs", text, sizeof text) <= 0) return 0;
    for (char *word = strtok_r(text, "\n", &save); word && n < AT_ONCE; word = strtok_r(NULL, "\n", &save)) pids[n++] = atoi(word);
    return n;
}

/* Whoever is still in a cgroup of ours when everything was ended was left behind by an init and a launcher that were both
 * killed. A number read from a cgroup can be another process's by the time that it is opened: it is killed only if it is
 * in the cgroup after that. */
static void kill_members(int parent, const char *name) {
    int before[AT_ONCE], after[AT_ONCE], held[AT_ONCE];
    int dir = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0) return;
    unsigned n = read_processes(dir, before);
    for (unsigned i = 0; i < n; i++) held[i] = before[i] > 0 ? (int)syscall(SYS_pidfd_open, before[i], 0) : -1;
    unsigned m = read_processes(dir, after);
    for (unsigned i = 0; i < n; i++) {
        for (unsigned j = 0; j < m && held[i] >= 0; j++)
            if (after[j] == before[i]) syscall(SYS_pidfd_send_signal, held[i], SIGKILL, NULL, 0);
        if (held[i] >= 0) close(held[i]);
    }
    close(dir);
}

/* A cgroup holds its last process for a moment after that process was reaped. */
static void remove_cgroup_dir(int parent, const char *name) {
    for (int i = 0; i < 500 && unlinkat(parent, name, AT_REMOVEDIR) < 0 && errno == EBUSY; i++) {
        kill_members(parent, name);
        struct timespec pause = {.tv_nsec = 2000000};
        nanosleep(&pause, NULL);
    }
}

static void remove_cgroups(int parent, const char *name, unsigned depth) {
    int dir = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0) return;
    DIR *d = fdopendir(dir);
    if (!d) {
        close(dir);
        return;
    }
    for (struct dirent *entry; (entry = readdir(d));)
        if (entry->d_type == DT_DIR && entry->d_name[0] != '.' && depth < 8) remove_cgroups(dirfd(d), entry->d_name, depth + 1);
    closedir(d);
    remove_cgroup_dir(parent, name);
}

void rf_remove_cgroup(int parent, const char *name) { remove_cgroups(parent, name, 0); }

void rf_thaw_cgroups(int parent, const char *name) {
    int dir = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0) return;
    int base = fcntl(dir, F_DUPFD_CLOEXEC, 0);
    DIR *d = fdopendir(dir);
    if (!d) close(dir);
    for (struct dirent *entry; d && base >= 0 && (entry = readdir(d));) {
        char file[300];
        if (entry->d_type != DT_DIR || entry->d_name[0] == '.') continue;
        snprintf(file, sizeof file, "%s/freezer.state", entry->d_name);
        write_file(base, file, "THAWED"); /* version 1 */
        snprintf(file, sizeof file, "%s/cgroup.freeze", entry->d_name);
        write_file(base, file, "0");
    }
    if (d) closedir(d);
    if (base >= 0) close(base);
}

/* On cgroup v2 Python went down into a leaf of its own cgroup, with all its children, us included, as a cgroup that hands
 * out controllers may hold no process. What is left of them goes up again, and the leaf away. */
void rf_remove_leaf(int parent, const char *name) {
    char text[4096], *save = NULL;
    int leaf = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (leaf < 0 || read_file(parent, "cgroup.subtree_control", text, sizeof text) < 0) {
        if (leaf >= 0) close(leaf);
        return;
    }
    for (char *word = strtok_r(text, " \n", &save); word; word = strtok_r(NULL, " \n", &save)) {
        char off[64];
        snprintf(off, sizeof off, "-%s", word);
        write_file(parent, "cgroup.subtree_control", off);
    }
    for (int round = 0; round < 100 && read_file(leaf, "cgroup.procs", text, sizeof text) > 0; round++)
        for (char *pid = strtok_r(text, "\n", &save); pid; pid = strtok_r(NULL, "\n", &save)) write_file(parent, "cgroup.procs", pid);
    close(leaf);
    for (int i = 0; i < 500 && unlinkat(parent, name, AT_REMOVEDIR) < 0 && errno == EBUSY; i++) nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
}
