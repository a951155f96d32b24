/* The second half of `facts`: what the process sees around itself. See probe_facts.c for the conventions. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#include "probe.h"
#include "probe_facts.h"

enum { MAX_PIDS = 4096, MAX_MOUNTS = 256, MAX_ENTRIES = 512, MAX_CPUS = 4096 };

void facts_pids(struct json *json)
{
    DIR *dir = opendir("/proc");
    if (!dir) {
        json_unread(json, "pids", errno);
        json_unread(json, "pid_count", errno);
        return;
    }
    uint64_t count = 0, pid;
    json_open(json, "pids", '[');
    for (struct dirent *entry; (entry = readdir(dir));) {
        if (parse_number(entry->d_name, &pid) < 0)
            continue;
        if (count++ < MAX_PIDS)
            json_unsigned(json, NULL, pid);
    }
    json_close(json, ']');
    closedir(dir);
    json_unsigned(json, "pid_count", count);
    json_file(json, "pid1_comm", "/proc/1/comm");
}

/* mountinfo writes space, tab, newline and backslash as \ooo. */
static void unescape_octal(char *text)
{
    char *to = text;
    for (const char *from = text; *from;) {
        if (from[0] == '\\' && from[1] && from[2] && from[3]) {
            *to++ = (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0'));
            from += 4;
        } else {
            *to++ = *from++;
        }
    }
    *to = '\0';
}

static int is_read_only(const char *options)
{
    return strncmp(options, "ro", 2) == 0 && (options[2] == ',' || options[2] == '\0');
}

/* proc(5): id parent major:minor root mountpoint options [tags…] - fstype source superoptions */
static void one_mount(struct json *json, char *line)
{
    char *fields[6] = {0};
    char *rest = line;
    for (size_t i = 0; i < 6; i++)
        fields[i] = strsep(&rest, " ");
    /* Without tags the dash comes at once. A tag is "name:value", so neither can be taken for the other. */
    char *dash = rest && strncmp(rest, "- ", 2) == 0 ? rest : rest ? strstr(rest, " - ") : NULL;
    if (!dash)
        return;
    char *tail = strchr(dash, '-') + 2;
    char *fstype = strsep(&tail, " ");
    char *source = strsep(&tail, " ");
    char *super_options = strsep(&tail, " \n");
    if (!source || !super_options)
        return;
    unescape_octal(fields[4]);
    unescape_octal(source);
    json_open(json, NULL, '[');
    json_text(json, NULL, fields[4]);
    json_text(json, NULL, fstype);
    json_text(json, NULL, is_read_only(fields[5]) || is_read_only(super_options) ? "ro" : "rw");
    json_text(json, NULL, source);
    json_close(json, ']');
}

void facts_mounts(struct json *json)
{
    FILE *file = fopen("/proc/self/mountinfo", "re");
    if (!file) {
        json_unread(json, "mounts", errno);
        json_unread(json, "mount_count", errno);
        return;
    }
    uint64_t count = 0;
    char *line = NULL;
    size_t size = 0;
    json_open(json, "mounts", '[');
    while (getline(&line, &size, file) > 0) {
        if (count++ < MAX_MOUNTS)
            one_mount(json, line);
    }
    json_close(json, ']');
    free(line);
    fclose(file);
    json_unsigned(json, "mount_count", count);
}

/* How many lines of a file hold `needle`. */
static void line_count(struct json *json, const char *key, const char *path, const char *needle)
{
    FILE *file = fopen(path, "re");
    if (!file) {
        json_unread(json, key, errno);
        return;
    }
    uint64_t count = 0;
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, file) > 0)
        count += strstr(line, needle) != NULL;
    free(line);
    fclose(file);
    json_unsigned(json, key, count);
}

static void one_interface(struct json *json, int sock, const char *name)
{
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    json_open(json, name, '{');
    if (ioctl(sock, SIOCGIFFLAGS, &request) < 0)
        json_unread(json, "up", errno);
    else
        json_bool(json, "up", request.ifr_flags & IFF_UP);
    json_close(json, '}');
}

