/* Attempts to use much: memory, descriptors, the disk. Each is bounded by its argument, and lets go of all at its end.
 * And ways into the kernel by another door than the usual system call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "probe.h"

int verb_try_memory(int argc, char **argv)
{
    (void)argc;
    uint64_t size;
    if (parse_size(argv[1], &size) < 0)
        return bad_argument("a size", argv[1]);
    /* Where it is too much after all, it is us whom the kernel ends, and none of the host's programs. */
    int order = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (order >= 0) {
        (void)!write(order, "1000", 4);
        close(order);
    }
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return say_failed("mmap");
    madvise(memory, size, MADV_HUGEPAGE); /* where there are any, it is quicker */
    for (uint64_t at = 0; at < size; at += 4096)
        memory[at] = (char)(at >> 12 | 1); /* not zero, as if it were read only */
    return say_ok();
}

int verb_try_fds(int argc, char **argv)
{
    (void)argc;
    uint64_t most, opened = 0;
    if (parse_number(argv[1], &most) < 0 || most > 1000000)
        return bad_argument("a number of descriptors", argv[1]);
    int first = open("/", O_RDONLY | O_CLOEXEC), err = 0;
    if (first < 0)
        return say_failed("open");
    while (opened < most && !err) {
        if (fcntl(first, F_DUPFD_CLOEXEC, 0) < 0)
            err = errno;
        else
            opened++;
    }
    printf("opened %" PRIu64 " %s\n", opened, err ? errno_name(err) : "ok");
    return PROBE_OK;
}

int verb_try_fill(int argc, char **argv)
{
    (void)argc;
    uint64_t size, written = 0;
    if (parse_size(argv[1], &size) < 0)
        return bad_argument("a size", argv[1]);
    static const char chunk[1 << 16] = {1};
    int err = 0, fd = open("ringfence-fill", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return say_failed("open");
    unlink("ringfence-fill");
    while (written < size && !err) {
        ssize_t n = write(fd, chunk, sizeof chunk);
        if (n < 0)
            err = errno;
        else
            written += (uint64_t)n;
    }
    close(fd);
    printf("wrote %" PRIu64 " %s\n", written, err ? errno_name(err) : "ok");
    return PROBE_OK;
}

int verb_statfs(int argc, char **argv)
{
    (void)argc;
    struct statvfs st;
    if (statvfs(argv[1], &st) < 0)
        return say_failed("statvfs");
    printf("%" PRIu64 " bytes, %" PRIu64 " inodes\n", (uint64_t)st.f_blocks * st.f_frsize, (uint64_t)st.f_files);
    return PROBE_OK;
}

/* Everybody may open it; who isn't meant to know sees zeros (kptr_restrict, proc(5)). */
int verb_try_kernel_addresses(int argc, char **argv)
{
    (void)argc, (void)argv;
    FILE *file = fopen("/proc/kallsyms", "re");
    if (!file)
        return say_failed("open");
    char line[512];
    unsigned long long address = 0;
    /* The first few are of each CPU's own data, at 0 for everybody; in all of them is what takes long. */
    for (int i = 0; i < 500 && !address && fgets(line, sizeof line, file); i++)
        sscanf(line, "%llx", &address);
    fclose(file);
    errno = EPERM;
    return address ? say_ok() : say_failed("read");
}

int verb_try_foreign(int argc, char **argv)
{
    (void)argc;
#ifdef __x86_64__
    long found;
    if (strcmp(argv[1], "i386") == 0) {
        /* getpid(2) of 32-bit programs: another table of system calls, in the same kernel. */
        __asm__ volatile("int $0x80" : "=a"(found) : "a"(20l) : "memory", "r8", "r9", "r10", "r11");
        found = (int)found;
    } else if (strcmp(argv[1], "x32") == 0) {
        found = syscall(0x40000000 + SYS_getpid);
        found = found < 0 ? -errno : found;
    } else {
        return bad_argument("an entry", argv[1]);
    }
    if (found == getpid())
        return say_ok();
    errno = found < 0 ? (int)-found : ENOSYS;
#else
    errno = ENOSYS;
#endif
    return say_failed("getpid");
}
