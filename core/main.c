/* The static helper of ringfence. Its role is its first argument; as /init of a guest it needs none. */
#include "rf.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#ifndef RF_RELEASE
#define RF_RELEASE "0"
#endif

/* The ids of sandboxes. Python has looked that no account has them; whatever it says, none are below 65536, where accounts
 * and the ids that systemd hands out are, nor above what a signed uid can hold. */
static bool parse_ids(const char *first, const char *count, struct rf_ids *ids) {
    char *end1, *end2;
    unsigned long from = strtoul(first, &end1, 10), n = strtoul(count, &end2, 10);
    if (*end1 || *end2 || from < RF_SLOT_IDS || from > INT32_MAX || n < RF_SLOT_IDS || n > INT32_MAX - from || n % RF_SLOT_IDS) return false;
    *ids = (struct rf_ids){(uint32_t)from, (uint32_t)n};
    return true;
}

int main(int argc, char **argv) {
    if (getpid() == 1 && argc > 0 && strcmp(argv[0], "/init") == 0) return rf_guest_main();
    struct rf_ids ids;
    if (argc == 3 && strcmp(argv[1], "launcher") == 0 && strcmp(argv[2], "unprivileged") == 0) return rf_launcher_main(3, NULL);
    if (argc == 4 && strcmp(argv[1], "launcher") == 0 && parse_ids(argv[2], argv[3], &ids)) return rf_launcher_main(3, &ids);
    if (argc == 2 && strcmp(argv[1], "warm") == 0) return rf_warm_main();
    if (argc == 2 && strcmp(argv[1], "--version") == 0) return puts("ringfence-core " RF_RELEASE) < 0;
    fputs("usage: ringfence-core launcher FIRST-ID COUNT | launcher unprivileged | --version   (started by ringfence, not by hand)\n", stderr);
    return 2;
}