void facts_network(struct json *json)
{
    FILE *file = fopen("/proc/self/net/dev", "re");
    if (!file) {
        json_unread(json, "interfaces", errno);
    } else {
        /* Any family's socket answers SIOCGIFFLAGS, and AF_UNIX is there even without a network. */
        int sock = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        char line[512];
        json_open(json, "interfaces", '{');
        while (fgets(line, sizeof line, file)) {
            char *colon = strchr(line, ':'); /* none in the two lines of headings */
            if (!colon)
                continue;
            *colon = '\0';
            one_interface(json, sock, line + strspn(line, " "));
        }
        json_close(json, '}');
        if (sock >= 0)
            close(sock);
        fclose(file);
    }
    json_file(json, "routes", "/proc/self/net/route");
    line_count(json, "abstract_socket_count", "/proc/self/net/unix", " @");
}

static void meminfo_bytes(struct json *json, const char *key, const char *meminfo, const char *name)
{
    const char *line = strstr(meminfo, name);
    if (line)
        json_unsigned(json, key, strtoull(line + strlen(name), NULL, 10) * 1024);
    else
        json_unread(json, key, ENODATA);
}

static void cgroup_limits(struct json *json)
{
    /* As a process sees them where it looks first: v2, then v1, at what it takes for the root of the hierarchy. */
    static const char *const files[] = {
        "/sys/fs/cgroup/cgroup.controllers",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/pids.max",
        "/sys/fs/cgroup/cpu.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/pids/pids.max",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    };
    json_open(json, "cgroup_files", '{');
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++)
        json_file(json, files[i], files[i]);
    json_close(json, '}');
}

static void affinity(struct json *json)
{
    cpu_set_t *set = CPU_ALLOC(MAX_CPUS);
    size_t size = CPU_ALLOC_SIZE(MAX_CPUS);
    if (!set || sched_getaffinity(0, size, set) < 0) {
        json_unread(json, "affinity", errno);
    } else {
        json_open(json, "affinity", '[');
        for (unsigned cpu = 0; cpu < MAX_CPUS; cpu++)
            if (CPU_ISSET_S(cpu, size, set))
                json_unsigned(json, NULL, cpu);
        json_close(json, ']');
    }
    CPU_FREE(set);
}

void facts_resources(struct json *json)
{
    char meminfo[8192];
    if (read_text("/proc/meminfo", meminfo, sizeof meminfo) < 0)
        meminfo[0] = '\0';
    meminfo_bytes(json, "memory_total_bytes", meminfo, "MemTotal:");
    meminfo_bytes(json, "memory_available_bytes", meminfo, "MemAvailable:");
    meminfo_bytes(json, "swap_total_bytes", meminfo, "SwapTotal:");
    struct sysinfo info;
    if (sysinfo(&info) < 0) {
        json_unread(json, "sysinfo", errno);
    } else {
        json_open(json, "sysinfo", '{');
        json_unsigned(json, "total_ram_bytes", (uint64_t)info.totalram * info.mem_unit);
        json_unsigned(json, "free_ram_bytes", (uint64_t)info.freeram * info.mem_unit);
        json_signed(json, "uptime_seconds", (int64_t)info.uptime);
        json_unsigned(json, "processes", info.procs);
        json_close(json, '}');
    }
    json_signed(json, "cpus_online", sysconf(_SC_NPROCESSORS_ONLN));
    affinity(json);
    cgroup_limits(json);
}

