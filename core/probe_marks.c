/* hold and find: marks by which two processes could find each other, or talk. hold sets all that it can and stays to keep
 * them; find looks for one. Run in two sandboxes, or outside and inside, they show which channels there are.
 *
 * A mark is named by a token of up to 8 hex digits, which is also its key and, folded, its port. What a mark leaves in a
 * file system or in the kernel is removed when the holder ends, by its time or by a signal that asks for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <dirent.h>
#include <linux/keyctl.h>
#include <linux/vm_sockets.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "probe.h"

/* Directories that every image has, and that no program is known to lock or to watch. */
#define LOCKED "/usr"
#define WATCHED "/usr/share"

struct token {
    char text[9];
    uint32_t key;
    unsigned seconds; /* that it is held */
};

static int parse_token(const char *text, struct token *token)
{
    size_t length = strlen(text);
    if (length == 0 || length > 8 || strspn(text, "0123456789abcdef") != length)
        return -1;
    snprintf(token->text, sizeof token->text, "%s", text);
    token->seconds = 0;
    token->key = ((uint32_t)strtoul(text, NULL, 16) & 0x3fffffff) | 0x40000000; /* never 0, which is IPC_PRIVATE */
    return 0;
}

static uint16_t port_of(const struct token *token)
{
    return (uint16_t)(10000 + token->key % 20000); /* below the ephemeral ones */
}

static const char *path_of(const char *format, const struct token *token, char *path, size_t size)
{
    snprintf(path, size, format, token->text);
    return path;
}

static int make_file(const char *format, const struct token *token)
{
    char path[64];
    int fd = open(path_of(format, token, path, sizeof path), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd >= 0)
        fchmod(fd, 0666);
    return fd;
}

static int open_file(const char *format, const struct token *token)
{
    char path[64];
    return open(path_of(format, token, path, sizeof path), O_RDONLY | O_CLOEXEC);
}

#define TMP_FILE "/tmp/.ringfence-probe-%s"
#define SHM_FILE "/dev/shm/ringfence-probe-%s"
#define QUEUE "ringfence-probe-%s" /* without the slash that libc takes off */
#define KEY "ringfence-probe-%s"

static const char *hold_tmp(const struct token *t) { return make_file(TMP_FILE, t) < 0 ? "open" : NULL; }
static const char *find_tmp(const struct token *t) { return open_file(TMP_FILE, t) < 0 ? "open" : NULL; }
static const char *hold_shm_file(const struct token *t) { return make_file(SHM_FILE, t) < 0 ? "open" : NULL; }
static const char *find_shm_file(const struct token *t) { return open_file(SHM_FILE, t) < 0 ? "open" : NULL; }

/* ---- sockets ---- */

enum { CONNECT_MS = 200 };

static socklen_t abstract_name(const struct token *token, struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    int n = snprintf(address->sun_path + 1, sizeof address->sun_path - 1, "ringfence-probe-%s", token->text);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

static const char *listen_at(int family, const struct sockaddr *address, socklen_t size)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0)
        return "socket";
    if (family == AF_INET)
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, address, size) < 0)
        return "bind";
    return listen(fd, 8) < 0 ? "listen" : NULL;
}

static const char *connect_to(int family, const struct sockaddr *address, socklen_t size)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return "socket";
    if (connect(fd, address, size) == 0)
        return NULL;
    if (errno != EINPROGRESS)
        return "connect";
    struct pollfd ready = {.fd = fd, .events = POLLOUT};
    int err = ETIMEDOUT;
    socklen_t length = sizeof err;
    if (poll(&ready, 1, CONNECT_MS) == 1)
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &length);
    errno = err;
    return err ? "connect" : NULL;
}

static const char *hold_abstract(const struct token *token)
{
    struct sockaddr_un address;
    socklen_t size = abstract_name(token, &address);
    return listen_at(AF_UNIX, (struct sockaddr *)&address, size);
}

static const char *find_abstract(const struct token *token)
{
    struct sockaddr_un address;
    socklen_t size = abstract_name(token, &address);
    return connect_to(AF_UNIX, (struct sockaddr *)&address, size);
}

