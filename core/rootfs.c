/* The file tree of a sandbox: a tmpfs (or a clone of a ready tree) that the steps of the plan fill, then pivot_root.
 *
 * Everything goes by descriptor: open_tree, fsopen, mount_setattr and move_mount (Linux 5.12), and targets are resolved
 * by openat2 beneath the new root, so neither a symlink of the image nor a name swapped under way leads out of it. */
#include "rf.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#endif
#define RF_AT_RECURSIVE 0x8000 /* AT_RECURSIVE, which older headers lack */
#define RF_MNT_DETACH 2
#define RF_MS_PRIVATE (1 << 18)

static int fail(struct rf_error *e, const char *call, const char *detail) { return rf_fail(e, "mounts", call, detail); }

int rf_open_in(int root, const char *path, int flags) {
    struct open_how how = {.flags = (uint32_t)(flags | O_CLOEXEC), .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

static int attributes(int fd, const struct mount_attr *attr, bool recursive) {
    unsigned how = AT_EMPTY_PATH | (recursive ? RF_AT_RECURSIVE : 0);
    return (int)syscall(SYS_mount_setattr, fd, "", how, attr, sizeof *attr);
}

/* A clone of a shared mount is its peer: what is then mounted below would appear on the host too. Never that. */
int rf_mount_private(int fd, bool recursive) {
    struct mount_attr attr = {.propagation = RF_MS_PRIVATE};
    return attributes(fd, &attr, recursive);
}

/* A detached, private copy of the mount at a path. */
int rf_mount_clone(int dir, const char *path, uint16_t how) {
    bool recursive = how & RF_M_RECURSIVE;
    unsigned flags = OPEN_TREE_CLONE | O_CLOEXEC | (path[0] ? 0 : AT_EMPTY_PATH) | (recursive ? RF_AT_RECURSIVE : 0) |
                     ((how & RF_M_NOFOLLOW) ? AT_SYMLINK_NOFOLLOW : 0);
    int fd = (int)syscall(SYS_open_tree, dir, path, flags);
    if (fd < 0 || rf_mount_private(fd, recursive) == 0) return fd;
    int err = errno;
    close(fd);
    errno = err;
    return -1;
}

/* The flags that we hand in have the values of MOUNT_ATTR_RDONLY, NOSUID, NODEV and NOEXEC. */
int rf_mount_set(int fd, uint16_t flags) {
    struct mount_attr attr = {.attr_set = flags & RF_M_ATTRS};
    return attr.attr_set ? attributes(fd, &attr, flags & RF_M_RECURSIVE) : 0;
}

int rf_mount_attach(int mount, int target) {
    return (int)syscall(SYS_move_mount, mount, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

/* Hands the options "key=value,flag,…" to a file system context one by one. */
static int configure(int fs, const char *options) {
    char buf[512];
    if (strlen(options) >= sizeof buf) {
        errno = E2BIG;
        return -1;
    }
    strcpy(buf, options);
    char *save = NULL;
    for (char *o = strtok_r(buf, ",", &save); o; o = strtok_r(NULL, ",", &save)) {
        char *value = strchr(o, '=');
        if (value) *value++ = 0;
        unsigned cmd = value ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG;
        if (syscall(SYS_fsconfig, fs, cmd, o, value, 0) < 0) return -1;
    }
    return 0;
}

/* A new, detached mount of a file system. */
int rf_mount_new(const char *fstype, const char *source, const char *options, uint16_t flags, struct rf_error *e) {
    int fs = (int)syscall(SYS_fsopen, fstype, FSOPEN_CLOEXEC);
    if (fs < 0) return fail(e, "fsopen", fstype);
    int mount = -1;
    if (source[0] && syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "source", source, 0) < 0) fail(e, "fsconfig source", source);
    else if (configure(fs, options) < 0) fail(e, "fsconfig", options);
    else if (syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0) fail(e, "fsconfig create", fstype);
    else if ((mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, flags & RF_M_ATTRS)) < 0) fail(e, "fsmount", fstype);
    close(fs);
    return mount;
}

/* Opens the directory that holds `path`, and tells where its last name begins. */
static int open_parent(int root, const char *path, const char **name) {
    char dir[4096];
    const char *slash = strrchr(path, '/');
    size_t n = slash ? (size_t)(slash - path) : 0;
    if (n >= sizeof dir) {
        errno = ENAMETOOLONG;
        return -1;
    }
    *name = slash ? slash + 1 : path;
    memcpy(dir, path, n);
    dir[n] = 0;
    return rf_open_in(root, n ? dir : "/", O_PATH | O_DIRECTORY);
}

static int make_entry(int root, const struct rf_mount *m, struct rf_error *e) {
    const char *name;
    int parent = open_parent(root, m->target, &name);
    if (parent < 0) return fail(e, "openat2", m->target);
    int r = 0;
    if (m->kind == RF_DIR) {
        r = mkdirat(parent, name, m->mode); /* whole, as the umask is 0; fchmodat would follow who swaps it for a link */
    } else if (m->kind == RF_SYMLINK) {
        r = symlinkat(m->source, parent, name);
    } else {
        int fd = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, m->mode);
        if (fd < 0 || rf_write_all(fd, m->data, strlen(m->data)) < 0) r = -1;
        if (fd >= 0) close(fd);
    }
    int err = errno;
    close(parent);
    errno = err;
    /* Another step, or the image, may have made it already; what matters is that it's there. */
    if (r < 0 && err != EEXIST) return fail(e, m->kind == RF_DIR ? "mkdirat" : m->kind == RF_SYMLINK ? "symlinkat" : "openat", m->target);
    return 0;
}

/* A clone of what an earlier step has put into the tree. */
static int clone_inside(int root, const struct rf_mount *m, struct rf_error *e) {
    int source = rf_open_in(root, m->source, O_PATH);
    int copy = source < 0 ? -1 : rf_mount_clone(source, "", m->flags);
    if (copy < 0) fail(e, source < 0 ? "openat2" : "open_tree", m->source);
    if (source >= 0) close(source);
    return copy;
}

/* Puts a detached mount, which is given up, in its place. */
/* A symlink of an image may lead a mount anywhere in the tree, but not over proc: what is read back would be the mount's own
 * files then, and the masks would be below it. Nor over a device node. */
static int check_target(int target, const char *path, struct rf_error *e) {
    struct statfs fs;
    struct stat st;
    if (fstatfs(target, &fs) < 0 || fstat(target, &st) < 0) return fail(e, "fstatfs", path);
    if (fs.f_type == PROC_SUPER_MAGIC) return rf_fail_errno(e, EPERM, "mounts", "a target in proc", path);
    return S_ISDIR(st.st_mode) || S_ISREG(st.st_mode) ? 0 : rf_fail_errno(e, EPERM, "mounts", "neither a folder nor a file", path);
}

static int bind(int root, const struct rf_mount *m, int mount, struct rf_error *e) {
    int target = rf_open_in(root, m->target, O_PATH);
    int r = target < 0 ? fail(e, "openat2", m->target) : check_target(target, m->target, e);
    if (r < 0) {
        if (target >= 0) close(target);
        close(mount);
        return r;
    }
    if (rf_mount_private(mount, m->flags & RF_M_RECURSIVE) < 0) r = fail(e, "mount_setattr private", m->target); /* one from Python */
    else if (rf_mount_set(mount, m->flags) < 0) r = fail(e, "mount_setattr", m->target);
    else if (rf_mount_attach(mount, target) < 0) r = fail(e, "move_mount", m->target);
    close(target);
    close(mount);
    return r;
}

static int mount_fs(int root, const struct rf_mount *m, struct rf_error *e) {
    int target = rf_open_in(root, m->target, O_PATH | O_DIRECTORY);
    if (target < 0) return fail(e, "openat2", m->target);
    int r = -1, mount = check_target(target, m->target, e) < 0 ? -1 : rf_mount_new(m->fstype, m->source, m->data, m->flags, e);
    if (mount >= 0) {
        r = rf_mount_attach(mount, target) < 0 ? fail(e, "move_mount", m->target) : 0;
        close(mount);
    }
    close(target);
    return r;
}

/* Hides a path: /dev/null over a file, an empty read-only directory over a directory (as OCI's maskedPaths). */
int rf_mount_mask(int root, const char *path, struct rf_error *e) {
    int target = rf_open_in(root, path, O_PATH);
    if (target < 0) return errno == ENOENT || errno == ENOTDIR ? 0 : fail(e, "openat2", path);
    struct stat st;
    int mount = -1, r = -1;
    if (fstat(target, &st) < 0) fail(e, "fstat", path);
    else if (S_ISDIR(st.st_mode)) mount = rf_mount_new("tmpfs", "", "size=4k,nr_inodes=2,mode=0555", RF_M_ATTRS, e);
    else {
        int null = rf_open_in(root, "/dev/null", O_PATH);
        mount = null < 0 ? -1 : rf_mount_clone(null, "", 0);
        if (mount < 0) fail(e, "open_tree", "/dev/null");
        if (null >= 0) close(null);
    }
    if (mount >= 0) {
        r = rf_mount_attach(mount, target) < 0 ? fail(e, "move_mount", path) : 0;
        close(mount);
    }
    close(target);
    return r;
}

static int make_readonly(int root, const struct rf_mount *m, struct rf_error *e) {
    if (strcmp(m->target, "/") == 0) return rf_mount_set(root, RF_M_RDONLY) < 0 ? fail(e, "mount_setattr", "/") : 0;
    int target = rf_open_in(root, m->target, O_PATH);
    if (target < 0) return errno == ENOENT || errno == ENOTDIR ? 0 : fail(e, "openat2", m->target);
    int r = -1, copy = rf_mount_clone(target, "", RF_M_RECURSIVE);
    if (copy < 0) fail(e, "open_tree", m->target);
    else if (rf_mount_set(copy, RF_M_RDONLY | RF_M_RECURSIVE) < 0) fail(e, "mount_setattr", m->target);
    else r = rf_mount_attach(copy, target) < 0 ? fail(e, "move_mount", m->target) : 0;
    if (copy >= 0) close(copy);
    close(target);
    return r;
}

/* Whether nothing is there that could be mounted over: what is masked outside is a device here. */
static bool is_missing(int root, const char *target) {
    struct stat st;
    int fd = rf_open_in(root, target, O_PATH);
    if (fd < 0) return errno == ENOENT;
    bool other = fstat(fd, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode);
    close(fd);
    return other;
}

static int bind_step(int root, const struct rf_mount *m, struct rf_error *e) {
    bool inside = m->flags & RF_M_INSIDE;
    int mount = inside ? clone_inside(root, m, e) : m->fd;
    if (mount < 0) return inside ? -1 : 0; /* 0: optional, and not there */
    if ((m->flags & RF_M_OPTIONAL) && is_missing(root, m->target)) return close(mount), 0;
    return bind(root, m, mount, e);
}

/* With the target "/" what was made until now is the lower layer of the root that there is from here on. */
static int overlay_step(int *root, const struct rf_mount *m, struct rf_layer *l, struct rf_error *e) {
    if (!l || l->fd < 0) return rf_fail_errno(e, EPROTO, "layer", "overlay", "without a layer");
    bool whole = strcmp(m->target, "/") == 0;
    int lower = whole ? *root : (m->flags & RF_M_INSIDE) ? clone_inside(*root, m, e) : m->fd;
    if (lower < 0) return e->err ? -1 : rf_fail_errno(e, ENOENT, "layer", "open_tree", m->target);
    if (!whole && rf_mount_private(lower, true) < 0) return fail(e, "mount_setattr private", m->target);
    if (!whole && rf_mount_set(lower, RF_M_RDONLY | RF_M_NOSUID | RF_M_NODEV | RF_M_RECURSIVE) < 0) return fail(e, "mount_setattr", m->target);
    int mount = rf_layer_overlay(l, lower, m->target, e);
    if (mount < 0) return -1;
    close(lower);
    if (!whole) {
        if (bind(*root, m, mount, e) < 0) return -1;
        return m->data[0] ? rf_layer_hide_private(l, *root, m->data, e) : 0;
    }
    int hang = rf_layer_hang(l, e);
    int r = hang < 0 ? -1 : rf_mount_attach(mount, hang) < 0 ? fail(e, "move_mount", "/") : 0;
    if (hang >= 0) close(hang);
    *root = mount;
    return r;
}

static int place_step(int root, const struct rf_mount *m, struct rf_layer *l, struct rf_error *e) {
    if (!l || l->fd < 0) return rf_fail_errno(e, EPROTO, "layer", "place", "without a layer");
    int mount = rf_layer_place(l, m, e);
    return mount < 0 ? -1 : bind(root, m, mount, e);
}

int rf_tree_step(int *root, const struct rf_mount *m, struct rf_layer *l, struct rf_error *e) {
    switch (m->kind) {
    case RF_DIR:
    case RF_SYMLINK:
    case RF_FILE: return make_entry(*root, m, e);
    case RF_BIND: return bind_step(*root, m, e);
    case RF_FS: return mount_fs(*root, m, e);
    case RF_MASK: return rf_mount_mask(*root, m->target, e);
    case RF_READONLY: return make_readonly(*root, m, e);
    case RF_OVERLAY: return overlay_step(root, m, l, e);
    case RF_PLACE: return place_step(*root, m, l, e);
    case RF_DISK: return l ? (m->source[0] ? rf_disk_open : rf_disk_show)(root, m, l, e) : rf_fail_errno(e, EPROTO, "disk", "step", "without a layer");
    default: return rf_fail_errno(e, EPROTO, "layer", "step", "a layer comes first");
    }
}

static int clone_real(const char *path, uint16_t flags) {
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS};
    int source = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    if (source < 0) return -1;
    int copy = rf_mount_clone(source, "", flags);
    int err = errno;
    close(source);
    errno = err;
    return copy;
}

