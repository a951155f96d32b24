/* Id maps: written by the launcher itself, or, where an unprivileged caller has subordinate ids, by newuidmap and newgidmap,
 * which are root's. They run as the caller, in the caller's user namespace, and check that the target is the caller's; its pid
 * is that of our own child, which we haven't reaped, and so nobody else's. */
#include "rf.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORDS_MAX 64

static int write_proc(int proc, pid_t pid, const char *file, const char *text, struct rf_error *e) {
    char path[64];
    snprintf(path, sizeof path, "%d/%s", pid, file);
    int fd = openat(proc, path, O_WRONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : write(fd, text, strlen(text));
    if (n < 0) rf_fail(e, "user namespace", "write", file);
    if (fd >= 0) close(fd);
    return n < 0 ? -1 : 0;
}

/* One id may be mapped by whoever owns the user namespace: its own (user_namespaces(7)). */
static bool is_single(const char *map) {
    size_t n = strlen(map);
    return (!strchr(map, '\n') || strchr(map, '\n') == map + n - 1) && n >= 2 && strncmp(map + n - 2 - (map[n - 1] == '\n'), " 1", 2) == 0;
}

/* In the child: becomes the helper. */
static void run_helper(const char *program, pid_t pid, char *map, int said) {
    char *argv[WORDS_MAX + 3], number[21];
    unsigned n = 0;
    argv[n++] = (char *)(uintptr_t)program; /* execve doesn't write to them */
    argv[n++] = rf_decimal(number, (uint64_t)pid);
    char *save = NULL;
    for (char *word = strtok_r(map, " \n", &save); word && n < RF_LEN(argv) - 1; word = strtok_r(NULL, " \n", &save)) argv[n++] = word;
    argv[n] = NULL;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    char *const env[] = {NULL};
    if (dup2(said, 2) == 2) execve(program, argv, env);
    _exit(127);
}

static int map_by_helper(const char *program, pid_t pid, const char *map, struct rf_error *e) {
    char copy[1024], words[400];
    if (strlen(map) >= sizeof copy) return rf_fail_errno(e, E2BIG, "user namespace", program, "too many ranges");
    strcpy(copy, map);
    int said[2], pidfd = -1, status = 0;
    if (pipe2(said, O_CLOEXEC) < 0) return rf_fail(e, "user namespace", "pipe2", "");
    pid_t helper = rf_clone(0, &pidfd);
    if (helper == 0) run_helper(program, pid, copy, said[1]);
    close(said[1]);
    if (helper < 0) rf_fail(e, "user namespace", "clone3", program);
    size_t used = 0;
    for (ssize_t n; helper > 0 && (n = read(said[0], words + used, sizeof words - 1 - used)) > 0;) used += (size_t)n;
    words[used] = 0;
    close(said[0]);
    if (pidfd >= 0) close(pidfd);
    if (helper < 0) return -1;
    if (waitpid(helper, &status, 0) < 0) return rf_fail(e, "user namespace", "waitpid", program);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
    words[strcspn(words, "\n")] = 0;
    return rf_fail_errno(e, WIFEXITED(status) && WEXITSTATUS(status) == 127 ? ENOENT : EPERM, "user namespace", program, words);
}

int rf_write_maps(int proc, pid_t pid, const struct rf_launch *l, bool privileged, struct rf_error *e) {
    if (!l->uid_map || !l->gid_map) return 0;
    if (!privileged && !(is_single(l->uid_map) && is_single(l->gid_map))) {
        if (map_by_helper("/usr/bin/newuidmap", pid, l->uid_map, e) < 0) return -1;
        return map_by_helper("/usr/bin/newgidmap", pid, l->gid_map, e);
    }
    /* Without CAP_SETGID a gid map may only be written once setgroups is denied (user_namespaces(7)). */
    if (!privileged && write_proc(proc, pid, "setgroups", "deny", e) < 0) return -1;
    if (write_proc(proc, pid, "uid_map", l->uid_map, e) < 0) return -1;
    return write_proc(proc, pid, "gid_map", l->gid_map, e);
}

int rf_remember_maps(const struct rf_launch *l, bool privileged, struct rf_maps *m) {
    if (privileged || !l->uid_map || is_single(l->uid_map) || m->uid[0]) return 0;
    if (strlen(l->uid_map) >= sizeof m->uid || strlen(l->gid_map) >= sizeof m->gid) return -1;
    strcpy(m->uid, l->uid_map);
    strcpy(m->gid, l->gid_map);
    return 0;
}

static void remove_as_root(int go, const struct rf_launch *l, int parent, const char *name) {
    char ready;
    unsigned long uid = strtoul(l->uid_map, NULL, 10), gid = strtoul(l->gid_map, NULL, 10);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0 || read(go, &ready, 1) != 1) _exit(1);
    if (syscall(SYS_setresgid, gid, gid, gid) == 0 && syscall(SYS_setresuid, uid, uid, uid) == 0) rf_remove_tree(parent, name);
    _exit(0);
}

/* What a workload gave to a subordinate id only root of a user namespace that has it can remove. */
void rf_remove_mapped(int proc, const struct rf_maps *m, int parent, const char *name) {
    const struct rf_launch l = {.uid_map = m->uid, .gid_map = m->gid};
    struct rf_error ignored;
    int go[2], pidfd = -1;
    if (!m->uid[0] || pipe2(go, O_CLOEXEC) < 0) return;
    pid_t pid = rf_clone(CLONE_NEWUSER, &pidfd);
    if (pid == 0) {
        close(go[1]);
        remove_as_root(go[0], &l, parent, name);
    }
    if (pid > 0 && rf_write_maps(proc, pid, &l, false, &ignored) == 0 && write(go[1], "1", 1) < 0) { /* it ends without */ }
    close(go[0]);
    close(go[1]);
    if (pid > 0) waitpid(pid, NULL, 0);
    if (pidfd >= 0) close(pidfd);
}
