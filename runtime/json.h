/* JSON (RFC 8259) to a tree, for files that may be damaged or hostile: strict, with bounded depth. */
#ifndef TW_JSON_H
#define TW_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arena.h"
#include "sha256.h"

typedef enum { TW_JSON_NULL, TW_JSON_FALSE, TW_JSON_TRUE, TW_JSON_NUMBER, TW_JSON_STRING, TW_JSON_ARRAY, TW_JSON_OBJECT } tw_json_type;

/* A value. Text is UTF-8, ends with a NUL that does not count, and may hold NULs; the halves of surrogate pairs that stand
 * alone, which JSON can write and Unicode forbids, are three bytes each. */
typedef struct tw_json {
    tw_json_type type;
    size_t length;        /* of a string or number: bytes of `text`; of an array or object: elements */
    const char *text;     /* the decoded string, or the number as it was written */
    size_t key_length;
    const char *key;      /* in an object */
    struct tw_json *first; /* elements of an array, members of an object: in the order of keys once sorted */
    struct tw_json *next;
} tw_json;

/* Parse `size` bytes; the tree lives in `arena`. NULL and *problem, a few words, if it is no JSON or holds an object with
 * two equal keys; *problem is NULL if memory ran out. Members are sorted by key. */
const tw_json *tw_json_parse(tw_arena *arena, const char *text, size_t size, const char **problem);

/* The member `key` of an object; NULL if `value` is none or has no such member. */
const tw_json *tw_json_get(const tw_json *value, const char *key);

/* A string's text if it holds no NUL, or else NULL. */
const char *tw_json_string(const tw_json *value);

/* Whether `value` is an integer of 64 bits, put in *result. */
bool tw_json_integer(const tw_json *value, int64_t *result);

bool tw_json_boolean(const tw_json *value, bool *result);

/* Hash an object's members other than `without` in the one form that equal objects share: members in the order of keys,
 * no spaces, ASCII only, numbers as they were written. This is what Python's json.dumps(..., sort_keys=True,
 * separators=(",", ":")) writes. */
void tw_json_hash(const tw_json *object, const char *without, tw_sha256 *hash);

#endif
