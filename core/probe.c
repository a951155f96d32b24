/* ringfence-probe VERB [ARGUMENT…]: the table of verbs, and main. See probe.h for what a verb prints. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "probe.h"

static verb_fn verb_help;

static const struct verb verbs[] = {
    {"help", "— this list", 0, 0, verb_help},

    {"exit", "N — exit with status N", 1, 1, verb_exit},
    {"signal", "N — die by signal N, without a core file", 1, 1, verb_signal},
    {"cat", "— stdin to stdout", 0, 0, verb_cat},
    {"count", "— read stdin to its end; print `BYTES FNV1A64`", 0, 0, verb_count},
    {"emit", "SIZE [BYTE|pattern|all] — SIZE bytes: of one value (x), i mod 251, i mod 256", 1, 2, verb_emit},
    {"both", "[LINES] — `out I` on stdout and `err I` on stderr, in turn (100)", 0, 1, verb_both},
    {"argv", "[ARGUMENT…] — print each argument, followed by NUL", 0, -1, verb_argv},
    {"env", "— print each environment entry, followed by NUL", 0, 0, verb_env},
    {"cwd", "— print the working directory", 0, 0, verb_cwd},
    {"closeout", "SECONDS — close stdout and stderr, sleep, exit 7", 1, 1, verb_closeout},
    {"nostdin", "— never read stdin; sleep 0.2 s, exit 0", 0, 0, verb_nostdin},

    {"stubborn", "[SECONDS] — ignore TERM, INT and HUP; print `ready`, sleep (60)", 0, 1, verb_stubborn},
    {"orphan", "[SECONDS] [detached] — leave a daemon, print `ready PID`, sleep too (60)", 0, 2, verb_orphan},
    {"orphan-exit", "[SECONDS] [detached] — the same, but exit 0 at once", 0, 2, verb_orphan_exit},
    {"spin", "[SECONDS] — burn CPU (60)", 0, 1, verb_spin},
    {"spin-children", "N [SECONDS] — N children that burn CPU; print `ready N`, wait", 1, 2, verb_spin_children},
    {"hog", "SIZE — touch SIZE bytes, print `touched BYTES` on the way, sleep 1 s, print `hogged`", 1, 1, verb_hog},
    {"forkbomb", "MAX — fork up to MAX children, print `forked N ok|ERRNO`, end them all", 1, 1, verb_forkbomb},

    {"ls-fds", "— print `FD TARGET` for each open descriptor", 0, 0, verb_ls_fds},
    {"mkfile", "PATH SIZE [MODE] — write SIZE bytes (i mod 251), mode 0644", 2, 3, verb_mkfile},
    {"read", "PATH — print a file", 1, 1, verb_read},
    {"write", "PATH TEXT — replace a file's content", 2, 2, verb_write},
    {"stat", "PATH — print `TYPE MODE SIZE UID GID NLINK[ -> TARGET]`", 1, 1, verb_stat},
    {"symlink", "TARGET PATH — make a symbolic link", 2, 2, verb_symlink},
    {"touch-out", "PATH — create PATH, which must not exist, and leave it", 1, 1, verb_touch_out},
    {"tree", "DIR — print `TYPE MODE SIZE PATH` for all below DIR, sorted", 1, 1, verb_tree},

    {"bench", "NAME SAMPLES MICROSECONDS [ADDRESS PORT] — a line for each figure: its name, its samples", 3, 5, verb_bench},
    {"clone", "ROUNDS MICROSECONDS — clone with each namespace alone, after a pause: print `NAME NANOSECONDS`", 2, 2,
     verb_clone},
    {"bench-serve", "PORT SECONDS [ADDRESS] — the server of `bench client`, until that ends it (127.0.0.1)", 2, 3,
     verb_bench_serve},

    {"facts", "— print one JSON object: all that this process can see of where it runs", 0, 0, verb_facts},

    /* Each prints exactly one line: `ok` (exit 0), or `ERRNO call` (exit 1). */
    {"try-open-read", "PATH — open for reading, read a byte of a regular file", 1, 1, verb_try_open_read},
    {"try-content", "PATH — read a byte of a file, or an entry of a directory", 1, 1, verb_try_content},
    {"try-open-write", "PATH — open for writing; nothing is written", 1, 1, verb_try_open_write},
    {"try-create", "PATH — create a file, which must not exist, and remove it", 1, 1, verb_try_create},
    {"try-mknod", "PATH — make a device node like /dev/null, and remove it", 1, 1, verb_try_mknod},
    {"try-open-by-handle", "PATH — open a file by its handle, past all path checks", 1, 1, verb_try_open_by_handle},
    {"try-connect4", "ADDRESS PORT — connect by TCP", 2, 2, verb_try_connect4},
    {"try-socket", "FAMILY TYPE — names (inet stream) or numbers", 2, 2, verb_try_socket},
    {"try-unix-abstract", "NAME — connect to an abstract Unix stream socket", 1, 1, verb_try_unix_abstract},
    {"try-kill", "PID SIGNAL — send a signal; 0 only checks", 2, 2, verb_try_kill},
    {"try-ptrace", "PID — attach without stopping it (PTRACE_SEIZE), detach by exiting", 1, 1, verb_try_ptrace},
    {"try-procmem", "PID — read memory through /proc/PID/mem", 1, 1, verb_try_procmem},
    {"try-environ", "PID — read /proc/PID/environ", 1, 1, verb_try_environ},
    {"try-vm-readv", "PID — process_vm_readv at an address that isn't mapped", 1, 1, verb_try_vm_readv},
    {"try-mount", "— mount(2) with a propagation that doesn't exist", 0, 0, verb_try_mount},
    {"try-fsopen", "— make a tmpfs by fsopen and fsmount, attached nowhere", 0, 0, verb_try_fsopen},
    {"try-unshare", "FLAGS — user,mnt,pid,net,ipc,uts,cgroup,time or a number", 1, 1, verb_try_unshare},
    {"try-setns", "PATH TYPE — join the namespace at PATH; TYPE as for try-unshare", 2, 2, verb_try_setns},
    {"try-clone3-user", "— clone3 into a new user namespace", 0, 0, verb_try_clone3_user},
    {"try-chroot", "— chroot to /", 0, 0, verb_try_chroot},
    {"try-sethostname", "[NAME] — set the host name, without NAME to what it is", 0, 1, verb_try_sethostname},
    {"try-settime", "[settimeofday|clock_adjtime] — set the clock's zone or status to what it is", 0, 1,
     verb_try_settime},
    {"try-setuid", "UID — become UID", 1, 1, verb_try_setuid},
    {"try-keyctl", "— make a keyring of this thread's own", 0, 0, verb_try_keyctl},
    {"try-shm", "— make a System V shared memory segment, and remove it", 0, 0, verb_try_shm},
    {"try-bpf", "— create a BPF map", 0, 0, verb_try_bpf},
    {"try-perf", "— count own page faults by perf_event_open", 0, 0, verb_try_perf},
    {"try-io_uring", "— io_uring_setup", 0, 0, verb_try_io_uring},
    {"try-userfaultfd", "— userfaultfd, user mode only", 0, 0, verb_try_userfaultfd},
    {"try-module", "— init_module with an empty image", 0, 0, verb_try_module},
    {"try-reboot", "— reboot(2) with a wrong magic number", 0, 0, verb_try_reboot},
    {"escape", "NAME [ARGUMENT…] — one attempt to get out, by the names in probe_escape.c and probe_escape_kernel.c", 1, 4,
     verb_escape},
    {"try-memory", "SIZE — touch SIZE bytes", 1, 1, verb_try_memory},
    {"try-kernel-addresses", "— whether /proc/kallsyms tells where the kernel is", 0, 0, verb_try_kernel_addresses},
    {"try-foreign", "i386|x32 — getpid by another system call table", 1, 1, verb_try_foreign},
    {"try-tiocsti", "— push input into a terminal of its own, from a bad address", 0, 0, verb_try_tiocsti},

    /* Each prints how far it came, and `ok` or what stopped it. */
    {"try-fds", "N — open N descriptors", 1, 1, verb_try_fds},
    {"try-fill", "SIZE — write SIZE bytes to a file here", 1, 1, verb_try_fill},
    {"statfs", "PATH — print the size of its file system", 1, 1, verb_statfs},

    {"each", "[SECONDS] — a verb with its arguments on each line of stdin: print a line for each", 0, 1, verb_each},
    {"if-listed", "FILE WORD VERB [ARGUMENT…] — that verb, unless FILE can be read and doesn't have WORD", 3, -1,
     verb_if_listed},
    {"hold", "TOKEN SECONDS [background] — set marks that others may find, print which, keep them", 2, 3, verb_hold},
    {"find", "MARK TOKEN — look for a mark that `hold` set", 2, 2, verb_find},
    {"surface", "[LAST] — every system call up to number LAST, with bad arguments: print `NUMBER RESULT`", 0, 1,
     verb_surface},
};

