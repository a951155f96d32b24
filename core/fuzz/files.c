/* PUT with its data, READ and LIST, in a work directory where a workload planted symlinks, a FIFO and a deep folder. The
 * input is a run of: type (u8), length (u16), payload. Nothing outside the directory may change or be read. */
#include "fuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

static char top[256], work[300];
static const char mark[] = "what lies outside", *const outside[] = {"secret", "linked"};

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw) {
    (void)st, (void)kind, (void)ftw;
    return remove(path);
}

static void remove_top(void) { nftw(top, remove_one, 32, FTW_DEPTH | FTW_PHYS); }

static void plant(void) {
    char path[400];
    const char *base = getenv("TMPDIR");
    if (!top[0]) {
        snprintf(top, sizeof top, "%s/rf-fuzz-%d", base ? base : "/tmp", getpid());
        snprintf(work, sizeof work, "%s/work", top);
        atexit(remove_top);
    }
    remove_top();
    CHECK(mkdir(top, 0700) == 0 && mkdir(work, 0700) == 0);
    for (size_t i = 0; i < RF_LEN(outside); i++) {
        snprintf(path, sizeof path, "%s/%s", top, outside[i]);
        int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        CHECK(fd >= 0 && write(fd, mark, sizeof mark) == (ssize_t)sizeof mark);
        close(fd);
    }
    snprintf(path, sizeof path, "%s/l", work);
    CHECK(symlink("../secret", path) == 0);
    snprintf(path, sizeof path, "%s/d", work);
    CHECK(symlink("..", path) == 0);
    char linked[400];
    snprintf(linked, sizeof linked, "%s/linked", top);
    snprintf(path, sizeof path, "%s/h", work);
    CHECK(link(linked, path) == 0); /* fs.protected_hardlinks is off in a guest */
    snprintf(path, sizeof path, "%s/p", work);
    CHECK(mkfifo(path, 0600) == 0);
}

/* The files outside are as they were, and nothing was made beside them. */
static void check_outside(void) {
    char path[400], found[64];
    struct stat st;
    for (size_t i = 0; i < RF_LEN(outside); i++) {
        snprintf(path, sizeof path, "%s/%s", top, outside[i]);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0 && read(fd, found, sizeof found) == (ssize_t)sizeof mark && memcmp(found, mark, sizeof mark) == 0);
        CHECK(fstat(fd, &st) == 0 && (st.st_mode & 07777) == 0600);
        close(fd);
    }
    DIR *d = opendir(top);
    CHECK(d);
    size_t entries = 0;
    while (readdir(d)) entries++;
    closedir(d);
    CHECK(entries == 3 + RF_LEN(outside)); /* ".", "..", "work" */
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void drain(int fd) {
    static char buf[1 << 16];
    while (recv(fd, buf, sizeof buf, MSG_DONTWAIT) > 0) continue;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static unsigned round;
    if (round++ % 256 == 0) plant();
    int lowest = lowest_free_fd(), ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    struct rf_channel channel = {.fd = ends[0]};
    struct rf_transfer transfer = {.fd = -1};
    for (int frames = 0; n >= 3 && frames < 16; frames++) {
        size_t length = (size_t)data[1] | (size_t)data[2] << 8;
        if (length > n - 3) length = n - 3;
        struct rf_frame f = {.type = data[0], .id = 1, .payload = data + 3, .length = length};
        struct rf_error e = {0};
        int r = 0;
        double start = seconds();
        switch (f.type) {
        case RF_PUT: r = rf_file_put(work, &f, getuid(), getgid(), &transfer, &e); break;
        case RF_DATA: r = rf_file_data(&transfer, &f, &e); break;
        case RF_READ: r = rf_file_read(&channel, work, &f, &e); break;
        case RF_LIST: r = rf_file_list(&channel, work, 1, &e); break;
        default: break;
        }
        if (r < 0) check_error(&e);
        CHECK(seconds() - start < 2); /* nothing that was planted holds it up */
        data += 3 + length, n -= 3 + length;
        drain(ends[1]);
    }
    if (transfer.fd >= 0) close(transfer.fd);
    close(ends[0]);
    close(ends[1]);
    check_outside();
    CHECK(lowest_free_fd() == lowest);
    return 0;
}
