/* What a guest has behind it when its plan comes: what is the same for every plan. A template is saved after it, so no
 * guest that is restored has to do it, nor QEMU to translate the kernel's code for it. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static int put(int dir, const char *file, const char *text, struct rf_error *e) {
    int fd = openat(dir, file, O_WRONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : write(fd, text, strlen(text));
    int r = n < 0 ? rf_fail(e, "cgroup", "write", file) : 0;
    if (fd >= 0) close(fd);
    return r;
}

int rf_guest_cgroup(struct rf_error *e) {
    int top = open("/cgroup", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top < 0) return rf_fail(e, "cgroup", "open", "/cgroup");
    int dir = -1;
    if (put(top, "cgroup.subtree_control", "+memory +pids +cpu", e) == 0) {
        if (mkdirat(top, "sandbox", 0755) < 0 && errno != EEXIST) rf_fail(e, "cgroup", "mkdir", "sandbox");
        else if ((dir = openat(top, "sandbox", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0) rf_fail(e, "cgroup", "open", "sandbox");
    }
    close(top);
    return dir;
}

int rf_guest_random(struct rf_error *e) {
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    return fd < 0 ? rf_fail(e, "guest", "open", "/dev/urandom") : fd;
}

static void put_value(const char *folder, const char *disk, const char *file, const char *text) {
    char path[300];
    snprintf(path, sizeof path, "%s/%.32s/queue/%s", folder, disk, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    if (write(fd, text, strlen(text)) < 0) errno = 0; /* it is slower then */
    close(fd);
}

/* The host orders and delays what is asked of its disks; to do so twice takes a worker's help for each request. */
static void ask_disks_directly(void) {
    static const char folder[] = "/sys/block";
    DIR *d = opendir(folder);
    if (!d) return;
    for (struct dirent *one; (one = readdir(d));) {
        if (strncmp(one->d_name, "vd", 2) != 0) continue;
        put_value(folder, one->d_name, "scheduler", "none");
        put_value(folder, one->d_name, "wbt_lat_usec", "0");
    }
    closedir(d);
}

/* Above what a command puts in its place. */
static int own_program(void) {
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    int high = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 2 * RF_FDS_MAX);
    if (fd >= 0) close(fd);
    return high;
}

/* What fails here is tried again with the plan, and told then. */
void rf_guest_ahead(struct rf_ahead *a) {
    struct rf_error ignored = {0};
    a->cgroup = rf_guest_cgroup(&ignored);
    a->random = rf_guest_random(&ignored);
    a->program = own_program();
    a->loopback = rf_loopback_up(&ignored) == 0;
    ask_disks_directly();
}

/* ---- limits: cgroup v2 of the guest's own ---- */

static int put_number(int dir, const char *file, uint64_t v, struct rf_error *e) {
    char text[21];
    return v ? put(dir, file, rf_decimal(text, v), e) : 0;
}

int rf_guest_limits(struct rf_plan *p, struct rf_ahead *a, int *cgroup_dir, struct rf_error *e) {
    if (!p->has_guest_limits) return 0;
    if (a->cgroup < 0 && (a->cgroup = rf_guest_cgroup(e)) < 0) return -1;
    int dir = a->cgroup;
    if (put_number(dir, "memory.max", p->guest_memory, e) < 0 || put_number(dir, "pids.max", p->guest_pids, e) < 0) return -1;
    if (p->guest_cpu_ns) {
        char text[64];
        snprintf(text, sizeof text, "%llu 100000", (unsigned long long)(p->guest_cpu_ns / 1000));
        if (put(dir, "cpu.max", text, e) < 0) return -1;
    }
    int procs = openat(dir, "cgroup.procs", O_WRONLY | O_CLOEXEC);
    if (procs < 0 || p->ncgroups == RF_CGROUPS_MAX) return rf_fail(e, "cgroup", "open", "cgroup.procs");
    p->cgroup_fds[p->ncgroups++] = procs;
    p->cpu_fd = openat(dir, "cpu.stat", O_RDONLY | O_CLOEXEC);
    if (p->cpu_fd < 0) return rf_fail(e, "cgroup", "open", "cpu.stat");
    *cgroup_dir = dir;
    return 0;
}
