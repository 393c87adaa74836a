#include "json.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 128 };

typedef struct {
    tw_arena *arena;
    const char *at, *end;
    char *texts; /* decoded strings, which together are no longer than the source */
    const char *problem;
} parser;

static tw_json *fail(parser *p, const char *problem)
{
    p->problem = problem;
    return NULL;
}

static void skip_space(parser *p)
{
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\t' || *p->at == '\r')) ++p->at;
}

static bool take(parser *p, char c)
{
    if (p->at == p->end || *p->at != c) return false;
    ++p->at;
    return true;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Four hex digits, or -1. */
static long code_unit(parser *p)
{
    if (p->end - p->at < 4) return -1;
    long unit = 0;
    for (int i = 0; i < 4; ++i) {
        int digit = hex_digit(*p->at++);
        if (digit < 0) return -1;
        unit = unit << 4 | digit;
    }
    return unit;
}

static char *put_utf8(char *to, unsigned long code)
{
    if (code < 0x80) {
        *to++ = (char)code;
        return to;
    }
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *to++ = (char)((0xff00 >> (more + 1) & 0xff) | code >> (6 * more));
    while (more--) *to++ = (char)(0x80 | (code >> (6 * more) & 0x3f));
    return to;
}

/* The length of the UTF-8 sequence at `s`; 0 if it is none. */
static int utf8_length(const unsigned char *s, size_t size)
{
    int length = *s < 0x80 ? 1 : *s < 0xc2 ? 0 : *s < 0xe0 ? 2 : *s < 0xf0 ? 3 : *s < 0xf5 ? 4 : 0;
    if (!length || (size_t)length > size) return 0;
    for (int i = 1; i < length; ++i) {
        if ((s[i] & 0xc0) != 0x80) return 0;
    }
    if ((*s == 0xe0 && s[1] < 0xa0) || (*s == 0xf0 && s[1] < 0x90)) return 0; /* longer than needed */
    if ((*s == 0xed && s[1] > 0x9f) || (*s == 0xf4 && s[1] > 0x8f)) return 0; /* surrogates, beyond Unicode */
    return length;
}

static bool escape(parser *p, char **to)
{
    static const char letters[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    if (p->at == p->end) return false;
    char c = *p->at++;
    if (c != 'u') {
        const char *found = c ? strchr(letters, c) : NULL;
        if (!found) return false;
        *(*to)++ = values[found - letters];
        return true;
    }
    long unit = code_unit(p);
    if (unit < 0) return false;
    if (unit >= 0xd800 && unit < 0xdc00 && p->end - p->at >= 6 && p->at[0] == '\\' && p->at[1] == 'u') {
        const char *before = p->at;
        p->at += 2;
        long low = code_unit(p);
        if (low < 0) return false;
        if (low >= 0xdc00 && low < 0xe000) unit = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
        else p->at = before;
    }
    *to = put_utf8(*to, (unsigned long)unit);
    return true;
}

/* The string whose opening quote was read. */
static bool string(parser *p, const char **text, size_t *length)
{
    char *to = p->texts;
    *text = to;
    while (p->at < p->end && *p->at != '"') {
        unsigned char c = (unsigned char)*p->at;
        if (c < ' ') return fail(p, "a control character in a string");
        if (c == '\\') {
            ++p->at;
            if (!escape(p, &to)) return fail(p, "a bad escape");
            continue;
        }
        int size = utf8_length((const unsigned char *)p->at, (size_t)(p->end - p->at));
        if (!size) return fail(p, "bytes that are not UTF-8");
        memcpy(to, p->at, (size_t)size);
        to += size;
        p->at += size;
    }
    if (!take(p, '"')) return fail(p, "a string without an end");
    *length = (size_t)(to - *text);
    *to++ = 0;
    p->texts = to;
    return true;
}

static bool digits(parser *p)
{
    const char *start = p->at;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') ++p->at;
    return p->at > start;
}

static bool number(parser *p, tw_json *value)
{
    const char *start = p->at;
    take(p, '-');
    if (!take(p, '0') && !digits(p)) return fail(p, "an unknown word");
    if (take(p, '.') && !digits(p)) return fail(p, "a number without digits after its point");
    if (p->at < p->end && (*p->at | 0x20) == 'e') {
        ++p->at;
        if (!take(p, '+')) take(p, '-');
        if (!digits(p)) return fail(p, "a number without an exponent");
    }
    value->length = (size_t)(p->at - start);
    memcpy(p->texts, start, value->length);
    value->text = p->texts;
    p->texts += value->length;
    *p->texts++ = 0;
    return true;
}

static int by_key(const void *left, const void *right)
{
    const tw_json *a = *(tw_json *const *)left, *b = *(tw_json *const *)right;
    size_t shorter = a->key_length < b->key_length ? a->key_length : b->key_length;
    int order = memcmp(a->key, b->key, shorter);
    return order ? order : (a->key_length > b->key_length) - (a->key_length < b->key_length);
}

/* Put the members of an object in the order of their keys. */
static bool sort(parser *p, tw_json *object)
{
    size_t count = object->length;
    if (count < 2) return true;
    tw_json **members = calloc(count, sizeof *members);
    if (!members) return fail(p, NULL);
    size_t i = 0;
    for (tw_json *member = object->first; member; member = member->next) members[i++] = member;
    qsort(members, count, sizeof *members, by_key);
    bool distinct = true;
    for (i = 0; i < count; ++i) {
        members[i]->next = i + 1 < count ? members[i + 1] : NULL;
        distinct &= i + 1 == count || by_key(&members[i], &members[i + 1]) != 0;
    }
    object->first = members[0];
    free(members);
    return distinct || fail(p, "an object with two equal keys");
}

static tw_json *parse_value(parser *p, int depth);

static bool elements(parser *p, tw_json *value, int depth)
{
    bool object = value->type == TW_JSON_OBJECT;
    char close = object ? '}' : ']';
    tw_json **tail = &value->first;
    skip_space(p);
    if (take(p, close)) return true;
    do {
        const char *key = NULL;
        size_t key_length = 0;
        if (object) {
            skip_space(p);
            if (!take(p, '"')) return fail(p, "a member without a name");
            if (!string(p, &key, &key_length)) return false;
            skip_space(p);
            if (!take(p, ':')) return fail(p, "a member without a value");
        }
        tw_json *element = parse_value(p, depth);
        if (!element) return false;
        element->key = key;
        element->key_length = key_length;
        *tail = element;
        tail = &element->next;
        ++value->length;
        skip_space(p);
    } while (take(p, ','));
    if (!take(p, close)) return fail(p, object ? "an object without an end" : "an array without an end");
    return !object || sort(p, value);
}

static bool word(parser *p, const char *expected)
{
    size_t length = strlen(expected);
    if ((size_t)(p->end - p->at) < length || memcmp(p->at, expected, length) != 0) return false;
    p->at += length;
    return true;
}

static tw_json *parse_value(parser *p, int depth)
{
    if (depth == DEPTH) return fail(p, "nested too deeply");
    skip_space(p);
    if (p->at == p->end) return fail(p, "an early end");
    tw_json *value = tw_arena_alloc(p->arena, 1, sizeof *value);
    if (!value) return fail(p, NULL);
    if (*p->at == '{' || *p->at == '[') {
        value->type = *p->at++ == '{' ? TW_JSON_OBJECT : TW_JSON_ARRAY;
        return elements(p, value, depth + 1) ? value : NULL;
    }
    if (take(p, '"')) {
        value->type = TW_JSON_STRING;
        return string(p, &value->text, &value->length) ? value : NULL;
    }
    if (word(p, "null")) value->type = TW_JSON_NULL;
    else if (word(p, "true")) value->type = TW_JSON_TRUE;
    else if (word(p, "false")) value->type = TW_JSON_FALSE;
    else {
        value->type = TW_JSON_NUMBER;
        if (!number(p, value)) return NULL;
    }
    return value;
}

const tw_json *tw_json_parse(tw_arena *arena, const char *text, size_t size, const char **problem)
{
    parser p = {.arena = arena, .at = text, .end = text + size};
    /* a string loses two quotes and gains a NUL; a number gains a NUL, and has a neighbour that is none, save a lone one */
    p.texts = tw_arena_alloc(arena, size + 2, 1);
    const tw_json *value = p.texts ? parse_value(&p, 0) : NULL;
    if (value) {
        skip_space(&p);
        if (p.at < p.end) value = fail(&p, "more than one value");
    }
    *problem = p.problem;
    return value;
}

const tw_json *tw_json_get(const tw_json *value, const char *key)
{
    if (!value || value->type != TW_JSON_OBJECT) return NULL;
    size_t length = strlen(key);
    for (const tw_json *member = value->first; member; member = member->next) {
        if (member->key_length == length && memcmp(member->key, key, length) == 0) return member;
    }
    return NULL;
}

const char *tw_json_string(const tw_json *value)
{
    if (!value || value->type != TW_JSON_STRING || memchr(value->text, 0, value->length)) return NULL;
    return value->text;
}

bool tw_json_integer(const tw_json *value, int64_t *result)
{
    if (!value || value->type != TW_JSON_NUMBER || strpbrk(value->text, ".eE")) return false;
    errno = 0;
    *result = strtoll(value->text, NULL, 10);
    return errno == 0;
}

bool tw_json_boolean(const tw_json *value, bool *result)
{
    if (!value || (value->type != TW_JSON_TRUE && value->type != TW_JSON_FALSE)) return false;
    *result = value->type == TW_JSON_TRUE;
    return true;
}

static void hash_text(tw_sha256 *hash, const char *text)
{
    tw_sha256_update(hash, text, strlen(text));
}

static void hash_unit(tw_sha256 *hash, unsigned long unit)
{
    char escaped[6] = {'\\', 'u'};
    for (int i = 0; i < 4; ++i) escaped[2 + i] = "0123456789abcdef"[unit >> (12 - 4 * i) & 15];
    tw_sha256_update(hash, escaped, sizeof escaped);
}

static void hash_string(tw_sha256 *hash, const char *text, size_t length)
{
    static const char specials[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
    hash_text(hash, "\"");
    for (size_t i = 0; i < length;) {
        unsigned char c = (unsigned char)text[i];
        const char *special = c ? strchr(specials, c) : NULL;
        if (special) {
            tw_sha256_update(hash, (char[]){'\\', letters[special - specials]}, 2);
            ++i;
        } else if (c >= ' ' && c <= '~') {
            tw_sha256_update(hash, &c, 1);
            ++i;
        } else {
            int more = c < 0x80 ? 0 : c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
            unsigned long code = more ? c & (0x3fu >> more) : c;
            for (int k = 1; k <= more; ++k) code = code << 6 | ((unsigned char)text[i + (size_t)k] & 0x3f);
            i += (size_t)more + 1;
            if (code >= 0x10000) {
                hash_unit(hash, 0xd800 + ((code - 0x10000) >> 10));
                code = 0xdc00 + ((code - 0x10000) & 0x3ff);
            }
            hash_unit(hash, code);
        }
    }
    hash_text(hash, "\"");
}

static void hash_value(tw_sha256 *hash, const tw_json *value, const char *without)
{
    static const char *const words[] = {[TW_JSON_NULL] = "null", [TW_JSON_FALSE] = "false", [TW_JSON_TRUE] = "true"};
    bool object = value->type == TW_JSON_OBJECT, first = true;
    switch (value->type) {
    case TW_JSON_NULL:
    case TW_JSON_FALSE:
    case TW_JSON_TRUE: hash_text(hash, words[value->type]); return;
    case TW_JSON_NUMBER: tw_sha256_update(hash, value->text, value->length); return;
    case TW_JSON_STRING: hash_string(hash, value->text, value->length); return;
    case TW_JSON_ARRAY:
    case TW_JSON_OBJECT: break;
    }
    hash_text(hash, object ? "{" : "[");
    for (const tw_json *element = value->first; element; element = element->next) {
        if (object && without && element->key_length == strlen(without) && memcmp(element->key, without, element->key_length) == 0) continue;
        if (!first) hash_text(hash, ",");
        first = false;
        if (object) {
            hash_string(hash, element->key, element->key_length);
            hash_text(hash, ":");
        }
        hash_value(hash, element, NULL);
    }
    hash_text(hash, object ? "}" : "]");
}

void tw_json_hash(const tw_json *object, const char *without, tw_sha256 *hash)
{
    hash_value(hash, object, without);
}
