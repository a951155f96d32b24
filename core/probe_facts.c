/* `facts`: one JSON object of all that a process can see of where it runs. This file: about the process itself.
 *
 * A fact that can't be read is null, with its errno's name beside it as NAME_errno. Numbers are decimal, capability
 * and signal sets hex text as in /proc/PID/status, times in nanoseconds, sizes in bytes. Nothing is written or kept.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "probe.h"
#include "probe_facts.h"

enum { STATUS_LIMIT = 16384, MAX_GROUPS = 1024 };

extern char **environ;

void facts_kernel(struct json *json)
{
    struct utsname name;
    if (uname(&name) < 0) {
        json_unread(json, "kernel_release", errno);
        return;
    }
    json_text(json, "kernel_release", name.release);
    json_text(json, "kernel_version", name.version);
    json_text(json, "architecture", name.machine);
    json_text(json, "hostname", name.nodename);
    json_text(json, "domainname", name.domainname);
    json_file(json, "kernel_cmdline", "/proc/cmdline");
}

static void id_quartet(struct json *json, const char *key, uint64_t real, uint64_t effective, uint64_t saved,
                       uint64_t filesystem)
{
    json_open(json, key, '{');
    json_unsigned(json, "real", real);
    json_unsigned(json, "effective", effective);
    json_unsigned(json, "saved", saved);
    json_unsigned(json, "filesystem", filesystem);
    json_close(json, '}');
}

void facts_ids(struct json *json)
{
    uid_t ruid, euid, suid;
    gid_t rgid, egid, sgid, groups[MAX_GROUPS];
    json_signed(json, "pid", getpid());
    json_signed(json, "ppid", getppid());
    json_signed(json, "pgid", getpgrp());
    json_signed(json, "sid", getsid(0));
    getresuid(&ruid, &euid, &suid);
    getresgid(&rgid, &egid, &sgid);
    /* An id of -1 changes nothing; both calls return the one in force. */
    id_quartet(json, "uids", ruid, euid, suid, (uid_t)setfsuid((uid_t)-1));
    id_quartet(json, "gids", rgid, egid, sgid, (gid_t)setfsgid((gid_t)-1));
    int count = getgroups(MAX_GROUPS, groups);
    if (count < 0) {
        json_unread(json, "groups", errno);
    } else {
        json_open(json, "groups", '[');
        for (int i = 0; i < count; i++)
            json_unsigned(json, NULL, groups[i]);
        json_close(json, ']');
    }
    json_file(json, "uid_map", "/proc/self/uid_map");
    json_file(json, "gid_map", "/proc/self/gid_map");
    json_file(json, "setgroups", "/proc/self/setgroups");
    /* Of the first user namespace's root, and shown by the id that it has here, if any: the map above only tells of the
     * user namespace that this one is in. */
    struct stat about;
    if (stat("/proc/version", &about) < 0)
        json_unread(json, "proc_owner", errno);
    else
        json_unsigned(json, "proc_owner", about.st_uid);
}

/* The value of `name` in the text of /proc/self/status, or NULL. */
static const char *status_value(const char *status, const char *name)
{
    size_t length = strlen(name);
    for (const char *line = status; line && *line; line = strchr(line, '\n'), line = line ? line + 1 : NULL)
        if (strncmp(line, name, length) == 0 && line[length] == ':')
            return line + length + 1 + strspn(line + length + 1, " \t");
    return NULL;
}

static int status_text(struct json *json, const char *key, const char *status, const char *name)
{
    const char *value = status_value(status, name);
    if (!value)
        return -1;
    json_bytes(json, key, value, strcspn(value, "\n"));
    return 0;
}

static void hex_set(struct json *json, const char *key, uint64_t set)
{
    char text[17];
    snprintf(text, sizeof text, "%016" PRIx64, set);
    json_text(json, key, text);
}