static void clock_fact(struct json *json, const char *key, clockid_t clock)
{
    struct timespec now;
    if (clock_gettime(clock, &now) < 0)
        json_unread(json, key, errno);
    else
        json_unsigned(json, key, (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
}

void facts_clocks(struct json *json)
{
    clock_fact(json, "realtime_ns", CLOCK_REALTIME);
    clock_fact(json, "monotonic_ns", CLOCK_MONOTONIC);
    clock_fact(json, "boottime_ns", CLOCK_BOOTTIME);
    json_file(json, "timens_offsets", "/proc/self/timens_offsets");
    json_file(json, "clocksource", "/sys/devices/system/clocksource/clocksource0/current_clocksource");
}

static void cpu_identity(struct json *json)
{
#if defined(__x86_64__) || defined(__i386__)
    unsigned a, b, c, d;
    char text[13] = "";
    if (__get_cpuid(0, &a, &b, &c, &d)) {
        memcpy(text, &b, 4), memcpy(text + 4, &d, 4), memcpy(text + 8, &c, 4);
        json_text(json, "cpu_vendor", text);
    }
    int under_hypervisor = __get_cpuid(1, &a, &b, &c, &d) && c >> 31;
    json_bool(json, "hypervisor_bit", under_hypervisor);
    if (under_hypervisor) {
        __cpuid(0x40000000, a, b, c, d); /* the range that hypervisors share */
        memcpy(text, &b, 4), memcpy(text + 4, &c, 4), memcpy(text + 8, &d, 4);
        json_text(json, "hypervisor_vendor", text);
    } else {
        json_null(json, "hypervisor_vendor");
    }
#else
    json_unread(json, "cpu_vendor", EOPNOTSUPP);
    json_unread(json, "hypervisor_bit", EOPNOTSUPP);
    json_unread(json, "hypervisor_vendor", EOPNOTSUPP);
#endif
}

void facts_identity(struct json *json)
{
    json_file(json, "boot_id", "/proc/sys/kernel/random/boot_id");
    json_file(json, "machine_id", "/etc/machine-id");
    cpu_identity(json);
}

static void directory(struct json *json, const char *key, const char *path)
{
    struct dirent **entries;
    int count = scandir(path, &entries, NULL, alphasort);
    if (count < 0) {
        json_unread(json, key, errno);
        return;
    }
    json_open(json, key, '[');
    for (int i = 0; i < count; i++) {
        const char *name = entries[i]->d_name;
        if (i < MAX_ENTRIES && strcmp(name, ".") != 0 && strcmp(name, "..") != 0)
            json_text(json, NULL, name);
        free(entries[i]);
    }
    json_close(json, ']');
    free(entries);
}

void facts_devices(struct json *json)
{
    directory(json, "root_entries", "/");
    directory(json, "dev_entries", "/dev");
    int terminal = open("/dev/tty", O_RDWR | O_NOCTTY | O_CLOEXEC);
    json_bool(json, "controlling_terminal", terminal >= 0);
    if (terminal >= 0)
        close(terminal);
}

void facts_ipc(struct json *json)
{
    struct shm_info info;
    if (shmctl(0, SHM_INFO, (struct shmid_ds *)(void *)&info) < 0)
        json_unread(json, "sysv_shm_segments", errno);
    else
        json_signed(json, "sysv_shm_segments", info.used_ids);
    char description[256];
    long size = syscall(SYS_keyctl, KEYCTL_DESCRIBE, KEY_SPEC_SESSION_KEYRING, description, sizeof description);
    if (size < 0)
        json_unread(json, "session_keyring", errno);
    else
        json_bytes(json, "session_keyring", description,
                   strnlen(description, (size_t)size < sizeof description ? (size_t)size : sizeof description));
    line_count(json, "key_count", "/proc/keys", "");
}

static void try_open(struct json *json, const char *key, const char *path, int flags)
{
    int fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    json_text(json, key, fd < 0 ? errno_name(errno) : "ok");
    if (fd >= 0)
        close(fd);
}

void facts_sensitive(struct json *json)
{
    /* Opened and closed only: no byte is read or written. */
    static const char *const files[] = {
        "/proc/kcore",      "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname",
        "/proc/kallsyms",   "/proc/1/mem",         "/etc/shadow",                   "/dev/mem",
        "/dev/kmsg",        "/dev/kvm",            "/sys/fs/cgroup/cgroup.procs",   "/proc/1/environ",
    };
    json_open(json, "sensitive_files", '{');
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        json_open(json, files[i], '{');
        try_open(json, "read", files[i], O_RDONLY);
        try_open(json, "write", files[i], O_WRONLY);
        json_close(json, '}');
    }
    json_close(json, '}');
}
