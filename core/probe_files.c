/* Verbs that look at or make files and descriptors. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "probe.h"

enum { MAX_DEPTH = 64 };

int verb_ls_fds(int argc, char **argv)
{
    (void)argc, (void)argv;
    int fds[MAX_FDS];
    int count = list_fds(fds, MAX_FDS);
    for (int i = 0; i < count; i++) {
        char target[PATH_MAX];
        fd_target(fds[i], target, sizeof target);
        printf("%d %s\n", fds[i], target);
    }
    return PROBE_OK;
}

static int write_pattern(int fd, uint64_t size)
{
    unsigned char chunk[251 * 256];
    for (unsigned i = 0; i < sizeof chunk; i++)
        chunk[i] = (unsigned char)(i % 251);
    while (size > 0) {
        size_t part = size < sizeof chunk ? (size_t)size : sizeof chunk;
        if (write_all(fd, chunk, part) < 0)
            return -1;
        size -= part;
    }
    return 0;
}

int verb_mkfile(int argc, char **argv)
{
    uint64_t size, mode = 0644;
    if (parse_size(argv[2], &size) < 0)
        return bad_argument("a size", argv[2]);
    if (argc > 3) {
        char *end;
        mode = strtoul(argv[3], &end, 8);
        if (*end || mode > 07777)
            return bad_argument("an octal mode", argv[3]);
    }
    int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return say_failed("open");
    if (write_pattern(fd, size) < 0)
        return say_failed("write");
    if (fchmod(fd, (mode_t)mode) < 0) /* not through open: the umask would take bits away */
        return say_failed("fchmod");
    return close(fd) < 0 ? say_failed("close") : say_ok();
}

int verb_read(int argc, char **argv)
{
    (void)argc;
    int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return complain_failed("open");
    char chunk[65536];
    ssize_t n;
    while ((n = read(fd, chunk, sizeof chunk)) > 0)
        if (write_all(STDOUT_FILENO, chunk, (size_t)n) < 0)
            return complain_failed("write");
    return n < 0 ? complain_failed("read") : PROBE_OK;
}

int verb_write(int argc, char **argv)
{
    (void)argc;
    int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return say_failed("open");
    if (write_all(fd, argv[2], strlen(argv[2])) < 0)
        return say_failed("write");
    return close(fd) < 0 ? say_failed("close") : say_ok();
}

static const char *type_name(mode_t mode)
{
    switch (mode & S_IFMT) {
    case S_IFREG: return "file";
    case S_IFDIR: return "dir";
    case S_IFLNK: return "link";
    case S_IFIFO: return "fifo";
    case S_IFSOCK: return "socket";
    case S_IFCHR: return "char";
    case S_IFBLK: return "block";
    default: return "unknown";
    }
}

static void print_target(const char *path)
{
    char target[PATH_MAX];
    ssize_t n = readlink(path, target, sizeof target);
    printf(" -> %.*s", n < 0 ? 1 : (int)n, n < 0 ? "?" : target);
}

int verb_stat(int argc, char **argv)
{
    (void)argc;
    struct stat st;
    if (lstat(argv[1], &st) < 0)
        return complain_failed("lstat");
    printf("%s %04o %lld %u %u %llu", type_name(st.st_mode), st.st_mode & 07777u, (long long)st.st_size, st.st_uid,
           st.st_gid, (unsigned long long)st.st_nlink);
    if (S_ISLNK(st.st_mode))
        print_target(argv[1]);
    putchar('\n');
    return PROBE_OK;
}

int verb_symlink(int argc, char **argv)
{
    (void)argc;
    return symlink(argv[1], argv[2]) < 0 ? say_failed("symlink") : say_ok();
}

int verb_touch_out(int argc, char **argv)
{
    (void)argc;
    int fd = open(argv[1], O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0)
        return say_failed("open");
    close(fd);
    return say_ok();
}

/* One entry a line, whatever a hostile name holds. */
static void print_escaped(const char *text)
{
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c < 0x20 || c == 0x7f || c == '\\')
            printf("\\x%02x", c);
        else
            putchar(c);
    }
}

static int by_bytes(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int is_real_entry(const struct dirent *entry)
{
    return strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
}

/* `prefix` is the path below the tree's top, with a slash at its end, or empty. */
static int print_tree(const char *dir, const char *prefix, int depth)
{
    struct dirent **entries;
    int count = scandir(dir, &entries, is_real_entry, by_bytes);
    if (count < 0)
        return complain_failed("scandir");
    int status = PROBE_OK;
    for (int i = 0; i < count; i++) {
        char path[PATH_MAX], name[PATH_MAX];
        struct stat st;
        int fits = (size_t)snprintf(path, sizeof path, "%s/%s", dir, entries[i]->d_name) < sizeof path
                   && (size_t)snprintf(name, sizeof name, "%s%s", prefix, entries[i]->d_name) < sizeof name - 1;
        free(entries[i]);
        if (!fits)
            errno = ENAMETOOLONG;
        if (!fits || lstat(path, &st) < 0) {
            status = complain_failed("lstat");
            continue;
        }
        printf("%s %04o %lld ", type_name(st.st_mode), st.st_mode & 07777u, (long long)st.st_size);
        print_escaped(name);
        if (S_ISLNK(st.st_mode))
            print_target(path);
        putchar('\n');
        if (S_ISDIR(st.st_mode) && depth < MAX_DEPTH) {
            strcat(name, "/");
            if (print_tree(path, name, depth + 1) != PROBE_OK)
                status = PROBE_FAILED;
        }
    }
    free(entries);
    return status;
}

int verb_tree(int argc, char **argv)
{
    (void)argc;
    return print_tree(argv[1], "", 0);
}
