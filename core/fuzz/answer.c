/* A filter's answer, as init works it out in a guest. The input is a struct seccomp_data, then a program. */
#include "fuzz.h"

#include <linux/seccomp.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    struct seccomp_data call;
    if (n < sizeof call) return 0;
    memcpy(&call, data, sizeof call);
    data += sizeof call, n -= sizeof call;
    size_t length = n / sizeof(struct sock_filter);
    if (length > RF_BPF_MAX) length = RF_BPF_MAX;
    /* A copy of its own, so that ASan sees where it ends. */
    uint8_t *copy = malloc(length * sizeof(struct sock_filter) + 1);
    memcpy(copy, data, length * sizeof(struct sock_filter));
    const struct sock_fprog program = {.len = (unsigned short)length, .filter = (struct sock_filter *)(void *)copy};
    uint32_t answer = rf_filter_answer(&program, &call);
    if (length == 0) CHECK(answer == (SECCOMP_RET_ERRNO | EPERM));
    free(copy);
    return 0;
}
