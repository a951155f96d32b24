/* Who a sandbox's init is, once it is in its user namespace, or in none. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int become(const struct rf_launch *l, uint64_t uid, uint64_t gid, struct rf_error *e) {
    char text[21];
    if (syscall(SYS_setresgid, gid, gid, gid) < 0) return rf_fail(e, "user namespace", "setresgid", rf_decimal(text, gid));
    if (syscall(SYS_setresuid, uid, uid, uid) < 0) return rf_fail(e, "user namespace", "setresuid", rf_decimal(text, uid));
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0) return rf_fail(e, "user namespace", "prctl", "PR_SET_DUMPABLE");
    return rf_die_with_parent(l, e);
}

/* The first id that a joined user namespace has. */
static int first_id(const char *map, uint64_t *id, struct rf_error *e) {
    int fd = open(map, O_RDONLY | O_CLOEXEC);
    int r = fd < 0 ? -1 : rf_read_number(fd, NULL, id);
    if (fd >= 0) close(fd);
    return r < 0 ? rf_fail_errno(e, EINVAL, "user namespace", "read", map) : 0;
}

int rf_init_ids(const struct rf_launch *l, int *go, struct rf_error *e) {
    if (l->joins_user) {
        uint64_t uid = 0, gid = 0;
        if (first_id("/proc/self/uid_map", &uid, e) < 0 || first_id("/proc/self/gid_map", &gid, e) < 0) return -1;
        return become(l, uid, gid, e);
    }
    if (*go < 0) return 0;
    char ready;
    if (read(*go, &ready, 1) != 1) return rf_fail_errno(e, ECANCELED, "user namespace", "read", "the launcher gave up");
    close(*go);
    *go = -1;
    /* The first id that the maps have inside: 0, or the only one. */
    return become(l, strtoul(l->uid_map, NULL, 10), strtoul(l->gid_map, NULL, 10), e);
}

/* An init without a user namespace is root on the host. From here on it needs to start, to limit and to kill commands; it
 * gives up what reaches the kernel, devices, the network, other processes' memory. */
int rf_init_limit(struct rf_error *e) {
    static const unsigned kept[] = {CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_ADMIN, CAP_SYS_RESOURCE};
    struct __user_cap_header_struct h = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct d[2];
    if (syscall(SYS_capget, &h, d) < 0) return rf_fail(e, "capabilities", "capget", "init");
    uint32_t keep = 0;
    for (size_t i = 0; i < RF_LEN(kept); i++) keep |= 1u << kept[i];
    keep &= d[0].permitted; /* root of a container may lack one from the beginning */
    d[0] = (struct __user_cap_data_struct){.effective = keep, .permitted = keep};
    d[1] = (struct __user_cap_data_struct){0};
    return syscall(SYS_capset, &h, d) < 0 ? rf_fail(e, "capabilities", "capset", "init") : 0;
}

#define DEPTH_MAX 200 /* directories that are held open at once */

/* Moves what lies too deep up to `top`, by a name that the workload could not foresee. */
static bool move_up(int dir, const char *name, int top) {
    char up[64];
    uint64_t random[2];
    if (getrandom(random, sizeof random, 0) != sizeof random) return false;
    snprintf(up, sizeof up, ".deep-%016llx%016llx", (unsigned long long)random[0], (unsigned long long)random[1]);
    return renameat(dir, name, top, up) == 0;
}

/* True where something was moved up: another round is needed. Takes `dir`. */
static bool give_all(int dir, int top, uint32_t uid, uint32_t gid, unsigned depth) {
    if (fchown(dir, uid, gid) < 0) { /* the file system's to refuse; what can't be given is left to the launcher */ }
    DIR *d = fdopendir(dir);
    if (!d) {
        close(dir);
        return false;
    }
    bool moved = false;
    for (struct dirent *entry; (entry = readdir(d));) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) continue;
        struct stat st;
        if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0) continue;
        if (!S_ISDIR(st.st_mode)) {
            if ((st.st_uid != uid || st.st_gid != gid) && fchownat(dir, name, uid, gid, AT_SYMLINK_NOFOLLOW) < 0) continue;
        } else if (depth == DEPTH_MAX) {
            moved |= move_up(dir, name, top);
        } else {
            int below = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            if (below >= 0) moved |= give_all(below, top, uid, gid, depth + 1);
        }
    }
    closedir(d);
    return moved;
}

void rf_give_back(const char *workdir, uint32_t uid, uint32_t gid) {
    int top = open(workdir, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (top < 0) return;
    for (int round = 0, dir; round < 1000 && (dir = openat(top, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) >= 0; round++)
        if (!give_all(dir, top, uid, gid, 0)) break;
    close(top);
}
