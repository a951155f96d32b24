/* The writable layer: one file system, or one directory, that holds all that a workload may write to in its root and in
 * its work directory, so that one size bounds both, and one walk tells what was changed.
 *
 * Overlays are made of names of our own below the layer, relative to the current directory: no path of an image or of
 * the caller is walked for them, and nothing has to be escaped in their options. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define ENTRIES_MAX 65536
#define DEPTH_MAX 64

static int fail(struct rf_error *e, const char *call, const char *detail) { return rf_fail(e, "layer", call, detail); }

static int make_directory(int at, const char *name, mode_t mode, struct rf_error *e) {
    if (mkdirat(at, name, mode) < 0 || fchmodat(at, name, mode, 0) < 0) return fail(e, "mkdirat", name);
    return 0;
}

static int open_directory(int at, const char *name) { return openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC); }

int rf_layer_open(struct rf_layer *l, const struct rf_mount *m, int mount, const char *at, struct rf_error *e) {
    static const char *const names[] = {"root", "lower", "upper", "scratch", "place"};
    if (m->fstype[0]) mount = rf_mount_new(m->fstype, "", m->data, RF_M_NOSUID | RF_M_NODEV, e);
    if (mount < 0) return e->err ? -1 : rf_fail_errno(e, ENOENT, "layer", "open_tree", m->source);
    int hang = open(at, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int r = hang < 0 ? fail(e, "open", at) : 0;
    if (r == 0 && rf_mount_private(mount, false) < 0) r = fail(e, "mount_setattr private", at);
    if (r == 0 && rf_mount_set(mount, RF_M_NOSUID | RF_M_NODEV) < 0) r = fail(e, "mount_setattr", at);
    if (r == 0 && rf_mount_attach(mount, hang) < 0) r = fail(e, "move_mount", at);
    if (hang >= 0) close(hang);
    l->fd = r < 0 ? -1 : open_directory(mount, ".");
    if (r == 0 && l->fd < 0) r = fail(e, "openat", at);
    close(mount);
    for (size_t i = 0; r == 0 && i < RF_LEN(names); i++) r = make_directory(l->fd, names[i], 0755, e);
    return r;
}

int rf_layer_hang(const struct rf_layer *l, struct rf_error *e) {
    int fd = openat(l->fd, "root", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    return fd < 0 ? fail(e, "openat", "root") : fd;
}

static int configure(int fs, const char *key, const char *value) {
    unsigned cmd = value ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG;
    return (int)syscall(SYS_fsconfig, fs, cmd, key, value, 0);
}

/* What of an overlay's files lies where is never to be told by marks that somebody left in a lower layer: neither
 * redirects nor metadata-only files are followed. With userxattr both are off (Documentation/filesystems/overlayfs). */
static int configure_overlay(const struct rf_layer *l, int fs, char *const names[3], struct rf_error *e) {
    static const char *const keys[] = {"lowerdir", "upperdir", "workdir"};
    for (size_t i = 0; i < RF_LEN(keys); i++)
        if (configure(fs, keys[i], names[i]) < 0) return fail(e, "fsconfig", keys[i]);
    if (l->user_namespace) {
        if (configure(fs, "userxattr", NULL) < 0) return fail(e, "fsconfig", "userxattr"); /* Linux 5.11 */
    } else if (configure(fs, "redirect_dir", "nofollow") < 0 || configure(fs, "metacopy", "off") < 0) {
        return fail(e, "fsconfig", "redirect_dir, metacopy");
    }
    if (configure(fs, "index", "off") < 0) return fail(e, "fsconfig", "index");
    /* It is gone with the sandbox: nothing has to reach the disk. */
    if (configure(fs, "volatile", NULL) < 0) return fail(e, "fsconfig", "volatile");
    return 0;
}

static int new_overlay(const struct rf_layer *l, char *const names[3], const char *target, struct rf_error *e) {
    int fs = (int)syscall(SYS_fsopen, "overlay", FSOPEN_CLOEXEC);
    if (fs < 0) return fail(e, "fsopen", "overlay");
    int mount = -1;
    if (fchdir(l->fd) < 0) fail(e, "fchdir", "the layer"); /* the names are relative to it */
    else if (configure_overlay(l, fs, names, e) < 0) mount = -1;
    else if (syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0) fail(e, "fsconfig create overlay", target);
    else if ((mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, RF_M_NOSUID | RF_M_NODEV)) < 0) fail(e, "fsmount overlay", target);
    close(fs);
    return mount;
}

