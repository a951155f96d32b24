/* PLAN. The first byte is the number of descriptors that come along. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static struct rf_plan p;
    struct rf_error e;
    if (n == 0) return 0;
    unsigned nfds = data[0] % (RF_FDS_MAX + 1);
    data++, n--;
    if (rf_plan_parse(data, n, fake_fds(), nfds, &p, &e) < 0) {
        check_error(&e);
        return 0;
    }
    CHECK(p.nmounts <= RF_MOUNTS_MAX && p.nrlimits <= RF_RLIMITS_MAX && p.ncgroups <= RF_CGROUPS_MAX);
    CHECK((p.flags & ~(uint32_t)RF_P_ALL) == 0);
    /* To setresuid -1 means "as it is", so it would leave the command root. */
    if (p.has_ids) CHECK(p.uid != UINT32_MAX && p.gid != UINT32_MAX);
    CHECK(p.landlock_fd == -1 || fake_fd(p.landlock_fd, nfds));
    CHECK(p.cpu_fd == -1 || fake_fd(p.cpu_fd, nfds));
    for (unsigned i = 0; i < p.ncgroups; i++) CHECK(fake_fd(p.cgroup_fds[i], nfds));
    for (unsigned i = 0; i < p.nmounts; i++) check_mount(&p.mounts[i], nfds, data, n);
    if (p.hostname) check_string(p.hostname, data, n);
    if (p.workdir) check_string(p.workdir, data, n);
    if (p.entropy_length) CHECK(p.entropy >= data && p.entropy_length <= 512 && p.entropy + p.entropy_length <= data + n);
    if (p.filter.len) {
        const uint8_t *filter = (const uint8_t *)p.filter.filter;
        CHECK(filter >= data && filter + p.filter.len * sizeof(struct sock_filter) <= data + n);
    }
    if (p.answers.len) {
        const uint8_t *filter = (const uint8_t *)p.answers.filter;
        CHECK(filter >= data && filter + p.answers.len * sizeof(struct sock_filter) <= data + n);
    }
    return 0;
}
