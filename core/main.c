/* The static helper of ringfence. Its role is its first argument; as /init of a guest it needs none. */
#include "rf.h"

#include <stdio.h>
#include <unistd.h>

#ifndef RF_RELEASE
#define RF_RELEASE "0"
#endif

int main(int argc, char **argv) {
    if (getpid() == 1 && argc > 0 && strcmp(argv[0], "/init") == 0) return rf_guest_main();
    if (argc == 3 && strcmp(argv[1], "launcher") == 0) return rf_launcher_main(3, strcmp(argv[2], "privileged") == 0);
    if (argc == 2 && strcmp(argv[1], "--version") == 0) return puts("ringfence-core " RF_RELEASE) < 0;
    fputs("usage: ringfence-core launcher privileged|unprivileged | --version   (started by ringfence, not by hand)\n", stderr);
    return 2;
}
