/* What a guest's init executes of itself, under all restrictions of a command, so that the first one of the caller's finds
 * the kernel's ways of running a command translated. It only reads, and what fails is left out. */
#include "rf.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define FRESH_BYTES (64u << 10)
#define SHOWN_BYTES (256u << 10)
#define SHOWN_FILES 2

/* As a loader does: the head is read, the rest is mapped and touched. Backwards nothing is read ahead. */
static void show(int fd) {
    char head[4096];
    struct stat st;
    if (read(fd, head, sizeof head) <= 0 || fstat(fd, &st) < 0) return;
    size_t size = (uint64_t)st.st_size < SHOWN_BYTES ? (size_t)st.st_size : SHOWN_BYTES;
    volatile const uint8_t *text = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (text == MAP_FAILED) return;
    for (size_t at = size; at > sizeof head; at -= sizeof head) (void)text[at - 1];
    munmap((void *)(uintptr_t)text, size);
}

/* Files of the image where programs are, and only of its disk: a share is read by nobody but who asks for it. */
static void read_image(const char *folder) {
    DIR *d = opendir(folder);
    struct statfs fs;
    if (!d) return;
    int left = fstatfs(dirfd(d), &fs) == 0 && fs.f_type == EROFS_SUPER_MAGIC_V1 ? SHOWN_FILES : 0;
    for (struct dirent *one; left > 0 && (one = readdir(d));) {
        if (one->d_type != DT_REG) continue;
        int fd = openat(dirfd(d), one->d_name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        if (fd >= 0) show(fd), close(fd);
        left--;
    }
    closedir(d);
}

static void touch_memory(void) {
    volatile uint8_t *fresh = mmap(NULL, FRESH_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) return;
    for (size_t at = 0; at < FRESH_BYTES; at += 4096) fresh[at] = 1;
    munmap((void *)(uintptr_t)fresh, FRESH_BYTES);
}

int rf_warm_main(void) {
    static const char said[] = "warm\n";
    char in[1];
    read_image("/usr/bin");
    read_image("/bin");
    touch_memory();
    pid_t child = fork();
    if (child == 0) _exit(0);
    if (child > 0) waitpid(child, NULL, 0);
    bool written = read(0, in, sizeof in) == 0 && write(1, said, sizeof said - 1) > 0 && write(2, said, sizeof said - 1) > 0;
    return written ? 0 : 1;
}