enum { VERB_COUNT = sizeof verbs / sizeof verbs[0] };

static int verb_help(int argc, char **argv)
{
    (void)argc, (void)argv;
    for (size_t i = 0; i < VERB_COUNT; i++)
        printf("%s %s\n", verbs[i].name, verbs[i].usage);
    return PROBE_OK;
}

static const struct verb *find_verb(const char *name)
{
    for (size_t i = 0; i < VERB_COUNT; i++)
        if (strcmp(verbs[i].name, name) == 0)
            return &verbs[i];
    return NULL;
}

int run_verb(int count, char **words)
{
    const struct verb *verb = count > 0 ? find_verb(words[0]) : NULL;
    if (!verb) {
        fprintf(stderr, "ringfence-probe: %s; try `ringfence-probe help`\n", count > 0 ? "no such verb" : "no verb");
        return PROBE_USAGE;
    }
    int args = count - 1;
    if (args < verb->min_args || (verb->max_args >= 0 && args > verb->max_args)) {
        fprintf(stderr, "usage: ringfence-probe %s %s\n", verb->name, verb->usage);
        return PROBE_USAGE;
    }
    return verb->fn(count, words);
}

int main(int argc, char **argv)
{
    int status = run_verb(argc - 1, argv + 1);
    /* A full disk or a closed pipe must not look like success. closeout has closed stdout on purpose. */
    if (fflush(stdout) != 0 && status == PROBE_OK)
        return complain_failed("write");
    return status;
}
