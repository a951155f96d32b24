/* What all verbs of the probe share: error names, numbers, clocks, whole reads and writes. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "probe.h"

/* strerrorname_np is glibc's alone (2.32), and the probe is built with musl too. */
const char *errno_name(int err)
{
    switch (err) {
#define NAME(e) case e: return #e;
    NAME(EPERM) NAME(ENOENT) NAME(ESRCH) NAME(EINTR) NAME(EIO) NAME(ENXIO) NAME(E2BIG) NAME(ENOEXEC) NAME(EBADF)
    NAME(ECHILD) NAME(EAGAIN) NAME(ENOMEM) NAME(EACCES) NAME(EFAULT) NAME(ENOTBLK) NAME(EBUSY) NAME(EEXIST)
    NAME(EXDEV) NAME(ENODEV) NAME(ENOTDIR) NAME(EISDIR) NAME(EINVAL) NAME(ENFILE) NAME(EMFILE) NAME(ENOTTY)
    NAME(ETXTBSY) NAME(EFBIG) NAME(ENOSPC) NAME(ESPIPE) NAME(EROFS) NAME(EMLINK) NAME(EPIPE) NAME(EDOM)
    NAME(ERANGE) NAME(EDEADLK) NAME(ENAMETOOLONG) NAME(ENOLCK) NAME(ENOSYS) NAME(ENOTEMPTY) NAME(ELOOP)
    NAME(ENODATA) NAME(EOVERFLOW) NAME(EILSEQ) NAME(EUSERS) NAME(ENOTSOCK) NAME(EDESTADDRREQ) NAME(EMSGSIZE)
    NAME(EPROTOTYPE) NAME(ENOPROTOOPT) NAME(EPROTONOSUPPORT) NAME(ESOCKTNOSUPPORT) NAME(EOPNOTSUPP)
    NAME(EPFNOSUPPORT) NAME(EAFNOSUPPORT) NAME(EADDRINUSE) NAME(EADDRNOTAVAIL) NAME(ENETDOWN) NAME(ENETUNREACH)
    NAME(ECONNABORTED) NAME(ECONNRESET) NAME(ENOBUFS) NAME(EISCONN) NAME(ENOTCONN) NAME(ETIMEDOUT)
    NAME(ECONNREFUSED) NAME(EHOSTDOWN) NAME(EHOSTUNREACH) NAME(EALREADY) NAME(EINPROGRESS) NAME(ESTALE)
    NAME(EDQUOT) NAME(ECANCELED) NAME(ENOKEY) NAME(EKEYEXPIRED) NAME(EKEYREVOKED) NAME(EKEYREJECTED)
    NAME(ENOPKG) NAME(EREMOTEIO) NAME(EPROTO) NAME(EBADMSG)
#undef NAME
    default: return "E?";
    }
}

int say_ok(void)
{
    puts("ok");
    return PROBE_OK;
}

int say_failed(const char *call)
{
    printf("%s %s\n", errno_name(errno), call);
    return PROBE_FAILED;
}

int complain_failed(const char *call)
{
    fprintf(stderr, "%s %s\n", errno_name(errno), call);
    return PROBE_FAILED;
}

int bad_argument(const char *what, const char *value)
{
    fprintf(stderr, "ringfence-probe: %s can't be '%s'\n", what, value);
    return PROBE_USAGE;
}

int parse_number(const char *text, uint64_t *value)
{
    char *end;
    errno = 0;
    unsigned long long parsed = strtoull(text, &end, 0);
    if (errno || end == text || *end || text[0] == '-')
        return -1;
    *value = parsed;
    return 0;
}

int parse_size(const char *text, uint64_t *value)
{
    char *end;
    errno = 0;
    unsigned long long parsed = strtoull(text, &end, 10);
    if (errno || end == text || text[0] == '-')
        return -1;
    unsigned shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
    if (shift)
        end++;
    if (*end || parsed > UINT64_MAX >> shift)
        return -1;
    *value = parsed << shift;
    return 0;
}

int parse_seconds(const char *text, double *value)
{
    char *end;
    double parsed = strtod(text, &end);
    if (end == text || *end || !(parsed >= 0) || parsed > 86400)
        return -1;
    *value = parsed;
    return 0;
}

int parse_pid(const char *text, pid_t *pid)
{
    uint64_t number;
    /* 0 and negative pids mean whole groups to kill(2): never by accident. */
    if (parse_number(text, &number) < 0 || number < 1 || number > INT32_MAX)
        return -1;
    *pid = (pid_t)number;
    return 0;
}

void sleep_seconds(double seconds)
{
    time_t whole = (time_t)seconds;
    struct timespec left = {whole, (long)((seconds - (double)whole) * 1e9)};
    while (nanosleep(&left, &left) < 0 && errno == EINTR)
        ;
}

double monotonic_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

int write_all(int fd, const void *data, size_t size)
{
    const char *at = data;
    while (size > 0) {
        ssize_t n = write(fd, at, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        at += n;
        size -= (size_t)n;
    }
    return 0;
}

ssize_t read_text(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    size_t used = 0;
    ssize_t n = 0;
    while (used + 1 < size && (n = read(fd, text + used, size - 1 - used)) > 0)
        used += (size_t)n;
    int saved = errno;
    close(fd);
    errno = saved;
    if (n < 0)
        return -1;
    text[used] = '\0';
    return (ssize_t)used;
}

int is_missing_in(const char *path, const char *word)
{
    static char text[1 << 14];
    if (read_text(path, text, sizeof text) < 0)
        return 0;
    size_t length = strlen(word);
    for (const char *at = text; (at = strstr(at, word)); at += length)
        if ((at == text || strchr(" \t\n", at[-1])) && strchr(" \t\n", at[length])) /* its end, too */
            return 0;
    return 1;
}

int list_fds(int *fds, int max)
{
    int count = 0;
    DIR *dir = opendir("/proc/self/fd");
    if (!dir) { /* no /proc: by number, up to what is usual */
        for (int fd = 0; fd < 1024 && count < max; fd++)
            if (fcntl(fd, F_GETFD) >= 0)
                fds[count++] = fd;
        return count;
    }
    for (struct dirent *entry; (entry = readdir(dir)) && count < max;) {
        uint64_t number;
        if (parse_number(entry->d_name, &number) == 0 && (int)number != dirfd(dir))
            fds[count++] = (int)number;
    }
    closedir(dir);
    return count;
}

void fd_target(int fd, char *target, size_t size)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, target, size - 1);
    if (n < 0)
        snprintf(target, size, "?");
    else
        target[n] = '\0';
}