/* A detached clone of what a BIND step names by path; -1 with errno ENOENT tolerated where the step is optional. */
static int open_source(struct rf_mount *m, struct rf_error *e) {
    if ((m->kind != RF_BIND && m->kind != RF_LAYER && m->kind != RF_OVERLAY) || m->fd >= 0 || !m->source[0] || (m->flags & RF_M_INSIDE)) return 0;
    /* An image's: no symlink is on its way but one that somebody has put there since it was looked at. */
    bool real = m->kind == RF_OVERLAY || (m->flags & RF_M_NOFOLLOW);
    m->fd = real ? clone_real(m->source, m->flags) : rf_mount_clone(AT_FDCWD, m->source, m->flags);
    if (m->fd >= 0 || ((m->flags & RF_M_OPTIONAL) && errno == ENOENT)) return 0;
    return fail(e, "open_tree", m->source);
}

/* The root as a tmpfs, or as a clone of a ready tree where the first step is a BIND on "/"; attached nowhere yet. */
static int new_root(const struct rf_mount *first, const char *options, struct rf_error *e) {
    if (!first) return rf_mount_new("tmpfs", "", options, RF_M_NOSUID | RF_M_NODEV, e);
    int root = first->fd;
    if (root < 0) return rf_fail_errno(e, ENOENT, "mounts", "open_tree", "/");
    if (rf_mount_private(root, first->flags & RF_M_RECURSIVE) < 0) return fail(e, "mount_setattr private", "/");
    return rf_mount_set(root, first->flags) < 0 ? fail(e, "mount_setattr", "/") : root;
}

