#include "wordpiece_table.h"

#include <string.h>

enum { MAGIC = 0x50575754, VERSION = 1, LAST_CHARACTER = 0x10FFFF, FIRST_SYLLABLE = 0xAC00, LAST_SYLLABLE = 0xD7A3 };

/* The words of a table's header. */
typedef struct {
    uint32_t magic, version, size, unknown, longest_word;
    uint32_t rules, texts, classes;
    struct {
        uint32_t entries, bytes;
    } dictionaries[3];
    uint32_t prefix, templates[2];
} header;

/* What of a table is not read yet. */
typedef struct {
    const uint8_t *at;
    size_t left;
} reader;

/* The next `count` items of `size` bytes, which are filled up to whole words; NULL if the table ends before. */
static const void *take(reader *table, uint64_t count, size_t size)
{
    uint64_t bytes = (count * size + 3) / 4 * 4;
    if (bytes > table->left) return NULL;
    const void *section = table->at;
    table->at += bytes;
    table->left -= (size_t)bytes;
    return section;
}

uint32_t tw_run_find(const tw_run *runs, uint32_t count, uint32_t character, uint32_t missing)
{
    uint32_t low = 0, high = count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (runs[middle].last < character) low = middle + 1;
        else high = middle;
    }
    return low < count && runs[low].first <= character ? runs[low].value : missing;
}

static int runs_are_good(const tw_run *runs, uint32_t count)
{
    for (uint32_t i = 0; i < count; ++i) {
        if (runs[i].first > runs[i].last || runs[i].last > LAST_CHARACTER) return 0;
        if (i > 0 && runs[i].first <= runs[i - 1].last) return 0;
    }
    return 1;
}

/* Whether a rule makes characters of characters. */
static int rule_is_good(const tw_wordpiece *table, const tw_run *run)
{
    int64_t operand = tw_rule_operand(run->value);
    switch (tw_rule_kind(run->value)) {
    case TW_SHIFT:
        return run->first + operand >= 0 && run->last + operand <= LAST_CHARACTER;
    case TW_TEXT:
        return operand >= 0 && operand + tw_rule_length(run->value) <= table->text_length;
    case TW_HANGUL:
        return run->first >= FIRST_SYLLABLE && run->last <= LAST_SYLLABLE;
    default:
        return 1;
    }
}

static int characters_are_good(const tw_wordpiece *table)
{
    if (!runs_are_good(table->rules, table->rule_count) || !runs_are_good(table->classes, table->class_count)) return 0;
    for (uint32_t i = 0; i < table->text_length; ++i) {
        if (table->texts[i] > LAST_CHARACTER) return 0;
    }
    for (uint32_t i = 0; i < table->class_count; ++i) {
        if (table->classes[i].value > UINT8_MAX) return 0;
    }
    for (uint32_t i = 0; i < table->rule_count; ++i) {
        if (!rule_is_good(table, &table->rules[i])) return 0;
    }
    return 1;
}

static uint32_t length_of(const tw_dictionary *dictionary, uint32_t entry)
{
    return dictionary->starts[entry + 1] - dictionary->starts[entry];
}

static int dictionary_is_good(const tw_dictionary *dictionary)
{
    const uint32_t *starts = dictionary->starts;
    if (starts[0] != 0 || starts[dictionary->size] != dictionary->length) return 0;
    for (uint32_t i = 0; i < dictionary->size; ++i) {
        if (starts[i] >= starts[i + 1] || dictionary->ids[i] > INT32_MAX) return 0;
    }
    for (uint32_t i = 1; i < dictionary->size; ++i) {
        uint32_t before = length_of(dictionary, i - 1), own = length_of(dictionary, i);
        int order = memcmp(dictionary->bytes + starts[i - 1], dictionary->bytes + starts[i], before < own ? before : own);
        if (order > 0 || (order == 0 && before >= own)) return 0;
    }
    return 1;
}

/* Byte `depth` of an entry, or -1 where it has ended: what ends comes before what goes on. */
static int byte_at(const tw_dictionary *dictionary, uint32_t entry, uint32_t depth)
{
    return depth < length_of(dictionary, entry) ? dictionary->bytes[dictionary->starts[entry] + depth] : -1;
}