/* The same from system calls, where /proc isn't mounted. */
static void capabilities_by_call(struct json *json)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) < 0) {
        json_unread(json, "inheritable", errno);
        json_unread(json, "permitted", errno);
        json_unread(json, "effective", errno);
    } else {
        hex_set(json, "inheritable", data[0].inheritable | (uint64_t)data[1].inheritable << 32);
        hex_set(json, "permitted", data[0].permitted | (uint64_t)data[1].permitted << 32);
        hex_set(json, "effective", data[0].effective | (uint64_t)data[1].effective << 32);
    }
    uint64_t bounding = 0, ambient = 0;
    for (unsigned long cap = 0; cap < 64; cap++) {
        bounding |= (uint64_t)(prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1) << cap;
        ambient |= (uint64_t)(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1) << cap;
    }
    hex_set(json, "bounding", bounding);
    hex_set(json, "ambient", ambient);
}

static void capabilities(struct json *json, const char *status)
{
    json_open(json, "capabilities", '{');
    if (!status_value(status, "CapEff")) {
        capabilities_by_call(json);
    } else {
        status_text(json, "inheritable", status, "CapInh");
        status_text(json, "permitted", status, "CapPrm");
        status_text(json, "effective", status, "CapEff");
        status_text(json, "bounding", status, "CapBnd");
        status_text(json, "ambient", status, "CapAmb");
    }
    json_close(json, '}');
}

static void prctl_fact(struct json *json, const char *key, int option)
{
    int value = prctl(option, 0, 0, 0, 0);
    if (value < 0)
        json_unread(json, key, errno);
    else
        json_signed(json, key, value);
}

static void number_from_status(struct json *json, const char *key, const char *status, const char *name)
{
    const char *value = status_value(status, name);
    if (value)
        json_signed(json, key, strtoll(value, NULL, 10));
    else
        json_unread(json, key, ENODATA);
}

void facts_security(struct json *json)
{
    char status[STATUS_LIMIT];
    if (read_text("/proc/self/status", status, sizeof status) < 0)
        status[0] = '\0';
    capabilities(json, status);
    prctl_fact(json, "no_new_privs", PR_GET_NO_NEW_PRIVS);
    prctl_fact(json, "securebits", PR_GET_SECUREBITS);
    prctl_fact(json, "dumpable", PR_GET_DUMPABLE);
    if (status_value(status, "Seccomp"))
        number_from_status(json, "seccomp_mode", status, "Seccomp");
    else
        prctl_fact(json, "seccomp_mode", PR_GET_SECCOMP);
    number_from_status(json, "seccomp_filters", status, "Seccomp_filters"); /* since Linux 5.9 */
    if (status_text(json, "signals_blocked", status, "SigBlk") < 0)
        json_unread(json, "signals_blocked", ENODATA);
    if (status_text(json, "signals_ignored", status, "SigIgn") < 0)
        json_unread(json, "signals_ignored", ENODATA);
    json_file(json, "lsm", "/sys/kernel/security/lsm");
    json_file(json, "lsm_label", "/proc/self/attr/current");
    long abi = syscall(444 /* landlock_create_ruleset */, NULL, 0, 1u /* LANDLOCK_CREATE_RULESET_VERSION */);
    if (abi < 0)
        json_unread(json, "landlock_abi", errno);
    else
        json_signed(json, "landlock_abi", abi);
}

void facts_namespaces(struct json *json)
{
    DIR *dir = opendir("/proc/self/ns");
    if (!dir) {
        json_unread(json, "namespaces", errno);
        return;
    }
    json_open(json, "namespaces", '{');
    for (struct dirent *entry; (entry = readdir(dir));) {
        if (entry->d_name[0] == '.')
            continue;
        char target[64];
        ssize_t n = readlinkat(dirfd(dir), entry->d_name, target, sizeof target - 1);
        if (n < 0) {
            json_unread(json, entry->d_name, errno);
            continue;
        }
        target[n] = '\0'; /* "net:[4026531833]" */
        const char *inode = strchr(target, '[');
        json_unsigned(json, entry->d_name, inode ? strtoull(inode + 1, NULL, 10) : 0);
    }
    json_close(json, '}');
    closedir(dir);
}

