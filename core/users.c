/* Who a sandbox's init is, once it is in its user namespace, or in none. */
#include "rf.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <stdlib.h>
#include <sys/prctl.h>
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