int rf_tree_build(const struct rf_mount *m, unsigned n, const char *at, const char *options, struct rf_layer *l, struct rf_error *e) {
    struct rf_mount tree[RF_MOUNTS_MAX];
    if (n > RF_LEN(tree)) return rf_fail_errno(e, E2BIG, "mounts", "steps", "");
    memcpy(tree, m, n * sizeof *m);
    /* The sources first: once the new root hangs on `at`, a path through there leads into it. */
    for (unsigned i = 0; i < n; i++)
        if (open_source(&tree[i], e) < 0) return -1;
    unsigned next = 0;
    if (l && n > 0 && tree[0].kind == RF_LAYER && rf_layer_open(l, &tree[next++], tree[0].fd, at, e) < 0) return -1;
    bool ready = n > next && tree[next].kind == RF_BIND && strcmp(tree[next].target, "/") == 0;
    int root = new_root(ready ? &tree[next++] : NULL, options, e);
    if (root < 0) return -1;
    int hang = l && l->fd >= 0 ? rf_layer_hang(l, e) : open(at, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (hang < 0) return e->err ? -1 : fail(e, "open", at);
    if (rf_mount_attach(root, hang) < 0) return fail(e, "move_mount", at);
    close(hang);
    for (; next < n; next++)
        if (rf_tree_step(&root, &tree[next], l, e) < 0) return -1;
    return root;
}

int rf_tree_enter(int root, struct rf_error *e) {
    if (fchdir(root) < 0) return fail(e, "fchdir", "new root");
    /* Both arguments "." stack the old root on the new one, where one lazy unmount takes it off (pivot_root(2)). */
    if (syscall(SYS_pivot_root, ".", ".") < 0) return fail(e, "pivot_root", ".");
    if (syscall(SYS_umount2, ".", RF_MNT_DETACH) < 0) return fail(e, "umount2", ".");
    return chdir("/") < 0 ? fail(e, "chdir", "/") : 0;
}

int rf_tree_switch(int root, struct rf_error *e) {
    /* The initramfs can't be pivoted away from: move the tree over it and chroot, as switch_root(8) does. */
    if (fchdir(root) < 0) return fail(e, "fchdir", "new root");
    int old = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (old < 0) return fail(e, "open", "/");
    int r = rf_mount_attach(root, old);
    close(old);
    if (r < 0) return fail(e, "move_mount", "/");
    if (chroot(".") < 0) return fail(e, "chroot", ".");
    return chdir("/") < 0 ? fail(e, "chdir", "/") : 0;
}
