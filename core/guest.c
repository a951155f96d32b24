/* What only the init of a guest does: the first mounts, modules, the port, the clock. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int fail(struct rf_error *e, const char *call, const char *detail) { return rf_fail(e, "guest", call, detail); }

static void to_kernel_log(const struct rf_error *e) {
    int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    /* By one write(2). Not dprintf(3): glibc's first asks where the file's end is, which this one refuses (EINVAL). */
    char line[sizeof *e + 64];
    int n = snprintf(line, sizeof line, "<3>ringfence: %s: %s(%s): errno %d\n", e->step, e->call, e->detail, e->err);
    if (n > 0 && write(fd, line, (size_t)n) < 0) n = 0; /* there is nobody else to tell */
    close(fd);
}

static int first_mounts(struct rf_error *e) {
    static const struct { const char *type, *at; } mounts[] = {
        {"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"cgroup2", "/cgroup"},
    };
    mkdir("/new", 0755);
    for (size_t i = 0; i < RF_LEN(mounts); i++) {
        mkdir(mounts[i].at, 0755);
        /* EBUSY: the kernel mounted it already (CONFIG_DEVTMPFS_MOUNT). */
        if (mount(mounts[i].type, mounts[i].at, mounts[i].type, MS_NOSUID, NULL) < 0 && errno != EBUSY) return fail(e, "mount", mounts[i].type);
    }
    return 0;
}

/* Whether `set` is in the comma-separated list that the kernel command line gives as rf.sets=… */
static bool wanted(const char *cmdline, const char *set, size_t n) {
    const char *at = strstr(cmdline, "rf.sets=");
    for (at = at ? at + 8 : NULL; at && *at && *at != ' ' && *at != '\n';) {
        size_t word = strcspn(at, ", \n");
        if (word == n && strncmp(at, set, n) == 0) return true;
        at += word + (at[word] == ',');
    }
    return false;
}

static ssize_t read_text(const char *path, char *buf, size_t n) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    size_t used = 0;
    ssize_t r;
    while (used < n - 1 && (r = read(fd, buf + used, n - 1 - used)) > 0) used += (size_t)r;
    close(fd);
    buf[used] = 0;
    return (ssize_t)used;
}

/* Loads the modules of the sets that are in a comma-separated list after `key`, or of the one set that `key` is.
 * /modules/list: "set file" a line, in the order of their dependencies. */
static int load_modules(const char *key, bool one, struct rf_error *e) {
    char list[8192];
    if (read_text("/modules/list", list, sizeof list) < 0) return fail(e, "open", "/modules/list");
    char *save = NULL;
    for (char *line = strtok_r(list, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *file = strchr(line, ' ');
        if (!file) continue;
        size_t n = (size_t)(file - line);
        if (one ? strlen(key) != n || strncmp(key, line, n) != 0 : !wanted(key, line, n)) continue;
        char path[300];
        snprintf(path, sizeof path, "/modules/%s", file + 1);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) return fail(e, "open", path);
        long r = syscall(SYS_finit_module, fd, "", 0);
        close(fd);
        if (r < 0 && errno != EEXIST) return fail(e, "finit_module", path);
    }
    return 0;
}

int rf_guest_modules(const char *set, struct rf_error *e) { return load_modules(set, true, e); }

static int boot_modules(struct rf_error *e) {
    char cmdline[4096];
    if (read_text("/proc/cmdline", cmdline, sizeof cmdline) < 0) return fail(e, "open", "/proc/cmdline");
    return load_modules(cmdline, false, e);
}

static int find_port(void) {
    DIR *d = opendir("/dev");
    if (!d) return -1;
    int fd = -1;
    for (struct dirent *entry; fd < 0 && (entry = readdir(d));)
        if (strncmp(entry->d_name, "vport", 5) == 0) fd = openat(dirfd(d), entry->d_name, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    closedir(d);
    return fd;
}

/* The port's node comes once the host has answered the driver. */
static int wait_for_port(struct rf_error *e) {
    const uint64_t until_ns = rf_monotonic_ns() + 10000000000u;
    while (rf_monotonic_ns() < until_ns) {
        int fd = find_port();
        if (fd >= 0) return fd;
        struct timespec pause = {.tv_nsec = 500000};
        nanosleep(&pause, NULL);
    }
    return rf_fail_errno(e, ENODEV, "guest", "port", "no virtio-serial port in 10 s");
}

int rf_guest_main(void) {
    struct rf_error e = {0};
    /* A command shares our memory until its exec, already without capabilities: no other one of its uid may touch it. */
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    int port = -1;
    if (first_mounts(&e) == 0 && boot_modules(&e) == 0) port = wait_for_port(&e);
    if (port >= 0) {
        rf_send(port, true, RF_READY, 0, NULL, 0, -1); /* the boot is over: the plan may come, with the clock in it */
        rf_init_main(port, RF_IN_GUEST, NULL, -1);
    } else {
        to_kernel_log(&e);
    }
    reboot(RB_AUTOBOOT); /* QEMU runs with -no-reboot: the host sees it exit, and the log says why */
    return 1;
}

/* ---- clock and random pool ---- */

/* The host knows our clock only about so well. */
#define MEASURED_WITHIN_NS 1000000000

static int set_clock(const struct rf_plan *p, struct rf_error *e) {
    int64_t since_ns = 0;
    if (p->realtime_at_ns) {
        /* A guest that was restored: however long the plan took to get here, our own clock has gone on since. */
        since_ns = (int64_t)(rf_monotonic_ns() - p->realtime_at_ns);
        if (since_ns < -MEASURED_WITHIN_NS) return rf_fail_errno(e, EINVAL, "guest", "clock", "the plan is of the future");
    }
    uint64_t ns = p->realtime_ns + (uint64_t)since_ns;
    struct timespec now = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    return clock_settime(CLOCK_REALTIME, &now) < 0 ? fail(e, "clock_settime", "") : 0;
}

/* Without a seed of its own a guest would have the same random numbers as all others of its template. */
static int seed_pool(const struct rf_plan *p, struct rf_ahead *a, struct rf_error *e) {
    struct {
        int bits, bytes;
        uint8_t seed[512];
    } pool = {.bits = (int)p->entropy_length * 8, .bytes = (int)p->entropy_length};
    memcpy(pool.seed, p->entropy, p->entropy_length);
    if (a->random < 0 && (a->random = rf_guest_random(e)) < 0) return -1;
    if (ioctl(a->random, RNDADDENTROPY, &pool) < 0) return fail(e, "ioctl", "RNDADDENTROPY");
    /* Linux 4.17: use it now, not at the next interval. */
    return ioctl(a->random, RNDRESEEDCRNG) < 0 ? fail(e, "ioctl", "RNDRESEEDCRNG") : 0;
}

int rf_guest_clock(const struct rf_plan *p, struct rf_ahead *a, struct rf_error *e) {
    if (p->realtime_ns && set_clock(p, e) < 0) return -1;
    return p->entropy_length ? seed_pool(p, a, e) : 0;
}
