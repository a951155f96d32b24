/* LAUNCH, and USERNS, which has the same payload. */
#include "fuzz.h"

#include <sched.h>

#define NAMESPACES \
    ((uint64_t)(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP) | 0x80 /* CLONE_NEWTIME */)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    struct rf_launch l;
    struct rf_error e;
    if (rf_launch_parse(data, n, &l, &e) < 0) {
        check_error(&e);
        return 0;
    }
    /* Anything else, CLONE_VM above all, would have init run in the launcher's own memory. */
    CHECK((l.clone_flags & ~NAMESPACES) == 0);
    if (l.has_kill_uid) CHECK(l.kill_uid != 0 && l.kill_uid != UINT32_MAX);
    if (l.uid_map) check_string(l.uid_map, data, n);
    if (l.gid_map) check_string(l.gid_map, data, n);
    return 0;
}
