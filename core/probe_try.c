/* Attempts on files, sockets and other processes. One line each: `ok`, or `ERRNO call`.
 *
 * Nothing that succeeds is kept: what is created is removed, what is attached is let go.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "probe.h"

int verb_try_open_read(int argc, char **argv)
{
    (void)argc;
    /* O_NONBLOCK: a fifo or a terminal must not hang the probe. */
    int fd = open(argv[1], O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return say_failed("open");
    struct stat st;
    char byte;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && read(fd, &byte, 1) < 0)
        return say_failed("read");
    close(fd);
    return say_ok();
}

int verb_try_content(int argc, char **argv)
{
    (void)argc;
    int fd = open(argv[1], O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return say_failed("open");
    char byte;
    ssize_t n = read(fd, &byte, 1);
    if (n < 0 && errno == EISDIR) {
        DIR *dir = fdopendir(fd);
        if (!dir)
            return say_failed("fdopendir");
        struct dirent *entry;
        do
            entry = readdir(dir);
        while (entry && (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0));
        n = entry != NULL;
    }
    if (n == 0)
        errno = ENODATA; /* what hides a file is empty */
    return n > 0 ? say_ok() : say_failed("read");
}

int verb_try_open_write(int argc, char **argv)
{
    (void)argc;
    int fd = open(argv[1], O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return say_failed("open");
    close(fd);
    return say_ok();
}

int verb_try_create(int argc, char **argv)
{
    (void)argc;
    int fd = open(argv[1], O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return say_failed("open");
    close(fd);
    return unlink(argv[1]) < 0 ? say_failed("unlink") : say_ok();
}

int verb_try_mknod(int argc, char **argv)
{
    (void)argc;
    if (mknod(argv[1], S_IFCHR | 0600, makedev(1, 3)) < 0)
        return say_failed("mknod");
    return unlink(argv[1]) < 0 ? say_failed("unlink") : say_ok();
}

int verb_try_open_by_handle(int argc, char **argv)
{
    (void)argc;
    struct {
        struct file_handle head;
        unsigned char space[MAX_HANDLE_SZ];
    } handle = {.head = {.handle_bytes = MAX_HANDLE_SZ}};
    int mount_id;
    if (name_to_handle_at(AT_FDCWD, argv[1], &handle.head, &mount_id, 0) < 0)
        return say_failed("name_to_handle_at");
    int anchor = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (anchor < 0)
        return say_failed("open");
    if (open_by_handle_at(anchor, &handle.head, O_RDONLY | O_CLOEXEC) < 0)
        return say_failed("open_by_handle_at");
    return say_ok();
}

int verb_try_connect4(int argc, char **argv)
{
    (void)argc;
    struct sockaddr_in address = {.sin_family = AF_INET};
    uint64_t port;
    if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1)
        return bad_argument("an IPv4 address", argv[1]);
    if (parse_number(argv[2], &port) < 0 || port > 65535)
        return bad_argument("a port", argv[2]);
    address.sin_port = htons((uint16_t)port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return say_failed("socket");
    /* Bounds connect too: a network that drops packets must end in EINPROGRESS, not in a hang. */
    struct timeval patience = {.tv_sec = 3};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return say_failed("connect");
    return say_ok();
}

struct named_number {
    const char *name;
    int number;
};

/* The number by name or by digits, or -1. */
static int number_of(const char *text, const struct named_number *names, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(names[i].name, text) == 0)
            return names[i].number;
    uint64_t number;
    return parse_number(text, &number) < 0 || number > INT32_MAX ? -1 : (int)number;
}

int verb_try_socket(int argc, char **argv)
{
    (void)argc;
    static const struct named_number families[] = {
        {"unix", AF_UNIX}, {"inet", AF_INET}, {"inet6", AF_INET6}, {"netlink", AF_NETLINK},
        {"packet", AF_PACKET}, {"vsock", AF_VSOCK}, {"alg", AF_ALG}, {"bluetooth", AF_BLUETOOTH},
    };
    static const struct named_number types[] = {
        {"stream", SOCK_STREAM}, {"dgram", SOCK_DGRAM}, {"raw", SOCK_RAW}, {"seqpacket", SOCK_SEQPACKET},
    };
    int family = number_of(argv[1], families, sizeof families / sizeof families[0]);
    int type = number_of(argv[2], types, sizeof types / sizeof types[0]);
    if (family < 0)
        return bad_argument("a socket family", argv[1]);
    if (type < 0)
        return bad_argument("a socket type", argv[2]);
    /* A raw internet socket needs a protocol; ICMP serves both families here: nothing is sent. */
    int protocol = type == SOCK_RAW && (family == AF_INET || family == AF_INET6) ? IPPROTO_ICMP : 0;
    return socket(family, type | SOCK_CLOEXEC, protocol) < 0 ? say_failed("socket") : say_ok();
}

int verb_try_unix_abstract(int argc, char **argv)
{
    (void)argc;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(argv[1]);
    if (length > sizeof address.sun_path - 1)
        return bad_argument("an abstract socket name", argv[1]);
    memcpy(address.sun_path + 1, argv[1], length); /* after a NUL: abstract, unix(7) */
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return say_failed("socket");
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
    return connect(fd, (struct sockaddr *)&address, size) < 0 ? say_failed("connect") : say_ok();
}

int verb_try_kill(int argc, char **argv)
{
    (void)argc;
    pid_t pid;
    uint64_t sig;
    if (parse_pid(argv[1], &pid) < 0)
        return bad_argument("a pid", argv[1]);
    if (parse_number(argv[2], &sig) < 0 || sig > 64)
        return bad_argument("a signal", argv[2]);
    return kill(pid, (int)sig) < 0 ? say_failed("kill") : say_ok();
}

int verb_try_ptrace(int argc, char **argv)
{
    (void)argc;
    pid_t pid;
    if (parse_pid(argv[1], &pid) < 0)
        return bad_argument("a pid", argv[1]);
    /* SEIZE doesn't stop the tracee, and the kernel detaches when the tracer ends (ptrace(2)). */
    return ptrace(PTRACE_SEIZE, pid, NULL, NULL) < 0 ? say_failed("ptrace") : say_ok();
}

static int open_proc(pid_t pid, const char *file)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, file);
    return open(path, O_RDONLY | O_CLOEXEC);
}

