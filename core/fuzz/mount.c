/* One step of the file tree, as in TEMPLATE. The first byte is the number of descriptors. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    struct rf_mount m;
    if (n == 0) return 0;
    unsigned nfds = data[0] % (RF_FDS_MAX + 1);
    struct rf_attr a = {.tag = 3, .length = (uint32_t)(n - 1), .data = data + 1};
    if (rf_mount_parse(&a, fake_fds(), nfds, &m) == 0) check_mount(&m, nfds, data + 1, n - 1);
    return 0;
}
