#include "wordpiece.h"

#include <stdlib.h>

#include "normalize.h"

/* UTF-8 of a character; how many bytes that is. */
static int utf8(uint32_t character, uint8_t bytes[4])
{
    if (character < 0x80) {
        bytes[0] = (uint8_t)character;
        return 1;
    }
    int more = character < 0x800 ? 1 : character < 0x10000 ? 2 : 3;
    bytes[0] = (uint8_t)(0xFF00u >> (more + 1) | character >> 6 * more);
    for (int i = 1; i <= more; ++i) bytes[i] = (uint8_t)(0x80 | (character >> 6 * (more - i) & 0x3F));
    return more + 1;
}

/* The longest of `entries` that `characters` begin with: how many of them it takes, 0 if there is none, and its id. */
static size_t longest(const tw_dictionary *dictionary, tw_entries entries, const uint32_t *characters, size_t count,
                      uint32_t *id)
{
    size_t found = 0;
    for (size_t i = 0; i < count && entries.low < entries.high; ++i) {
        uint8_t bytes[4];
        int size = utf8(tw_character(characters[i]), bytes);
        for (int k = 0; k < size; ++k) entries = tw_dictionary_narrow(dictionary, entries, bytes[k]);
        if (!tw_dictionary_ends(dictionary, entries)) continue;
        found = i + 1;
        *id = dictionary->ids[entries.low];
    }
    return found;
}

static void add_word(const tw_wordpiece *table, const uint32_t *word, size_t count, tw_buffer *tokens)
{
    size_t before = tokens->size, at = 0;
    while (at < count && count <= table->longest_word) {
        uint32_t id;
        size_t size = longest(&table->vocabulary, at ? table->continued : table->words, word + at, count - at, &id);
        if (!size) break;
        tw_buffer_push(tokens, id);
        at += size;
    }
    if (at == count) return;
    tokens->size = before; /* what has an unknown part is unknown as a whole */
    tw_buffer_push(tokens, table->unknown);
}

/* Cut normalised characters into words; an isolated one is a word by itself. */
static void add_words(const tw_wordpiece *table, const uint32_t *characters, size_t count, tw_buffer *tokens)
{
    size_t start = 0;
    for (size_t i = 0; i <= count; ++i) {
        uint32_t class = i < count ? tw_class(characters[i]) : TW_SEPARATOR;
        if (class != TW_SEPARATOR && class != TW_ISOLATED) continue;
        if (start < i) add_word(table, characters + start, i - start, tokens);
        if (class == TW_ISOLATED) add_word(table, characters + i, 1, tokens);
        start = i + 1;
    }
}

/* The next added token at or after *at, the leftmost and of these the longest. Sets *at to its place, or to `count`, and
 * returns how many characters it takes, or 0. */
static size_t find_added(const tw_dictionary *added, const uint32_t *characters, size_t count, size_t *at, uint32_t *id)
{
    for (; added->size && *at < count; ++*at) {
        size_t size = longest(added, (tw_entries){0, added->size, 0}, characters + *at, count - *at, id);
        if (size) return size;
    }
    *at = count;
    return 0;
}

static void add_normalized(const tw_wordpiece *table, const tw_buffer *normalized, tw_buffer *tokens)
{
    for (size_t at = 0, size; at < normalized->size; at += size) {
        size_t start = at;
        uint32_t id;
        size = find_added(&table->normalized, normalized->items, normalized->size, &at, &id);
        add_words(table, normalized->items + start, at - start, tokens);
        if (size) tw_buffer_push(tokens, id);
    }
}

/* Append the tokens of a text, without special tokens around them; whether there was memory for it. */
static int add_text(const tw_wordpiece *table, tilewright_text text, tw_buffer *tokens)
{
    tw_buffer characters = {0}, normalized = {0};
    tw_decode(text.bytes, text.size, &characters);
    for (size_t at = 0, size; at < characters.size; at += size) {
        size_t start = at;
        uint32_t id;
        size = find_added(&table->raw, characters.items, characters.size, &at, &id);
        normalized.size = 0;
        tw_normalize(table, characters.items + start, at - start, &normalized);
        add_normalized(table, &normalized, tokens);
        if (size) tw_buffer_push(tokens, id);
    }
    free(characters.items);
    free(normalized.items);
    return !characters.failed && !normalized.failed && !tokens->failed;
}

/* How many tokens of each text are kept if both may have `room` together: the longer one loses its end first. */
static void cut(size_t room, size_t kept[2])
{
    if (kept[0] + kept[1] <= room) return;
    int longer = kept[0] <= kept[1], shorter = 1 - longer;
    if (kept[shorter] > room / 2) kept[shorter] = room / 2;
    kept[longer] = room - kept[shorter];
}

int64_t tw_wordpiece_encode(const tw_wordpiece *table, const tilewright_text *texts, int count, size_t limit, int64_t *ids,
                            int64_t *types, size_t capacity)
{
    const tw_template_token *template = table->templates[count - 1];
    size_t length = table->template_lengths[count - 1], special = length - (size_t)count;
    if (limit < special) return TW_WORDPIECE_NO_ROOM;
    tw_buffer tokens[2] = {{0}, {0}};
    int done = 1;
    for (int i = 0; i < count && done; ++i) done = add_text(table, texts[i], &tokens[i]);
    size_t kept[2] = {tokens[0].size, tokens[1].size}, total = 0;
    cut(limit - special, kept);
    for (size_t i = 0; i < length && done; ++i) {
        const tw_template_token *part = &template[i];
        size_t size = part->text ? kept[part->text - 1] : 1;
        for (size_t k = 0; k < size && total + k < capacity; ++k) {
            ids[total + k] = part->text ? tokens[part->text - 1].items[k] : part->id;
            if (types) types[total + k] = part->type;
        }
        total += size;
    }
    free(tokens[0].items);
    free(tokens[1].items);
    return done ? (int64_t)total : TW_WORDPIECE_NO_MEMORY;
}
