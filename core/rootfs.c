/* The file tree of a sandbox: a tmpfs (or a clone of a ready tree) that the steps of the plan fill, then pivot_root.
 *
 * Everything goes by descriptor: open_tree, fsopen, mount_setattr and move_mount (Linux 5.12), and targets are resolved
 * by openat2 beneath the new root, so neither a symlink of the image nor a name swapped under way leads out of it. */
#include "rf.h"

#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#endif
#define RF_AT_RECURSIVE 0x8000 /* AT_RECURSIVE, which older headers lack */
#define RF_MNT_DETACH 2
#define RF_MS_PRIVATE (1 << 18)

static int fail(struct rf_error *e, const char *call, const char *detail) { return rf_fail(e, "mounts", call, detail); }

static int open_in(int root, const char *path, int flags) {
    struct open_how how = {.flags = (uint32_t)(flags | O_CLOEXEC), .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

static int attributes(int fd, const struct mount_attr *attr, bool recursive) {
    unsigned how = AT_EMPTY_PATH | (recursive ? RF_AT_RECURSIVE : 0);
    return (int)syscall(SYS_mount_setattr, fd, "", how, attr, sizeof *attr);
}

/* A clone of a shared mount is its peer: what is then mounted below would appear on the host too. Never that. */
static int make_private(int fd, bool recursive) {
    struct mount_attr attr = {.propagation = RF_MS_PRIVATE};
    return attributes(fd, &attr, recursive);
}

/* A detached, private copy of the mount at a path. */
static int clone_tree(int dir, const char *path, bool recursive) {
    unsigned flags = OPEN_TREE_CLONE | O_CLOEXEC | (path[0] ? 0 : AT_EMPTY_PATH) | (recursive ? RF_AT_RECURSIVE : 0);
    int fd = (int)syscall(SYS_open_tree, dir, path, flags);
    if (fd < 0 || make_private(fd, recursive) == 0) return fd;
    int err = errno;
    close(fd);
    errno = err;
    return -1;
}

/* The flags that we hand in have the values of MOUNT_ATTR_RDONLY, NOSUID, NODEV and NOEXEC. */
static int set_attributes(int fd, uint16_t flags) {
    struct mount_attr attr = {.attr_set = flags & RF_M_ATTRS};
    return attr.attr_set ? attributes(fd, &attr, flags & RF_M_RECURSIVE) : 0;
}

static int attach(int mount, int target) {
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
static int new_mount(const char *fstype, const char *source, const char *options, uint16_t flags, struct rf_error *e) {
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
    return open_in(root, n ? dir : "/", O_PATH | O_DIRECTORY);
}

static int make_entry(int root, const struct rf_mount *m, struct rf_error *e) {
    const char *name;
    int parent = open_parent(root, m->target, &name);
    if (parent < 0) return fail(e, "openat2", m->target);
    int r = 0;
    if (m->kind == RF_DIR) {
        r = mkdirat(parent, name, m->mode);
        if (r == 0) r = fchmodat(parent, name, m->mode, 0); /* the umask is not ours to trust */
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
    int source = open_in(root, m->source, O_PATH);
    int copy = source < 0 ? -1 : clone_tree(source, "", m->flags & RF_M_RECURSIVE);
    if (copy < 0) fail(e, source < 0 ? "openat2" : "open_tree", m->source);
    if (source >= 0) close(source);
    return copy;
}

static int bind(int root, const struct rf_mount *m, struct rf_error *e) {
    int mount = (m->flags & RF_M_INSIDE) ? clone_inside(root, m, e) : m->fd;
    if (mount < 0) return (m->flags & RF_M_INSIDE) ? -1 : 0; /* 0: optional, and not there */
    int target = open_in(root, m->target, O_PATH);
    int r = 0;
    if (target < 0) r = fail(e, "openat2", m->target);
    else if (make_private(mount, m->flags & RF_M_RECURSIVE) < 0) r = fail(e, "mount_setattr private", m->target); /* one from Python */
    else if (set_attributes(mount, m->flags) < 0) r = fail(e, "mount_setattr", m->target);
    else if (attach(mount, target) < 0) r = fail(e, "move_mount", m->target);
    if (target >= 0) close(target);
    close(mount);
    return r;
}

static int mount_fs(int root, const struct rf_mount *m, struct rf_error *e) {
    int target = open_in(root, m->target, O_PATH | O_DIRECTORY);
    if (target < 0) return fail(e, "openat2", m->target);
    int r = -1, mount = new_mount(m->fstype, m->source, m->data, m->flags, e);
    if (mount >= 0) {
        r = attach(mount, target) < 0 ? fail(e, "move_mount", m->target) : 0;
        close(mount);
    }
    close(target);
    return r;
}

/* Hides a path: /dev/null over a file, an empty read-only directory over a directory (as OCI's maskedPaths). */
static int mask(int root, const struct rf_mount *m, struct rf_error *e) {
    int target = open_in(root, m->target, O_PATH);
    if (target < 0) return errno == ENOENT || errno == ENOTDIR ? 0 : fail(e, "openat2", m->target);
    struct stat st;
    int mount = -1, r = -1;
    if (fstat(target, &st) < 0) fail(e, "fstat", m->target);
    else if (S_ISDIR(st.st_mode)) mount = new_mount("tmpfs", "", "size=4k,nr_inodes=2,mode=0555", RF_M_ATTRS, e);
    else {
        int null = open_in(root, "/dev/null", O_PATH);
        mount = null < 0 ? -1 : clone_tree(null, "", false);
        if (mount < 0) fail(e, "open_tree", "/dev/null");
        if (null >= 0) close(null);
    }
    if (mount >= 0) {
        r = attach(mount, target) < 0 ? fail(e, "move_mount", m->target) : 0;
        close(mount);
    }
    close(target);
    return r;
}

static int make_readonly(int root, const struct rf_mount *m, struct rf_error *e) {
    if (strcmp(m->target, "/") == 0) return set_attributes(root, RF_M_RDONLY) < 0 ? fail(e, "mount_setattr", "/") : 0;
    int target = open_in(root, m->target, O_PATH);
    if (target < 0) return errno == ENOENT || errno == ENOTDIR ? 0 : fail(e, "openat2", m->target);
    int r = -1, copy = clone_tree(target, "", true);
    if (copy < 0) fail(e, "open_tree", m->target);
    else if (set_attributes(copy, RF_M_RDONLY | RF_M_RECURSIVE) < 0) fail(e, "mount_setattr", m->target);
    else r = attach(copy, target) < 0 ? fail(e, "move_mount", m->target) : 0;
    if (copy >= 0) close(copy);
    close(target);
    return r;
}

static int step(int root, const struct rf_mount *m, struct rf_error *e) {
    switch (m->kind) {
    case RF_DIR:
    case RF_SYMLINK:
    case RF_FILE: return make_entry(root, m, e);
    case RF_BIND: return bind(root, m, e);
    case RF_FS: return mount_fs(root, m, e);
    case RF_MASK: return mask(root, m, e);
    default: return make_readonly(root, m, e);
    }
}

/* A detached clone of what a BIND step names by path; -1 with errno ENOENT tolerated where the step is optional. */
static int open_source(struct rf_mount *m, struct rf_error *e) {
    if (m->kind != RF_BIND || m->fd >= 0 || (m->flags & RF_M_INSIDE)) return 0;
    m->fd = clone_tree(AT_FDCWD, m->source, m->flags & RF_M_RECURSIVE);
    if (m->fd >= 0 || ((m->flags & RF_M_OPTIONAL) && errno == ENOENT)) return 0;
    return fail(e, "open_tree", m->source);
}

int rf_tree_build(const struct rf_mount *m, unsigned n, const char *at, const char *options, struct rf_error *e) {
    struct rf_mount tree[RF_MOUNTS_MAX];
    if (n > RF_LEN(tree)) return rf_fail_errno(e, E2BIG, "mounts", "steps", "");
    memcpy(tree, m, n * sizeof *m);
    /* The sources first: once the new root hangs on `at`, a path through there leads into it. */
    for (unsigned i = 0; i < n; i++)
        if (open_source(&tree[i], e) < 0) return -1;
    unsigned first = 0;
    int root;
    if (n > 0 && tree[0].kind == RF_BIND && strcmp(tree[0].target, "/") == 0) {
        root = tree[0].fd;
        first = 1;
        if (root >= 0 && make_private(root, tree[0].flags & RF_M_RECURSIVE) < 0) return fail(e, "mount_setattr private", "/");
        if (root >= 0 && set_attributes(root, tree[0].flags) < 0) return fail(e, "mount_setattr", "/");
    } else {
        root = new_mount("tmpfs", "", options, RF_M_NOSUID | RF_M_NODEV, e);
    }
    if (root < 0) return e->err ? -1 : rf_fail_errno(e, ENOENT, "mounts", "open_tree", "/");
    int hang = open(at, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (hang < 0) return fail(e, "open", at);
    if (attach(root, hang) < 0) return fail(e, "move_mount", at);
    close(hang);
    for (unsigned i = first; i < n; i++)
        if (step(root, &tree[i], e) < 0) return -1;
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
    int r = attach(root, old);
    close(old);
    if (r < 0) return fail(e, "move_mount", "/");
    if (chroot(".") < 0) return fail(e, "chroot", ".");
    return chdir("/") < 0 ? fail(e, "chdir", "/") : 0;
}