/* The first of `entries` that goes on with `byte` or more. */
static uint32_t lower_bound(const tw_dictionary *dictionary, tw_entries entries, int byte)
{
    while (entries.low < entries.high) {
        uint32_t middle = entries.low + (entries.high - entries.low) / 2;
        if (byte_at(dictionary, middle, entries.depth) < byte) entries.low = middle + 1;
        else entries.high = middle;
    }
    return entries.low;
}

tw_entries tw_dictionary_narrow(const tw_dictionary *dictionary, tw_entries entries, uint8_t byte)
{
    uint32_t low = lower_bound(dictionary, entries, byte);
    uint32_t high = lower_bound(dictionary, (tw_entries){low, entries.high, entries.depth}, byte + 1);
    return (tw_entries){low, high, entries.depth + 1};
}

int tw_dictionary_ends(const tw_dictionary *dictionary, tw_entries entries)
{
    return entries.low < entries.high && length_of(dictionary, entries.low) == entries.depth;
}

/* Whether a template for so many texts takes each of them once. */
static int template_is_good(const tw_template_token *tokens, uint32_t count, uint32_t texts)
{
    uint32_t seen[3] = {0};
    for (uint32_t i = 0; i < count; ++i) {
        if (tokens[i].text > texts || tokens[i].id > INT32_MAX || tokens[i].type > INT32_MAX) return 0;
        ++seen[tokens[i].text];
    }
    return seen[1] == 1 && seen[2] == texts - 1;
}

static int read_characters(reader *table, const header *counts, tw_wordpiece *result)
{
    result->rule_count = counts->rules;
    result->text_length = counts->texts;
    result->class_count = counts->classes;
    result->rules = take(table, counts->rules, sizeof *result->rules);
    result->texts = take(table, counts->texts, sizeof *result->texts);
    result->classes = take(table, counts->classes, sizeof *result->classes);
    return result->rules && result->texts && result->classes && characters_are_good(result);
}

static int read_dictionary(reader *table, uint32_t entries, uint32_t bytes, tw_dictionary *result)
{
    result->size = entries;
    result->length = bytes;
    result->starts = take(table, (uint64_t)entries + 1, sizeof *result->starts);
    result->ids = take(table, entries, sizeof *result->ids);
    result->bytes = take(table, bytes, 1);
    return result->starts && result->ids && result->bytes && dictionary_is_good(result);
}

static int read_template(reader *table, uint32_t count, int texts, tw_wordpiece *result)
{
    const tw_template_token *tokens = take(table, count, sizeof *tokens);
    result->templates[texts - 1] = tokens;
    result->template_lengths[texts - 1] = count;
    return tokens && template_is_good(tokens, count, (uint32_t)texts);
}

const char *tw_wordpiece_read(const void *bytes, size_t size, tw_wordpiece *result)
{
    static const char damaged[] = "the tokenizer's table is damaged; compile the model again";
    reader table = {bytes, size};
    if ((uintptr_t)bytes % sizeof(uint32_t)) return "the tokenizer's table must start at a multiple of 4";
    const header *counts = take(&table, 1, sizeof *counts);
    if (!counts || counts->magic != MAGIC) return "this is no tokenizer's table; compile the model again";
    if (counts->version != VERSION) return "the tokenizer's table is of another version; compile the model again";
    if (counts->size != size) return "the tokenizer's table is truncated; copy it again";
    tw_dictionary *dictionaries[] = {&result->vocabulary, &result->raw, &result->normalized};
    if (!read_characters(&table, counts, result)) return damaged;
    for (int i = 0; i < 3; ++i) {
        if (!read_dictionary(&table, counts->dictionaries[i].entries, counts->dictionaries[i].bytes, dictionaries[i]))
            return damaged;
    }
    const uint8_t *prefix = take(&table, counts->prefix, 1);
    if (!prefix) return damaged;
    for (int texts = 1; texts <= 2; ++texts) {
        if (!read_template(&table, counts->templates[texts - 1], texts, result)) return damaged;
    }
    result->unknown = counts->unknown;
    result->longest_word = counts->longest_word;
    if (result->unknown > INT32_MAX || table.left) return damaged;
    result->words = result->continued = (tw_entries){0, result->vocabulary.size, 0};
    for (uint32_t i = 0; i < counts->prefix; ++i) {
        result->continued = tw_dictionary_narrow(&result->vocabulary, result->continued, prefix[i]);
    }
    return NULL;
}
