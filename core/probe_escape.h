/* The attempts of `escape`, in two tables. */
#ifndef RINGFENCE_PROBE_ESCAPE_H
#define RINGFENCE_PROBE_ESCAPE_H

#include <stddef.h>

struct escape {
    const char *name;
    int arguments; /* at least */
    /* NULL where it worked, else the call that failed, with errno. argv[0] is the name; NULL-terminated. */
    const char *(*attempt)(char **argv);
};

extern const struct escape kernel_escapes[];
extern const size_t kernel_escape_count;

#endif
