/* The probe: a static workload with verbs, started inside every level by the tests and by `compare`.
 *
 * A verb is one small function in the table of probe.c. What a verb prints is a contract with the tests:
 *   - a verb that does something prints `ok`, or `ERRNO_NAME call` and exits 1;
 *   - a verb that shows something prints it, or puts `ERRNO_NAME call` on stderr and exits 1;
 *   - wrong usage is exit status 2, with the usage on stderr.
 * Every verb is harmless when an unconfined root runs it: that run is the positive control of a denial test.
 */
#ifndef RINGFENCE_PROBE_H
#define RINGFENCE_PROBE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { PROBE_OK = 0, PROBE_FAILED = 1, PROBE_USAGE = 2 };
enum { MAX_FDS = 4096 };

/* argv[0] is the verb itself; argc counts it. Returns the exit status. */
typedef int verb_fn(int argc, char **argv);

struct verb {
    const char *name;
    const char *usage; /* arguments, then what it does */
    int min_args;
    int max_args; /* -1: any number */
    verb_fn *fn;
};

/* probe_util.c */
const char *errno_name(int err);
int say_ok(void);
int say_failed(const char *call);      /* `ERRNO call` from errno, on stdout */
int complain_failed(const char *call); /* the same on stderr, for verbs whose stdout is content */
int bad_argument(const char *what, const char *value);
int parse_number(const char *text, uint64_t *value); /* decimal, 0x, 0 octal */
int parse_size(const char *text, uint64_t *value);   /* bytes, with K, M or G for powers of 1024 */
int parse_seconds(const char *text, double *value);
int parse_pid(const char *text, pid_t *pid);
void sleep_seconds(double seconds);
double monotonic_seconds(void);
int write_all(int fd, const void *data, size_t size);
int list_fds(int *fds, int max);                           /* open descriptors, ascending; returns how many */
void fd_target(int fd, char *target, size_t size);         /* what it is open on, "?" where /proc can't tell */
ssize_t read_text(const char *path, char *text, size_t size); /* NUL-terminated, cut at size - 1 */
int is_missing_in(const char *path, const char *word); /* 1 where the file can be read and doesn't have that word */

/* probe_basic.c: exit status, streams, arguments */
verb_fn verb_exit, verb_signal, verb_cat, verb_count, verb_emit, verb_both, verb_argv, verb_env, verb_cwd;
verb_fn verb_closeout, verb_nostdin;

/* probe_load.c: processes, CPU and memory */
verb_fn verb_stubborn, verb_orphan, verb_orphan_exit, verb_spin, verb_spin_children, verb_hog, verb_forkbomb;

/* probe_files.c */
verb_fn verb_ls_fds, verb_mkfile, verb_read, verb_write, verb_stat, verb_symlink, verb_touch_out, verb_tree;

/* probe_try.c: one attempt at what a boundary should stop, on files, sockets and other processes */
verb_fn verb_try_open_read, verb_try_content, verb_try_open_write, verb_try_create, verb_try_mknod, verb_try_open_by_handle;
verb_fn verb_try_connect4, verb_try_socket, verb_try_unix_abstract;
verb_fn verb_try_kill, verb_try_ptrace, verb_try_procmem, verb_try_environ, verb_try_vm_readv;

/* probe_try_kernel.c: the same for what needs privilege or a large kernel interface */
verb_fn verb_try_mount, verb_try_fsopen, verb_try_unshare, verb_try_setns, verb_try_clone3_user, verb_try_chroot;
verb_fn verb_try_sethostname, verb_try_settime, verb_try_setuid, verb_try_keyctl, verb_try_shm, verb_try_bpf, verb_try_perf;
verb_fn verb_try_io_uring, verb_try_userfaultfd, verb_try_module, verb_try_reboot, verb_try_tiocsti;

/* probe_escape.c and probe_escape_kernel.c: attempts to get out, or to change what is outside, by name */
verb_fn verb_escape;

/* probe_facts.c */
verb_fn verb_facts;

/* probe_each.c: many attempts in one run */
verb_fn verb_each, verb_if_listed;
void leave_no_core(void);
int run_verb(int count, char **words); /* probe.c: what main does with its arguments; returns the exit status */

/* probe_marks.c: channels between two processes */
verb_fn verb_hold, verb_find;

/* probe_limits.c: using much, and other doors into the kernel */
verb_fn verb_try_memory, verb_try_fds, verb_try_fill, verb_statfs, verb_try_kernel_addresses, verb_try_foreign;

/* probe_surface.c: every system call, with arguments that do no harm */
verb_fn verb_surface;

/* probe_bench.c, probe_bench_net.c: what things cost, timed inside */
verb_fn verb_bench, verb_bench_serve, verb_clone;

#endif