/* The start of the first mapping that the process itself may read, 0 if there is none. */
static off_t first_readable_address(int maps)
{
    FILE *lines = fdopen(maps, "r");
    char line[4096];
    off_t found = 0;
    while (lines && !found && fgets(line, sizeof line, lines)) {
        uint64_t start;
        char readable;
        if (sscanf(line, "%" SCNx64 "-%*x %c", &start, &readable) == 2 && readable == 'r' && start <= INT64_MAX)
            found = (off_t)start;
    }
    return found;
}

int verb_try_procmem(int argc, char **argv)
{
    (void)argc;
    pid_t pid;
    if (parse_pid(argv[1], &pid) < 0)
        return bad_argument("a pid", argv[1]);
    int mem = open_proc(pid, "mem");
    if (mem < 0)
        return say_failed("open");
    int maps = open_proc(pid, "maps");
    if (maps < 0)
        return say_failed("open");
    off_t address = first_readable_address(maps);
    char bytes[16];
    return pread(mem, bytes, sizeof bytes, address) < 1 ? say_failed("pread") : say_ok();
}

int verb_try_environ(int argc, char **argv)
{
    (void)argc;
    pid_t pid;
    if (parse_pid(argv[1], &pid) < 0)
        return bad_argument("a pid", argv[1]);
    int fd = open_proc(pid, "environ");
    if (fd < 0)
        return say_failed("open");
    char byte;
    ssize_t n = read(fd, &byte, 1);
    if (n == 0)
        errno = ENODATA; /* a kernel thread, or an empty environment: nothing was learned */
    return n < 1 ? say_failed("read") : say_ok();
}

int verb_try_vm_readv(int argc, char **argv)
{
    (void)argc;
    pid_t pid;
    if (parse_pid(argv[1], &pid) < 0)
        return bad_argument("a pid", argv[1]);
    char byte;
    struct iovec local = {&byte, 1}, remote = {NULL, 1};
    /* The kernel checks the right to read before the address (mm/process_vm_access.c): EFAULT means allowed. */
    if (process_vm_readv(pid, &local, 1, &remote, 1, 0) < 0 && errno != EFAULT)
        return say_failed("process_vm_readv");
    return say_ok();
}