static struct sockaddr_in loopback(const struct token *token)
{
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port_of(token)),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static const char *hold_tcp(const struct token *token)
{
    struct sockaddr_in address = loopback(token);
    return listen_at(AF_INET, (struct sockaddr *)&address, sizeof address);
}

static const char *find_tcp(const struct token *token)
{
    struct sockaddr_in address = loopback(token);
    return connect_to(AF_INET, (struct sockaddr *)&address, sizeof address);
}

/* A module that is loaded for it would stay. */
static int no_vsock(void)
{
    int missing = is_missing_in("/proc/net/protocols", "AF_VSOCK");
    errno = EAFNOSUPPORT;
    return missing;
}

static const char *hold_vsock(const struct token *token)
{
    if (no_vsock())
        return "socket";
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = port_of(token), .svm_cid = VMADDR_CID_ANY};
    return listen_at(AF_VSOCK, (struct sockaddr *)&address, sizeof address);
}

static const char *find_vsock(const struct token *token)
{
    if (no_vsock())
        return "socket";
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = port_of(token), .svm_cid = 1 /* local */};
    return connect_to(AF_VSOCK, (struct sockaddr *)&address, sizeof address);
}

/* ---- System V and POSIX IPC ---- */

static const char *hold_shm(const struct token *t)
{
    return shmget((key_t)t->key, 4096, IPC_CREAT | IPC_EXCL | 0666) < 0 ? "shmget" : NULL;
}

static const char *find_shm(const struct token *t) { return shmget((key_t)t->key, 0, 0) < 0 ? "shmget" : NULL; }

static const char *hold_msg(const struct token *t)
{
    return msgget((key_t)t->key, IPC_CREAT | IPC_EXCL | 0666) < 0 ? "msgget" : NULL;
}

static const char *find_msg(const struct token *t) { return msgget((key_t)t->key, 0) < 0 ? "msgget" : NULL; }

static const char *hold_sem(const struct token *t)
{
    return semget((key_t)t->key, 1, IPC_CREAT | IPC_EXCL | 0666) < 0 ? "semget" : NULL;
}

static const char *find_sem(const struct token *t) { return semget((key_t)t->key, 0, 0) < 0 ? "semget" : NULL; }

/* By number: some libcs have it in another library. */
static const char *hold_queue(const struct token *token)
{
    char name[64];
    path_of(QUEUE, token, name, sizeof name);
    struct mq_attr attributes = {.mq_maxmsg = 1, .mq_msgsize = 8};
    mode_t before = umask(0);
    long fd = syscall(SYS_mq_open, name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0666, &attributes);
    int err = errno;
    umask(before);
    errno = err;
    return fd < 0 ? "mq_open" : NULL;
}

static const char *find_queue(const struct token *token)
{
    char name[64];
    path_of(QUEUE, token, name, sizeof name);
    return syscall(SYS_mq_open, name, O_RDONLY | O_CLOEXEC, 0, NULL) < 0 ? "mq_open" : NULL;
}

/* ---- keys, locks, events, processes ---- */

static const char *hold_key(const struct token *token)
{
    char name[64];
    path_of(KEY, token, name, sizeof name);
    long key = syscall(SYS_add_key, "user", name, "x", 1ul, KEY_SPEC_USER_KEYRING);
    if (key < 0)
        return "add_key";
    syscall(SYS_keyctl, KEYCTL_SET_TIMEOUT, key, token->seconds + 10); /* gone by itself, whatever becomes of us */
    return NULL;
}

static const char *find_key(const struct token *token)
{
    char name[64];
    path_of(KEY, token, name, sizeof name);
    return syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_USER_KEYRING, "user", name, 0) < 0 ? "keyctl" : NULL;
}