static void limits(struct json *json)
{
    static const struct {
        const char *name;
        int resource;
    } all[] = {
        {"as", RLIMIT_AS},           {"core", RLIMIT_CORE},       {"cpu", RLIMIT_CPU},
        {"data", RLIMIT_DATA},       {"fsize", RLIMIT_FSIZE},     {"locks", RLIMIT_LOCKS},
        {"memlock", RLIMIT_MEMLOCK}, {"msgqueue", RLIMIT_MSGQUEUE}, {"nice", RLIMIT_NICE},
        {"nofile", RLIMIT_NOFILE},   {"nproc", RLIMIT_NPROC},     {"rss", RLIMIT_RSS},
        {"rtprio", RLIMIT_RTPRIO},   {"rttime", RLIMIT_RTTIME},   {"sigpending", RLIMIT_SIGPENDING},
        {"stack", RLIMIT_STACK},
    };
    json_open(json, "rlimits", '{');
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        struct rlimit limit;
        if (syscall(SYS_prlimit64, 0, all[i].resource, NULL, &limit) < 0) {
            json_unread(json, all[i].name, errno);
            continue;
        }
        rlim_t pair[] = {limit.rlim_cur, limit.rlim_max};
        json_open(json, all[i].name, '[');
        for (int side = 0; side < 2; side++) {
            if (pair[side] == RLIM_INFINITY)
                json_text(json, NULL, "unlimited");
            else
                json_unsigned(json, NULL, pair[side]);
        }
        json_close(json, ']');
    }
    json_close(json, '}');
}

static void environment_names(struct json *json)
{
    json_open(json, "environment_names", '[');
    for (char **entry = environ; *entry; entry++)
        json_bytes(json, NULL, *entry, strcspn(*entry, "="));
    json_close(json, ']');
}

static void open_fds(struct json *json)
{
    int fds[MAX_FDS];
    int count = list_fds(fds, MAX_FDS);
    json_open(json, "open_fds", '{');
    for (int i = 0; i < count; i++) {
        char number[16], target[4096];
        snprintf(number, sizeof number, "%d", fds[i]);
        fd_target(fds[i], target, sizeof target);
        json_text(json, number, target);
    }
    json_close(json, '}');
}

void facts_process(struct json *json)
{
    char cwd[4096];
    if (getcwd(cwd, sizeof cwd))
        json_text(json, "cwd", cwd);
    else
        json_unread(json, "cwd", errno);
    mode_t mask = umask(077);
    umask(mask);
    json_unsigned(json, "umask", mask);
    json_signed(json, "personality", personality(0xffffffff));
    json_bool(json, "stdin_is_tty", isatty(STDIN_FILENO));
    json_bool(json, "stdout_is_tty", isatty(STDOUT_FILENO));
    json_file(json, "oom_score_adj", "/proc/self/oom_score_adj");
    json_file(json, "cgroup", "/proc/self/cgroup");
    limits(json);
    environment_names(json);
    open_fds(json);
}

int verb_facts(int argc, char **argv)
{
    (void)argc, (void)argv;
    struct json json = {.out = stdout};
    json_open(&json, NULL, '{');
    facts_kernel(&json);
    facts_ids(&json);
    facts_security(&json);
    facts_namespaces(&json);
    facts_process(&json);
    facts_pids(&json);
    facts_mounts(&json);
    facts_network(&json);
    facts_resources(&json);
    facts_clocks(&json);
    facts_identity(&json);
    facts_devices(&json);
    facts_ipc(&json);
    facts_sensitive(&json);
    json_close(&json, '}');
    putchar('\n');
    return PROBE_OK;
}
