/* Files of the work directory, in and out over the channel: how a guest gets and gives them. Paths are resolved
 * beneath the work directory without following any symlink, which the command may have planted. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ENTRIES_MAX 65536
#define DEPTH_MAX 64

static int fail(struct rf_error *e, const char *call, const char *detail) { return rf_fail(e, "files", call, detail); }

static int open_beneath(int dir, const char *path, int flags, mode_t mode) {
    struct open_how how = {
        .flags = (uint32_t)(flags | O_CLOEXEC),
        .mode = (flags & O_CREAT) ? mode : 0,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV,
    };
    return (int)syscall(SYS_openat2, dir, path, &how, sizeof how);
}

static int open_workdir(const char *workdir, struct rf_error *e) {
    int dir = open(workdir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return dir < 0 ? fail(e, "open", workdir) : dir;
}

/* Makes the directories that lead to `path`, each owned by the command's user. */
static int make_parents(int dir, const char *path, uint32_t uid, uint32_t gid, struct rf_error *e) {
    char prefix[4096];
    for (const char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
        size_t n = (size_t)(slash - path);
        if (n == 0 || n >= sizeof prefix) return rf_fail_errno(e, ENAMETOOLONG, "files", "path", path);
        memcpy(prefix, path, n);
        prefix[n] = 0;
        char *name = strrchr(prefix, '/');
        int parent = dir;
        if (name) {
            *name = 0;
            parent = open_beneath(dir, prefix, O_RDONLY | O_DIRECTORY, 0);
            if (parent < 0) return fail(e, "openat2", path);
            name++;
        } else {
            name = prefix;
        }
        int r = mkdirat(parent, name, 0755);
        if (r == 0) r = fchownat(parent, name, uid, gid, AT_SYMLINK_NOFOLLOW);
        else if (errno == EEXIST) r = 0;
        if (r < 0) fail(e, "mkdirat", path);
        if (parent != dir) close(parent);
        if (r < 0) return -1;
    }
    return 0;
}

/* A regular file to write to, with no other name: a workload may have left a FIFO, which would hold us up, or a hard
 * link to a file elsewhere, which is not ours to change. */
static int open_file(int dir, const char *path, mode_t mode) {
    int fd = open_beneath(dir, path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK, mode);
    struct stat st;
    if (fd < 0 || (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_nlink == 1)) return fd;
    close(fd);
    errno = EINVAL;
    return -1;
}

int rf_file_put(const char *workdir, const struct rf_frame *f, uint32_t uid, uint32_t gid, struct rf_transfer *t, struct rf_error *e) {
    struct rf_reader r = {f->payload, f->payload + f->length};
    struct rf_attr a;
    const char *path = NULL;
    uint32_t mode = 0644;
    uint64_t size = 0;
    int got;
    unsigned seen = 0;
    while ((got = rf_attr_next(&r, &a)) > 0) {
        int ok = a.tag == 1 ? rf_attr_string(&a, &path) : a.tag == 2 ? rf_attr_u32(&a, &mode) : a.tag == 3 ? rf_attr_u64(&a, &size) : -1;
        if (ok < 0 || (seen & 1u << a.tag)) break;
        seen |= 1u << a.tag;
    }
    if (got != 0 || !path || mode > 07777) return rf_fail_errno(e, EPROTO, "protocol", "put", "malformed");
    if (t->fd >= 0) return rf_fail_errno(e, EPROTO, "protocol", "put", "another one isn't finished");
    int dir = open_workdir(workdir, e);
    if (dir < 0) return -1;
    int fd = -1;
    if (make_parents(dir, path, uid, gid, e) == 0) {
        fd = open_file(dir, path, mode & 0777);
        if (fd < 0) fail(e, "openat2", path);
        else if (ftruncate(fd, 0) < 0 || fchown(fd, uid, gid) < 0 || fchmod(fd, mode) < 0) {
            fail(e, "fchown", path);
            close(fd);
            fd = -1;
        }
    }
    close(dir);
    if (fd < 0) return -1;
    *t = (struct rf_transfer){.fd = fd, .id = f->id, .left = size};
    return 0;
}

int rf_file_data(struct rf_transfer *t, const struct rf_frame *f, struct rf_error *e) {
    if (t->fd < 0) return 0; /* of a transfer that failed, and was told so */
    if (f->id != t->id || f->length > t->left) return rf_fail_errno(e, EPROTO, "protocol", "data", "of no transfer, or too much");
    int r = rf_write_all(t->fd, f->payload, f->length) < 0 ? fail(e, "write", "") : 0;
    t->left -= f->length;
    if (r < 0 || f->length == 0) { /* an empty one ends it */
        close(t->fd);
        t->fd = -1;
        if (r == 0 && t->left) r = rf_fail_errno(e, EPROTO, "protocol", "data", "less than was told");
    }
    return r;
}