/* The upper directory of an overlay is what is seen of its root: mode and owner have to be the lower one's. */
static int make_upper(const struct rf_layer *l, int lower, const char *name, struct rf_error *e) {
    struct stat st;
    if (fstat(lower, &st) < 0) return fail(e, "fstat", name);
    if (make_directory(l->fd, name, st.st_mode & 07777, e) < 0) return -1;
    /* Ids that the namespace doesn't map can't be given: then it is its root's. */
    if (fchownat(l->fd, name, st.st_uid, st.st_gid, AT_SYMLINK_NOFOLLOW) < 0 && errno != EINVAL && errno != EPERM && errno != EOVERFLOW)
        return fail(e, "fchownat", name);
    return fchmodat(l->fd, name, st.st_mode & 07777, 0) < 0 ? fail(e, "fchmodat", name) : 0;
}

int rf_layer_overlay(struct rf_layer *l, int lower, const char *target, struct rf_error *e) {
    if (l->noverlays == RF_OVERLAYS_MAX) return rf_fail_errno(e, E2BIG, "layer", "overlays", target);
    struct rf_overlay *o = &l->overlays[l->noverlays];
    char names[3][32];
    char *given[3];
    static const char *const parts[] = {"lower", "upper", "scratch"};
    for (size_t i = 0; i < RF_LEN(parts); i++) {
        snprintf(names[i], sizeof names[i], "%s/%u", parts[i], l->noverlays);
        given[i] = names[i];
    }
    if (make_directory(l->fd, names[0], 0755, e) < 0 || make_directory(l->fd, names[2], 0755, e) < 0) return -1;
    int at = openat(l->fd, names[0], O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int r = at < 0 ? fail(e, "openat", names[0]) : rf_mount_attach(lower, at) < 0 ? fail(e, "move_mount", names[0]) : 0;
    if (at >= 0) close(at);
    if (r < 0 || make_upper(l, lower, names[1], e) < 0) return -1;
    int mount = new_overlay(l, given, target, e);
    if (mount < 0) return -1;
    o->target = target;
    o->upper = open_directory(l->fd, names[1]);
    o->lower = open_directory(lower, ".");
    if (o->upper < 0 || o->lower < 0) {
        fail(e, "openat", names[1]);
        close(mount);
        return -1;
    }
    l->noverlays++;
    return mount;
}

int rf_layer_place(struct rf_layer *l, const struct rf_mount *m, struct rf_error *e) {
    char name[32];
    snprintf(name, sizeof name, "place/%u", l->nplaces++);
    if (make_directory(l->fd, name, 0700, e) < 0) return -1;
    if (fchownat(l->fd, name, l->uid, l->gid, AT_SYMLINK_NOFOLLOW) < 0) return fail(e, "fchownat", m->target);
    if (fchmodat(l->fd, name, m->mode, 0) < 0) return fail(e, "fchmodat", m->target);
    int fd = rf_mount_clone(l->fd, name, 0);
    return fd < 0 ? fail(e, "open_tree", m->target) : fd;
}

/* ---- what isn't open to everybody ---- */

static bool is_dot(const char *name) { return strcmp(name, ".") == 0 || strcmp(name, "..") == 0; }

#define PRIVATE_MAX 128

struct hiding {
    int root;
    unsigned seen, hidden;
    char path[4096];
};

static int hide(struct hiding *h, struct rf_error *e) {
    if (h->hidden++ == PRIVATE_MAX) return rf_fail_errno(e, E2BIG, "layer", "more private files than can be hidden", h->path);
    return rf_mount_mask(h->root, h->path, e);
}

static int hide_below(struct hiding *h, int dir, unsigned depth, struct rf_error *e);

static int hide_entry(struct hiding *h, int dir, const char *name, unsigned depth, struct rf_error *e) {
    struct stat st;
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0) return errno == ENOENT ? 0 : fail(e, "fstatat", h->path);
    if (!S_ISDIR(st.st_mode)) return S_ISREG(st.st_mode) && !(st.st_mode & S_IROTH) ? hide(h, e) : 0;
    if ((st.st_mode & (S_IROTH | S_IXOTH)) != (S_IROTH | S_IXOTH) || depth == DEPTH_MAX) return hide(h, e);
    int below = open_directory(dir, name);
    if (below < 0) return errno == ENOENT || errno == ENOTDIR ? 0 : fail(e, "openat", h->path);
    return hide_below(h, below, depth + 1, e);
}

/* Takes `dir`. */
static int hide_below(struct hiding *h, int dir, unsigned depth, struct rf_error *e) {
    DIR *d = fdopendir(dir);
    if (!d) {
        close(dir);
        return fail(e, "fdopendir", h->path);
    }
    size_t base = strlen(h->path);
    int r = 0;
    for (struct dirent *entry; r == 0 && (entry = readdir(d));) {
        if (is_dot(entry->d_name) || entry->d_type == DT_LNK) continue;
        int n = snprintf(h->path + base, sizeof h->path - base, "/%s", entry->d_name);
        if (n < 0 || (size_t)n >= sizeof h->path - base) r = rf_fail_errno(e, ENAMETOOLONG, "layer", "private files", entry->d_name);
        else if (++h->seen > ENTRIES_MAX) r = rf_fail_errno(e, E2BIG, "layer", "more files than are looked through", h->path);
        else r = hide_entry(h, dirfd(d), entry->d_name, depth, e);
        h->path[base] = 0;
    }
    closedir(d);
    return r;
}

