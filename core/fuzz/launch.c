/* LAUNCH, and USERNS, which has the same payload. */
#include "fuzz.h"

#include <sched.h>

#define NAMESPACES \
    ((uint64_t)(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP) | 0x80 /* CLONE_NEWTIME */)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    struct rf_launch l;
    struct rf_error e;
    const struct rf_ids ids = {0x71000000, 0x0efe0000};
    const int fds[] = {100, 101, 102};
    if (rf_launch_parse(data, n, fds, 3, &ids, &l, &e) < 0) {
        check_error(&e);
        return 0;
    }
    /* Anything else, CLONE_VM above all, would have init run in the launcher's own memory. */
    CHECK((l.clone_flags & ~NAMESPACES) == 0);
    if (l.has_kill_uid) CHECK(l.kill_uid >= ids.first && l.kill_uid - ids.first < ids.count && l.kill_uid - l.slot_base < RF_SLOT_IDS);
    for (unsigned i = 0; i < l.njoins; i++) {
        CHECK(l.joins[i].fd == 101 || l.joins[i].fd == 102); /* never the answer's socket */
        CHECK((l.joins[i].flag & ~NAMESPACES) == 0 && l.joins[i].flag != CLONE_NEWNS && !(l.clone_flags & l.joins[i].flag));
    }
    if (l.uid_map) check_string(l.uid_map, data, n);
    if (l.gid_map) check_string(l.gid_map, data, n);
    return 0;
}