static const char *hold_lock(const struct token *token)
{
    (void)token;
    int fd = open(LOCKED, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return "open";
    return flock(fd, LOCK_SH | LOCK_NB) < 0 ? "flock" : NULL;
}

/* A lock that can't be had is one that another holds: flock(2) asks for no right to write. */
static const char *find_lock(const struct token *token)
{
    (void)token;
    int fd = open(LOCKED, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return "open";
    if (flock(fd, LOCK_EX | LOCK_NB) < 0)
        return errno == EWOULDBLOCK ? NULL : "flock";
    errno = ENOENT;
    return "flock";
}

/* The look ends as soon as enough was seen; on a busy machine, or from a guest, that takes long. */
enum { EVENT_MS = 10, LOOK_MS = 3000, ENOUGH_EVENTS = 15 };

static const char *hold_events(const struct token *token)
{
    (void)token;
    int fd = open(WATCHED, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return "open";
    close(fd);
    return NULL; /* the holder's loop opens it again and again */
}

/* Opening a directory is seen by all who watch it, through whatever mount, and says what another does there. */
static const char *find_events(const struct token *token)
{
    (void)token;
    int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (fd < 0)
        return "inotify_init1";
    if (inotify_add_watch(fd, WATCHED, IN_OPEN | IN_ONLYDIR) < 0)
        return "inotify_add_watch";
    int seen = 0;
    double end = monotonic_seconds() + LOOK_MS / 1000.0;
    while (monotonic_seconds() < end && seen < ENOUGH_EVENTS) {
        char events[1024] __attribute__((aligned(8)));
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, EVENT_MS) != 1)
            continue;
        ssize_t n = read(fd, events, sizeof events);
        for (ssize_t at = 0; at + (ssize_t)sizeof(struct inotify_event) <= n;) {
            const struct inotify_event *event = (const void *)(events + at);
            seen += event->len == 0; /* of the directory itself */
            at += (ssize_t)(sizeof *event + event->len);
        }
    }
    errno = ENOENT;
    return seen >= ENOUGH_EVENTS ? NULL : "read";
}

static const char *hold_process(const struct token *token)
{
    (void)token;
    return NULL; /* its command line has the token */
}

static const char *find_process(const struct token *token)
{
    DIR *dir = opendir("/proc");
    if (!dir)
        return "opendir";
    for (struct dirent *entry; (entry = readdir(dir));) {
        char path[300], line[256];
        uint64_t pid;
        if (parse_number(entry->d_name, &pid) < 0 || pid == (uint64_t)getpid())
            continue;
        snprintf(path, sizeof path, "/proc/%s/cmdline", entry->d_name);
        ssize_t n = read_text(path, line, sizeof line);
        if (n > 0 && memmem(line, (size_t)n, token->text, strlen(token->text))) {
            closedir(dir);
            return NULL;
        }
    }
    closedir(dir);
    errno = ESRCH;
    return "readdir";
}

static void remove_tmp(const struct token *token)
{
    char path[64];
    unlink(path_of(TMP_FILE, token, path, sizeof path));
}

static void remove_shm_file(const struct token *token)
{
    char path[64];
    unlink(path_of(SHM_FILE, token, path, sizeof path));
}

static void remove_shm(const struct token *t) { shmctl(shmget((key_t)t->key, 0, 0), IPC_RMID, NULL); }
static void remove_msg(const struct token *t) { msgctl(msgget((key_t)t->key, 0), IPC_RMID, NULL); }
static void remove_sem(const struct token *t) { semctl(semget((key_t)t->key, 0, 0), 0, IPC_RMID); }

static void remove_queue(const struct token *token)
{
    char name[64];
    syscall(SYS_mq_unlink, path_of(QUEUE, token, name, sizeof name));
}

static void remove_key(const struct token *token)
{
    char name[64];
    path_of(KEY, token, name, sizeof name);
    long key = syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_USER_KEYRING, "user", name, 0);
    if (key > 0)
        syscall(SYS_keyctl, KEYCTL_UNLINK, key, KEY_SPEC_USER_KEYRING);
}

