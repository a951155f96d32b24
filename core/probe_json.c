/* See probe_json.h. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "probe.h"
#include "probe_json.h"

enum { FILE_LIMIT = 65536 };

/* Length of the UTF-8 sequence at `at`, 0 if it isn't one (RFC 3629: no overlong forms, no surrogates). */
static size_t utf8_length(const unsigned char *at, size_t left)
{
    unsigned char first = at[0];
    size_t length = first < 0x80 ? 1 : first >= 0xc2 && first < 0xe0 ? 2 : (first & 0xf0) == 0xe0 ? 3
                    : first >= 0xf0 && first < 0xf5 ? 4 : 0;
    if (length == 0 || length > left)
        return 0;
    for (size_t i = 1; i < length; i++)
        if ((at[i] & 0xc0) != 0x80)
            return 0;
    if ((first == 0xe0 && at[1] < 0xa0) || (first == 0xed && at[1] > 0x9f) || (first == 0xf0 && at[1] < 0x90)
        || (first == 0xf4 && at[1] > 0x8f))
        return 0;
    return length;
}

static void write_string(FILE *out, const char *bytes, size_t size)
{
    const unsigned char *at = (const unsigned char *)bytes;
    putc('"', out);
    for (size_t i = 0; i < size;) {
        size_t length = utf8_length(at + i, size - i);
        if (length == 0)
            fprintf(out, "\\udc%02x", at[i++]);
        else if (length > 1 || (at[i] >= 0x20 && at[i] != '"' && at[i] != '\\' && at[i] != 0x7f))
            fwrite(at + i, 1, length, out), i += length;
        else
            fprintf(out, "\\u%04x", at[i++]);
    }
    putc('"', out);
}

static void begin(struct json *json, const char *key)
{
    if (json->needs_comma)
        fputs(", ", json->out);
    json->needs_comma = 1;
    if (key) {
        write_string(json->out, key, strlen(key));
        fputs(": ", json->out);
    }
}

void json_open(struct json *json, const char *key, char bracket)
{
    begin(json, key);
    putc(bracket, json->out);
    json->needs_comma = 0;
}

void json_close(struct json *json, char bracket)
{
    putc(bracket, json->out);
    json->needs_comma = 1;
}

void json_bytes(struct json *json, const char *key, const char *bytes, size_t size)
{
    begin(json, key);
    write_string(json->out, bytes, size);
}

void json_text(struct json *json, const char *key, const char *text)
{
    json_bytes(json, key, text, strlen(text));
}

void json_unsigned(struct json *json, const char *key, uint64_t value)
{
    begin(json, key);
    fprintf(json->out, "%" PRIu64, value);
}

void json_signed(struct json *json, const char *key, int64_t value)
{
    begin(json, key);
    fprintf(json->out, "%" PRId64, value);
}

void json_bool(struct json *json, const char *key, int value)
{
    begin(json, key);
    fputs(value ? "true" : "false", json->out);
}

void json_null(struct json *json, const char *key)
{
    begin(json, key);
    fputs("null", json->out);
}

void json_unread(struct json *json, const char *key, int err)
{
    char errno_key[128];
    json_null(json, key);
    snprintf(errno_key, sizeof errno_key, "%s_errno", key);
    json_text(json, errno_key, errno_name(err));
}

void json_file(struct json *json, const char *key, const char *path)
{
    char text[FILE_LIMIT];
    ssize_t n = read_text(path, text, sizeof text);
    if (n < 0) {
        json_unread(json, key, errno);
        return;
    }
    /* attr/current and the like end in NUL, most others in a newline. */
    while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == '\0'))
        n--;
    json_bytes(json, key, text, (size_t)n);
}
