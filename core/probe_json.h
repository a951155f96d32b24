/* A JSON writer just large enough for the probe's facts. Text that isn't UTF-8 becomes lone surrogates, the way
 * Python's surrogateescape does it, so os.fsencode gives the bytes back. */
#ifndef RINGFENCE_PROBE_JSON_H
#define RINGFENCE_PROBE_JSON_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct json {
    FILE *out;
    int needs_comma;
};

/* `key` is NULL inside an array. */
void json_open(struct json *json, const char *key, char bracket); /* '{' or '[' */
void json_close(struct json *json, char bracket);                 /* '}' or ']' */
void json_text(struct json *json, const char *key, const char *text);
void json_bytes(struct json *json, const char *key, const char *bytes, size_t size);
void json_unsigned(struct json *json, const char *key, uint64_t value);
void json_signed(struct json *json, const char *key, int64_t value);
void json_bool(struct json *json, const char *key, int value);
void json_null(struct json *json, const char *key);

/* What can't be read: `"key": null, "key_errno": "EACCES"`. */
void json_unread(struct json *json, const char *key, int err);
/* A whole small file as text, less its last newline, or json_unread. */
void json_file(struct json *json, const char *key, const char *path);

#endif
