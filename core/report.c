/* What init reports of a command: what is in force when it has started, what it used when it has ended. */
#include "rf.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t nanoseconds(struct timeval now, struct timeval before) {
    int64_t us = (int64_t)(now.tv_sec - before.tv_sec) * 1000000 + (now.tv_usec - before.tv_usec);
    return us < 0 ? 0 : (uint64_t)us * 1000;
}

/* A number of the guest's cgroup; 0 where the file is missing or says "max" instead. */
static uint64_t guest_number(int cgroup_dir, const char *file, const char *key) {
    uint64_t v = 0;
    int fd = cgroup_dir < 0 ? -1 : openat(cgroup_dir, file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    if (rf_read_number(fd, key, &v) < 0) v = 0;
    close(fd);
    return v;
}

/* The same as an attribute, in units of `scale`; none where the kernel doesn't tell. */
static void put_guest_number(int cgroup_dir, struct rf_writer *w, uint16_t tag, const char *file, const char *key, uint64_t scale) {
    uint64_t v;
    int fd = openat(cgroup_dir, file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    if (rf_read_number(fd, key, &v) == 0 && v <= UINT64_MAX / scale) rf_put_u64(w, tag, v * scale);
    close(fd);
}

static uint64_t blocks(long now, long before) { return now > before ? (uint64_t)(now - before) * 512 : 0; }

int rf_report_exited(struct rf_channel *ch, const struct rf_ending *end) {
    int cgroup_dir = end->cgroup_dir;
    struct rusage now;
    getrusage(RUSAGE_CHILDREN, &now);
    uint8_t buf[512];
    struct rf_writer w = {.buf = buf, .capacity = sizeof buf};
    bool signaled = WIFSIGNALED(end->status);
    rf_put_u32(&w, 1, signaled ? 2 : 1);
    rf_put_u32(&w, 2, (uint32_t)(signaled ? WTERMSIG(end->status) : WEXITSTATUS(end->status)));
    rf_put_u64(&w, 3, nanoseconds(now.ru_utime, end->before->ru_utime));
    rf_put_u64(&w, 4, nanoseconds(now.ru_stime, end->before->ru_stime));
    rf_put_u64(&w, 5, (uint64_t)now.ru_maxrss * 1024);
    rf_put_u32(&w, 6, end->reason);
    rf_put_u64(&w, 9, end->reaped_ns);
    rf_put_u64(&w, 10, blocks(now.ru_inblock, end->before->ru_inblock));
    rf_put_u64(&w, 11, blocks(now.ru_oublock, end->before->ru_oublock));
    if (cgroup_dir >= 0) {
        rf_put_u64(&w, 7, guest_number(cgroup_dir, "memory.events", "oom_kill "));
        put_guest_number(cgroup_dir, &w, 8, "memory.peak", NULL, 1); /* Linux 5.19 */
        put_guest_number(cgroup_dir, &w, 12, "pids.peak", NULL, 1);  /* Linux 6.1 */
        put_guest_number(cgroup_dir, &w, 13, "cpu.stat", "throttled_usec ", 1000);
        /* The first line is "some ... total=", in microseconds. */
        put_guest_number(cgroup_dir, &w, 14, "memory.pressure", "total=", 1000);
        put_guest_number(cgroup_dir, &w, 15, "cpu.pressure", "total=", 1000);
        put_guest_number(cgroup_dir, &w, 16, "io.pressure", "total=", 1000);
    }
    return rf_channel_send(ch, RF_EXITED, end->id, buf, w.length);
}

/* Of each namespace but the cgroup's, which the command has made for itself, init is in the command's own. To read them
 * now, while the command runs already, costs it nothing. */
static size_t read_namespaces(const struct rf_readback *rb, char *buf, size_t capacity) {
    static const char *const names[] = {"user", "mnt", "pid", "net", "ipc", "uts", "time"};
    size_t used = strlen(rb->cgroup_namespace);
    if (used) memcpy(buf, rb->cgroup_namespace, ++used);
    for (size_t i = 0; i < RF_LEN(names); i++) {
        char path[32];
        snprintf(path, sizeof path, "/proc/self/ns/%s", names[i]);
        ssize_t n = readlink(path, buf + used, capacity - used - 1);
        if (n <= 0 || (size_t)n >= capacity - used - 1) continue; /* an absent one is told by its absence */
        buf[used + (size_t)n] = 0;
        used += (size_t)n + 1;
    }
    return used;
}

int rf_report_started(struct rf_channel *ch, uint32_t id, pid_t pid, const struct rf_readback *rb, bool namespaces) {
    uint8_t buf[2048];
    struct rf_writer w = {.buf = buf, .capacity = sizeof buf};
    rf_put_u32(&w, 1, (uint32_t)pid);
    rf_put(&w, 2, rb->caps, sizeof rb->caps);
    rf_put(&w, 3, rb->ids, sizeof rb->ids);
    rf_put_u32(&w, 4, rb->no_new_privs);
    rf_put_u32(&w, 5, rb->seccomp);
    char names[512];
    rf_put(&w, 6, names, namespaces ? read_namespaces(rb, names, sizeof names) : 0);
    for (unsigned i = 0; i < rb->nrlimits; i++) {
        uint8_t r[24] = {0};
        memcpy(r, &rb->rlimits[i].resource, 4);
        memcpy(r + 8, &rb->rlimits[i].soft, 8);
        memcpy(r + 16, &rb->rlimits[i].hard, 8);
        rf_put(&w, 7, r, sizeof r);
    }
    rf_put_u32(&w, 8, rb->landlock);
    rf_put_string(&w, 9, rb->hostname);
    rf_put_string(&w, 10, rb->release);
    rf_put_u64(&w, 11, rb->clock_ns);
    return rf_channel_send(ch, RF_STARTED, id, buf, w.length);
}

/* In a guest, with the limits of its cgroup as read back; 0 is none. */
int rf_report_ready(struct rf_channel *ch, int cgroup_dir) {
    uint8_t buf[64];
    struct rf_writer w = {.buf = buf, .capacity = sizeof buf};
    if (cgroup_dir >= 0) {
        rf_put_u64(&w, 1, guest_number(cgroup_dir, "memory.max", NULL));
        rf_put_u64(&w, 2, guest_number(cgroup_dir, "pids.max", NULL));
        rf_put_u64(&w, 3, guest_number(cgroup_dir, "cpu.max", NULL) * 1000);
    }
    return rf_channel_send(ch, RF_READY, 0, buf, w.length);
}
