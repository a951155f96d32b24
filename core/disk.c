/* A disk of the user's own as a guest's root: finding the file system on it, and what that shows at the top.
 *
 * Everything on the disk is hostile. It is read here and by the guest's kernel, and by nobody outside the guest. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define PARTITIONS_MAX 16
#define NAMES_MAX 200
#define TARGET_MAX 4096

static const char HANG[] = "/disk"; /* on the initramfs, beside the tree that is being made */

/* The file systems that may be a root: the set of modules that each takes has its name. */
static const struct { const char *name; off_t at; const char *magic; size_t length; } file_systems[] = {
    {"ext4", 1080, "\x53\xef", 2}, {"erofs", 1024, "\xe2\xe1\xf5\xe0", 4}, {"squashfs", 0, "hsqs", 4},
    {"xfs", 0, "XFSB", 4},         {"btrfs", 65600, "_BHRfS_M", 8},
};

static int fail(struct rf_error *e, const char *call, const char *detail) { return rf_fail(e, "disk", call, detail); }

static const char *file_system_of(const char *device) {
    int fd = open(device, O_RDONLY | O_CLOEXEC);
    const char *found = NULL;
    for (size_t i = 0; fd >= 0 && !found && i < RF_LEN(file_systems); i++) {
        char bytes[8];
        size_t n = file_systems[i].length;
        if (pread(fd, bytes, n, file_systems[i].at) == (ssize_t)n && memcmp(bytes, file_systems[i].magic, n) == 0) found = file_systems[i].name;
    }
    if (fd >= 0) close(fd);
    return found;
}

static bool has_directory(int mount, const char *name) {
    int fd = rf_open_in(mount, name, O_PATH | O_DIRECTORY);
    if (fd >= 0) close(fd);
    return fd >= 0;
}

/* A detached mount of what is on `device`; -1 where there is nothing. Never repaired: the disk can't be written to, so a
 * journal that has to be replayed is an error (EROFS). */
static int mount_device(const char *device, bool partition, struct rf_error *e) {
    const char *type = file_system_of(device);
    if (!type) return -1;
    if (rf_guest_modules(type, e) < 0) return -1;
    int mount = rf_mount_new(type, device, "ro", RF_M_RDONLY | RF_M_NOSUID | RF_M_NODEV, e);
    /* One of several is the root only if it looks like one: others are /boot, /home, swap. */
    if (mount >= 0 && partition && !has_directory(mount, "usr") && !has_directory(mount, "bin")) {
        close(mount);
        mount = -1;
    }
    return mount;
}

/* The whole disk, else the first of its partitions that holds a root. An error of one on the way is told only where
 * there is none. */