struct listing {
    struct rf_channel *ch;
    uint32_t id;
    unsigned count;
    char path[4096];
    uint8_t buf[RF_CHUNK];
    size_t used;
};

static int flush_listing(struct listing *l) {
    int r = l->used ? rf_channel_send(l->ch, RF_ENTRIES, l->id, l->buf, l->used) : 0;
    l->used = 0;
    return r;
}

static int add_entry(struct listing *l, const struct stat *st) {
    size_t n = strlen(l->path) + 1;
    if (l->used + 13 + n > sizeof l->buf && flush_listing(l) < 0) return -1;
    uint8_t *at = l->buf + l->used;
    uint32_t mode = st->st_mode & 07777;
    uint64_t size = (uint64_t)st->st_size;
    at[0] = S_ISREG(st->st_mode) ? 'f' : S_ISDIR(st->st_mode) ? 'd' : S_ISLNK(st->st_mode) ? 'l' : 'o';
    memcpy(at + 1, &mode, 4);
    memcpy(at + 5, &size, 8);
    memcpy(at + 13, l->path, n);
    l->used += 13 + n;
    return 0;
}

static int walk(struct listing *l, int dir, unsigned depth, struct rf_error *e) {
    DIR *d = fdopendir(dir);
    if (!d) {
        close(dir);
        return fail(e, "fdopendir", l->path);
    }
    size_t base = strlen(l->path);
    int r = 0;
    for (struct dirent *entry; r == 0 && (entry = readdir(d));) {
        const char *name = entry->d_name;
        struct stat st;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) continue;
        int n = snprintf(l->path + base, sizeof l->path - base, "%s%s", base ? "/" : "", name);
        if (n < 0 || (size_t)n >= sizeof l->path - base) r = rf_fail_errno(e, ENAMETOOLONG, "files", "list", name);
        else if (++l->count > ENTRIES_MAX) r = rf_fail_errno(e, E2BIG, "files", "list", "more than 65536 entries");
        else if (fstatat(dirfd(d), name, &st, AT_SYMLINK_NOFOLLOW) == 0) {
            if (add_entry(l, &st) < 0) r = fail(e, "send", "");
            else if (S_ISDIR(st.st_mode)) {
                int child = depth < DEPTH_MAX ? openat(dirfd(d), name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
                if (child >= 0) r = walk(l, child, depth + 1, e);
                else if (depth == DEPTH_MAX) r = rf_fail_errno(e, ELOOP, "files", "list", "deeper than 64 directories");
            }
        }
        l->path[base] = 0;
    }
    closedir(d);
    return r;
}

int rf_file_list(struct rf_channel *ch, const char *workdir, uint32_t id, struct rf_error *e) {
    struct listing l = {.ch = ch, .id = id};
    int dir = open_workdir(workdir, e);
    if (dir < 0 || walk(&l, dir, 0, e) < 0) return -1;
    if (flush_listing(&l) < 0) return fail(e, "send", "");
    return rf_channel_send(ch, RF_DONE, id, NULL, 0);
}

int rf_file_read(struct rf_channel *ch, const char *workdir, const struct rf_frame *f, struct rf_error *e) {
    struct rf_reader r = {f->payload, f->payload + f->length};
    struct rf_attr a;
    const char *path;
    if (rf_attr_next(&r, &a) != 1 || a.tag != 1 || rf_attr_string(&a, &path) < 0 || r.at != r.end) return rf_fail_errno(e, EPROTO, "protocol", "read", "malformed");
    int dir = open_workdir(workdir, e);
    if (dir < 0) return -1;
    int fd = open_beneath(dir, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0); /* a FIFO must not hold us up */
    close(dir);
    if (fd < 0) return fail(e, "openat2", path);
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return rf_fail_errno(e, EINVAL, "files", "read", "not a regular file");
    }
    uint8_t buf[RF_CHUNK];
    ssize_t n;
    while ((n = read(fd, buf, sizeof buf)) > 0)
        if (rf_channel_send(ch, RF_DATA, f->id, buf, (size_t)n) < 0) break;
    int err = n < 0 ? fail(e, "read", path) : 0;
    close(fd);
    return err < 0 ? -1 : rf_channel_send(ch, RF_DONE, f->id, NULL, 0);
}