static const struct mark {
    const char *name;
    const char *(*hold)(const struct token *token); /* NULL where it is set, else the call that failed */
    const char *(*find)(const struct token *token);
    void (*remove)(const struct token *token); /* NULL where it ends with its holder */
} marks[] = {
    {"tmp", hold_tmp, find_tmp, remove_tmp},
    {"dev-shm", hold_shm_file, find_shm_file, remove_shm_file},
    {"abstract", hold_abstract, find_abstract, NULL},
    {"tcp", hold_tcp, find_tcp, NULL},
    {"vsock", hold_vsock, find_vsock, NULL},
    {"sysv-shm", hold_shm, find_shm, remove_shm},
    {"sysv-msg", hold_msg, find_msg, remove_msg},
    {"sysv-sem", hold_sem, find_sem, remove_sem},
    {"queue", hold_queue, find_queue, remove_queue},
    {"key", hold_key, find_key, remove_key},
    {"lock", hold_lock, find_lock, NULL},
    {"events", hold_events, find_events, NULL},
    {"process", hold_process, find_process, NULL},
};
enum { MARK_COUNT = sizeof marks / sizeof marks[0] };

static void remove_marks(const struct token *token, unsigned held)
{
    for (unsigned i = 0; i < MARK_COUNT; i++)
        if (held >> i & 1 && marks[i].remove)
            marks[i].remove(token);
}

/* Whatever asks for our end, the terminal too: first the marks are removed. */
static sigset_t signals_to_end(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGQUIT);
    return set;
}

/* Until its time or such a signal; meanwhile the directory is opened as often as `find events` expects. */
static void keep(double seconds)
{
    sigset_t end_signals = signals_to_end();
    double end = monotonic_seconds() + seconds;
    const struct timespec pause = {.tv_nsec = EVENT_MS * 1000000l};
    while (monotonic_seconds() < end && sigtimedwait(&end_signals, NULL, &pause) < 0) {
        int fd = open(WATCHED, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd >= 0)
            close(fd);
    }
}

/* The parent goes when the child has said all: then what started us goes on, and the marks stay. */
static int go_to_the_background(int *ready)
{
    int pipes[2];
    if (pipe(pipes) < 0)
        return complain_failed("pipe");
    pid_t child = fork();
    if (child < 0)
        return complain_failed("fork");
    if (child > 0) {
        char byte;
        close(pipes[1]);
        while (read(pipes[0], &byte, 1) < 0 && errno == EINTR)
            ;
        _exit(PROBE_OK);
    }
    setsid();
    close(pipes[0]);
    *ready = pipes[1];
    return PROBE_OK;
}

static void let_go_of_the_streams(int ready)
{
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; null >= 0 && fd < 3; fd++)
        dup2(null, fd);
    close(ready);
}

int verb_hold(int argc, char **argv)
{
    struct token token;
    double seconds;
    int ready = -1, status = PROBE_OK;
    if (parse_token(argv[1], &token) < 0)
        return bad_argument("a token", argv[1]);
    if (parse_seconds(argv[2], &seconds) < 0)
        return bad_argument("seconds", argv[2]);
    token.seconds = (unsigned)seconds;
    sigset_t end_signals = signals_to_end();
    sigprocmask(SIG_BLOCK, &end_signals, NULL);
    if (argc > 3 && (status = go_to_the_background(&ready)) != PROBE_OK)
        return status;
    if (argc <= 3) /* what it has set must not outlive who asked for it, be he killed */
        prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
    unsigned held = 0;
    for (unsigned i = 0; i < MARK_COUNT; i++) {
        const char *failed = marks[i].hold(&token);
        held |= (unsigned)(failed == NULL) << i;
        printf("%s %s%s%s\n", marks[i].name, failed ? errno_name(errno) : "ok", failed ? " " : "", failed ? failed : "");
    }
    printf("pid %d\n", (int)getpid());
    fflush(stdout);
    if (ready >= 0)
        let_go_of_the_streams(ready);
    keep(seconds);
    remove_marks(&token, held);
    return PROBE_OK;
}

int verb_find(int argc, char **argv)
{
    (void)argc;
    struct token token;
    if (parse_token(argv[2], &token) < 0)
        return bad_argument("a token", argv[2]);
    for (size_t i = 0; i < MARK_COUNT; i++) {
        if (strcmp(marks[i].name, argv[1]) != 0)
            continue;
        const char *failed = marks[i].find(&token);
        return failed ? say_failed(failed) : say_ok();
    }
    return bad_argument("a mark", argv[1]);
}
