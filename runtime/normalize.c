#include "normalize.h"

#include <stdlib.h>

void tw_buffer_push(tw_buffer *buffer, uint32_t item)
{
    if (buffer->size == buffer->capacity) {
        size_t capacity = buffer->capacity ? 2 * buffer->capacity : 256;
        uint32_t *items = capacity <= SIZE_MAX / sizeof *items ? realloc(buffer->items, capacity * sizeof *items) : NULL;
        if (!items) {
            buffer->failed = 1;
            return;
        }
        buffer->items = items;
        buffer->capacity = capacity;
    }
    buffer->items[buffer->size++] = item;
}

/* How many bytes follow one that begins a character; -1 if it begins none. */
static int following(uint32_t lead)
{
    if (lead < 0x80) return 0;
    if (lead < 0xC2) return -1;
    return lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : lead < 0xF5 ? 3 : -1;
}

void tw_decode(const char *text, size_t size, tw_buffer *characters)
{
    const uint8_t *bytes = (const uint8_t *)text;
    size_t at = 0;
    while (at < size) {
        uint32_t lead = bytes[at++], character = lead;
        int more = following(lead);
        if (more > 0) character = lead & 0x3Fu >> more;
        /* the second byte says whether a form is too long, half of a UTF-16 pair, or beyond the last (Unicode, 3.9) */
        uint32_t low = lead == 0xE0   ? 0xA0
                       : lead == 0xF0 ? 0x90
                                      : 0x80,
                 high = lead == 0xED   ? 0x9F
                        : lead == 0xF4 ? 0x8F
                                       : 0xBF;
        for (; more > 0 && at < size && bytes[at] >= low && bytes[at] <= high; --more) {
            character = character << 6 | (bytes[at++] & 0x3Fu);
            low = 0x80, high = 0xBF;
        }
        tw_buffer_push(characters, more ? 0xFFFD : character);
    }
}

/* Where normalised characters go. Marks from `starter` on have yet to find their order. */
typedef struct {
    const tw_wordpiece *table;
    tw_buffer *to;
    size_t starter;
} output;

static void put(output *out, uint32_t character)
{
    uint32_t class = tw_run_find(out->table->classes, out->table->class_count, character, TW_PLAIN);
    tw_buffer *to = out->to;
    tw_buffer_push(to, character | class << 24);
    if (class < TW_MARK) out->starter = to->size;
    if (class < TW_MARK || to->failed) return;
    for (size_t i = to->size - 1; i > out->starter && tw_class(to->items[i - 1]) > class; --i) {
        uint32_t before = to->items[i - 1];
        to->items[i - 1] = to->items[i];
        to->items[i] = before;
    }
}

/* A Korean syllable is one of 19 leading consonants, one of 21 vowels, and one of 27 trailing ones or none (Unicode, 3.12). */
static void put_parts(output *out, uint32_t syllable)
{
    enum { VOWELS = 21, TRAILING = 28 };
    uint32_t number = syllable - 0xAC00, trailing = number % TRAILING;
    put(out, 0x1100 + number / (VOWELS * TRAILING));
    put(out, 0x1161 + number / TRAILING % VOWELS);
    if (trailing) put(out, 0x11A7 + trailing);
}

void tw_normalize(const tw_wordpiece *table, const uint32_t *characters, size_t count, tw_buffer *normalized)
{
    output out = {table, normalized, normalized->size};
    for (size_t i = 0; i < count; ++i) {
        uint32_t rule = tw_run_find(table->rules, table->rule_count, characters[i], TW_SHIFT);
        if (tw_rule_spaced(rule)) put(&out, ' ');
        switch (tw_rule_kind(rule)) {
        case TW_DROP:
            if (tw_rule_starter(rule)) out.starter = normalized->size;
            break;
        case TW_SHIFT:
            put(&out, (uint32_t)((int32_t)characters[i] + tw_rule_operand(rule)));
            break;
        case TW_TEXT:
            for (uint32_t k = 0; k < tw_rule_length(rule); ++k) put(&out, table->texts[(uint32_t)tw_rule_operand(rule) + k]);
            break;
        case TW_HANGUL:
            put_parts(&out, characters[i]);
            break;
        }
        if (tw_rule_spaced(rule)) put(&out, ' ');
    }
}
