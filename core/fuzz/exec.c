/* EXEC. */
#include "fuzz.h"

static void check_vector(char *const *v, const uint8_t *data, size_t n) {
    size_t i = 0;
    for (; v[i]; i++) check_string(v[i], data, n);
    CHECK(i <= RF_ARGS_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static struct rf_exec x;
    struct rf_error e;
    memset(&x, 0xff, sizeof x); /* what an earlier command left there must not matter */
    if (rf_exec_parse(data, n, &x, &e) < 0) {
        check_error(&e);
        return 0;
    }
    CHECK(x.program == -1 && x.argv[0] && (x.flags & ~(uint32_t)RF_X_ALL) == 0);
    check_vector(x.argv, data, n);
    check_vector(x.envp, data, n);
    if (*x.cwd != '/' || x.cwd[1]) check_string(x.cwd, data, n);
    return 0;
}