static int find_root(const char *disk, struct rf_error *e) {
    int fd = open(disk, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail(e, "open", disk);
    ioctl(fd, BLKRRPART, 0); /* where the kernel looked before the disk was there; an error says that it has none */
    close(fd);
    int mount = mount_device(disk, false, e);
    if (mount >= 0 || e->err) return mount;
    struct rf_error met = {0};
    for (unsigned i = 1; i <= PARTITIONS_MAX; i++) {
        char device[64];
        struct rf_error here = {0};
        snprintf(device, sizeof device, "%s%u", disk, i);
        mount = mount_device(device, true, &here);
        if (mount >= 0) return mount;
        if (here.err && !met.err) met = here;
    }
    if (!met.err) rf_fail_errno(&met, ENODEV, "disk", "file system", "no ext4, xfs, btrfs, erofs or squashfs on it, or none with /usr or /bin");
    *e = met;
    return -1;
}

/* ---- what it shows at the top ---- */

/* Whether `name` is one of a comma-separated list. */
static bool listed(const char *list, const char *name) {
    size_t n = strlen(name);
    for (const char *at = list; *at;) {
        size_t word = strcspn(at, ",");
        if (word == n && memcmp(at, name, n) == 0) return true;
        at += word + (at[word] == ',');
    }
    return false;
}

static int note_name(struct rf_disk *d, const char *name, const struct stat *st, struct rf_error *e) {
    if (d->nnames == RF_DISK_NAMES_MAX) return rf_fail_errno(e, E2BIG, "disk", "names", "more than 40 folders and files at its top");
    struct rf_disk_name *one = &d->names[d->nnames++];
    int n = snprintf(one->target, sizeof one->target, "/%s", name);
    if (n < 0 || (size_t)n >= sizeof one->target) return rf_fail_errno(e, ENAMETOOLONG, "disk", "names", name);
    one->directory = S_ISDIR(st->st_mode);
    return 0;
}

/* One name at the top becomes the same in the tree; of a folder or a file what it holds is shown later. */
static int make_name(int *root, struct rf_layer *l, int top, const char *name, struct rf_error *e) {
    struct stat st;
    char target[300], link[TARGET_MAX + 1];
    if (fstatat(top, name, &st, AT_SYMLINK_NOFOLLOW) < 0) return fail(e, "fstatat", name);
    struct rf_mount m = {.kind = RF_DIR, .mode = 0755, .fd = -1, .source = "", .fstype = "", .target = target, .data = ""};
    snprintf(target, sizeof target, "/%s", name);
    if (S_ISLNK(st.st_mode)) {
        ssize_t n = readlinkat(top, name, link, TARGET_MAX);
        if (n <= 0) return n < 0 ? fail(e, "readlinkat", name) : 0;
        link[n] = 0;
        m.kind = RF_SYMLINK;
        m.source = link;
    } else if (S_ISREG(st.st_mode) || S_ISDIR(st.st_mode)) {
        if (note_name(&l->disk, name, &st, e) < 0) return -1;
        m.kind = S_ISDIR(st.st_mode) ? RF_DIR : RF_FILE;
        if (m.kind == RF_FILE) m.mode = 0644;
    } else {
        return 0; /* sockets, FIFOs and devices at the top of an image have no use in a sandbox */
    }
    return rf_tree_step(root, &m, l, e);
}

static int make_names(int *root, const struct rf_mount *m, struct rf_layer *l, struct rf_error *e) {
    int top = open(HANG, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = top < 0 ? NULL : fdopendir(top);
    if (!d) {
        if (top >= 0) close(top);
        return fail(e, "open", HANG);
    }
    unsigned seen = 0;
    int r = 0;
    for (struct dirent *entry; r == 0 && (entry = readdir(d));) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || listed(m->data, name)) continue;
        if (++seen > NAMES_MAX) r = rf_fail_errno(e, E2BIG, "disk", "names", "more than 200 entries at its top");
        else r = make_name(root, l, dirfd(d), name, e);
    }
    closedir(d);
    return r;
}

int rf_disk_open(int *root, const struct rf_mount *m, struct rf_layer *l, struct rf_error *e) {
    int mount = find_root(m->source, e);
    if (mount < 0) return -1;
    mkdir(HANG, 0700);
    int hang = open(HANG, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int r = hang < 0 ? fail(e, "open", HANG) : rf_mount_attach(mount, hang) < 0 ? fail(e, "move_mount", HANG) : 0;
    if (hang >= 0) close(hang);
    close(mount);
    return r < 0 ? -1 : make_names(root, m, l, e);
}

int rf_disk_show(int *root, const struct rf_mount *m, struct rf_layer *l, struct rf_error *e) {
    for (unsigned i = 0; i < l->disk.nnames; i++) {
        const struct rf_disk_name *one = &l->disk.names[i];
        char path[sizeof HANG + sizeof one->target];
        snprintf(path, sizeof path, "%s%s", HANG, one->target);
        bool overlay = m->mode && one->directory;
        struct rf_mount step = {
            .kind = overlay ? RF_OVERLAY : RF_BIND, .flags = RF_M_NOSUID | RF_M_NODEV, .source = "", .fstype = "", .data = ""};
        if (!overlay) step.flags |= RF_M_RDONLY;
        step.target = one->target;
        step.fd = rf_mount_clone(AT_FDCWD, path, RF_M_NOFOLLOW);
        if (step.fd < 0) return fail(e, "open_tree", one->target);
        if (rf_tree_step(root, &step, l, e) < 0) return -1;
    }
    return 0;
}