int rf_layer_hide_private(const struct rf_layer *l, int root, const char *below, struct rf_error *e) {
    const struct rf_overlay *o = &l->overlays[l->noverlays - 1];
    struct hiding h = {.root = root};
    bool all = strcmp(below, "/") == 0;
    int n = snprintf(h.path, sizeof h.path, "%s%s", o->target, all ? "" : below);
    if (n < 0 || (size_t)n >= sizeof h.path) return rf_fail_errno(e, ENAMETOOLONG, "layer", "private files", below);
    int dir = rf_open_in(o->lower, below, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (dir < 0) return errno == ENOENT || errno == ENOTDIR || errno == ELOOP ? 0 : fail(e, "openat2", h.path);
    return hide_below(&h, dir, 0, e);
}

/* ---- telling ---- */

int rf_layer_sizes(const struct rf_layer *l, const struct rf_mount *m, unsigned n, int root, struct rf_channel *ch, struct rf_error *e) {
    uint8_t buf[RF_CHUNK];
    struct rf_writer w = {.buf = buf, .capacity = sizeof buf};
    for (unsigned i = 0; i < n; i++) {
        if (!(m[i].flags & RF_M_TOLD)) continue;
        struct statfs fs;
        int fd = m[i].kind == RF_LAYER ? dup(l->fd) : rf_open_in(root, m[i].target, O_PATH);
        int r = fd < 0 ? -1 : fstatfs(fd, &fs);
        if (fd >= 0) close(fd);
        if (r < 0) return fail(e, "fstatfs", m[i].target);
        uint8_t one[16 + 4096];
        uint64_t numbers[2] = {(uint64_t)fs.f_blocks * (uint64_t)fs.f_bsize, (uint64_t)fs.f_files};
        size_t length = strlen(m[i].target) + 1;
        if (length > sizeof one - sizeof numbers) return rf_fail_errno(e, ENAMETOOLONG, "layer", "fstatfs", m[i].target);
        memcpy(one, numbers, sizeof numbers);
        memcpy(one + sizeof numbers, m[i].target, length);
        rf_put(&w, 1, one, sizeof numbers + length);
    }
    if (w.full) return rf_fail_errno(e, E2BIG, "layer", "sizes", "");
    if (w.length == 0 && l->fd < 0) return 0;
    return rf_send(ch->fd, ch->port, RF_SIZES, 0, buf, w.length, ch->port ? -1 : l->fd);
}

enum { CREATED = 1, CHANGED = 2, DELETED = 3 };

struct changes {
    struct rf_channel *ch;
    const struct rf_layer *layer;
    uint32_t id;
    unsigned count;
    bool incomplete;
    char path[4096];
    uint8_t buf[RF_CHUNK];
    struct rf_writer w;
};

static void flush_changes(struct changes *c) {
    if (c->w.length) rf_channel_send(c->ch, RF_LAYER_END, c->id, c->buf, c->w.length);
    c->w.length = 0;
    c->w.full = false;
}

static void tell(struct changes *c, uint8_t kind, const struct stat *st) {
    uint8_t one[10 + sizeof c->path];
    size_t length = strlen(c->path) + 1;
    uint64_t size = st && S_ISREG(st->st_mode) ? (uint64_t)st->st_size : 0;
    one[0] = kind;
    one[1] = !st ? 0 : S_ISREG(st->st_mode) ? 'f' : S_ISDIR(st->st_mode) ? 'd' : S_ISLNK(st->st_mode) ? 'l' : 'o';
    memcpy(one + 2, &size, sizeof size);
    memcpy(one + 10, c->path, length);
    if (c->w.length + 8 + 10 + length > sizeof c->buf) flush_changes(c);
    rf_put(&c->w, 2, one, 10 + length);
}

static bool same(const struct stat *a, const struct stat *b) {
    return (a->st_mode & 07777) == (b->st_mode & 07777) && a->st_uid == b->st_uid && a->st_gid == b->st_gid;
}

static bool opaque(const struct changes *c, int dir) {
    char value = 0;
    ssize_t n = fgetxattr(dir, c->layer->user_namespace ? "user.overlay.opaque" : "trusted.overlay.opaque", &value, 1);
    return n == 1 && value == 'y';
}

/* Appends a name to the path; where it ended before, or 0 where it doesn't fit. */
static size_t enter(struct changes *c, const char *name) {
    size_t base = strlen(c->path);
    int n = snprintf(c->path + base, sizeof c->path - base, "/%s", name);
    if (n > 0 && (size_t)n < sizeof c->path - base) return base + 1;
    c->path[base] = 0;
    c->incomplete = true;
    return 0;
}

static bool counted(struct changes *c) {
    if (c->count++ < ENTRIES_MAX) return true;
    c->incomplete = true;
    return false;
}

/* A directory was removed and made anew: of the lower one's entries those are gone that the upper one hasn't. */
static void tell_hidden(struct changes *c, int upper, int lower) {
    int copy = open_directory(lower, ".");
    DIR *d = copy < 0 ? NULL : fdopendir(copy);
    for (struct dirent *entry; d && (entry = readdir(d)) && !c->incomplete;) {
        struct stat st;
        if (is_dot(entry->d_name) || fstatat(upper, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 || !counted(c)) continue;
        size_t base = enter(c, entry->d_name);
        if (base == 0) continue;
        tell(c, DELETED, NULL);
        c->path[base - 1] = 0;
    }
    if (d) closedir(d);
    else if (copy >= 0) close(copy);
}

static void walk(struct changes *c, int upper, int lower, unsigned depth);

static void directory_changed(struct changes *c, int upper, int lower, const char *name, const struct stat *st, const struct stat *below, unsigned depth) {
    int child = depth < DEPTH_MAX ? open_directory(upper, name) : -1;
    if (child < 0) c->incomplete = true;
    bool merged = below && S_ISDIR(below->st_mode);
    bool anew = merged && child >= 0 && opaque(c, child);
    if (!below) tell(c, CREATED, st);
    else if (!merged || anew || !same(st, below)) tell(c, CHANGED, st);
    if (child < 0) return;
    int under = merged ? open_directory(lower, name) : -1;
    if (merged && under < 0) c->incomplete = true;
    if (anew && under >= 0) tell_hidden(c, child, under);
    walk(c, child, under, depth + 1);
    if (under >= 0) close(under);
}

/* Takes `upper`; `lower` is -1 where there is nothing below. */
static void walk(struct changes *c, int upper, int lower, unsigned depth) {
    DIR *d = fdopendir(upper);
    if (!d) {
        c->incomplete = true;
        close(upper);
        return;
    }
    for (struct dirent *entry; (entry = readdir(d)) && !(c->incomplete && c->count > ENTRIES_MAX);) {
        struct stat st, below;
        if (is_dot(entry->d_name) || fstatat(dirfd(d), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !counted(c)) continue;
        bool known = lower >= 0 && fstatat(lower, entry->d_name, &below, AT_SYMLINK_NOFOLLOW) == 0;
        size_t base = enter(c, entry->d_name);
        if (base == 0) continue;
        if (S_ISCHR(st.st_mode) && st.st_rdev == 0) { /* a whiteout: nobody but overlayfs makes these here */
            if (known) tell(c, DELETED, NULL);
        } else if (S_ISDIR(st.st_mode)) {
            directory_changed(c, dirfd(d), lower, entry->d_name, &st, known ? &below : NULL, depth);
        } else {
            tell(c, known ? CHANGED : CREATED, &st);
        }
        c->path[base - 1] = 0;
    }
    closedir(d);
}

void rf_layer_end(const struct rf_layer *l, struct rf_channel *ch, uint32_t id) {
    if (l->fd < 0) return;
    struct changes c = {.ch = ch, .layer = l, .id = id};
    c.w = (struct rf_writer){.buf = c.buf, .capacity = sizeof c.buf};
    struct statfs fs;
    if (fstatfs(l->fd, &fs) == 0) {
        uint64_t room[2] = {(uint64_t)fs.f_bavail * (uint64_t)fs.f_bsize, (uint64_t)fs.f_ffree};
        rf_put(&c.w, 1, room, sizeof room);
    }
    for (unsigned i = 0; i < l->noverlays; i++) {
        const struct rf_overlay *o = &l->overlays[i];
        bool root = strcmp(o->target, "/") == 0;
        snprintf(c.path, sizeof c.path, "%s", root ? "" : o->target);
        struct stat now, before;
        int upper = open_directory(o->upper, ".");
        if (upper < 0 || fstat(upper, &now) < 0 || fstat(o->lower, &before) < 0) {
            c.incomplete = true;
            if (upper >= 0) close(upper);
            continue;
        }
        if (!root && !same(&now, &before)) tell(&c, CHANGED, &now);
        walk(&c, upper, o->lower, 0);
    }
    if (c.incomplete) {
        flush_changes(&c);
        rf_put(&c.w, 3, NULL, 0);
    }
    flush_changes(&c);
}
