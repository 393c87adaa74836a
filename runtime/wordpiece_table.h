/* The table of a WordPiece tokenizer, as codegen/wordpiece.py writes it, and looking up in it. It is read where it lies. */
#ifndef TW_WORDPIECE_TABLE_H
#define TW_WORDPIECE_TABLE_H

#include <stddef.h>
#include <stdint.h>

/* What a rule makes of a character: nothing, the character `operand` further on, a text, the parts of a Korean syllable. */
enum { TW_DROP, TW_SHIFT, TW_TEXT, TW_HANGUL };

/* Classes of normalised characters. From TW_MARK on they are combining marks, in the order of their combining class. */
enum { TW_PLAIN, TW_SEPARATOR, TW_ISOLATED, TW_MARK };

/* Characters `first` to `last`, of which the same rule or class holds. */
typedef struct {
    uint32_t first, last, value;
} tw_run;

/* Entry i is bytes[starts[i]] to bytes[starts[i + 1] - 1]; entries ascend, and none is empty. */
typedef struct {
    const uint32_t *starts, *ids;
    const uint8_t *bytes;
    uint32_t size, length;
} tw_dictionary;

/* The entries of a dictionary, from `low` up to `high`, that begin with the same `depth` bytes. */
typedef struct {
    uint32_t low, high, depth;
} tw_entries;

/* Of a template: the special token `id` where `text` is 0, else all tokens of text 1 or 2. */
typedef struct {
    uint32_t text, id, type;
} tw_template_token;

typedef struct {
    uint32_t unknown, longest_word;
    uint32_t rule_count, class_count, text_length;
    const tw_run *rules, *classes;
    const uint32_t *texts;
    tw_dictionary vocabulary, raw, normalized; /* the latter: added tokens, found before and after normalising */
    tw_entries words, continued;               /* of the vocabulary: all, and those that go on with a word */
    const tw_template_token *templates[2];     /* for one text and for two */
    uint32_t template_lengths[2];
} tw_wordpiece;

/* Fill *wordpiece from the `size` bytes of `table`, which must stay, and check them. NULL, or one line of what is wrong. */
const char *tw_wordpiece_read(const void *table, size_t size, tw_wordpiece *wordpiece);

/* The value of the run that holds `character`, or `missing`. */
uint32_t tw_run_find(const tw_run *runs, uint32_t count, uint32_t character, uint32_t missing);

/* Those of `entries` that go on with `byte`. */
tw_entries tw_dictionary_narrow(const tw_dictionary *dictionary, tw_entries entries, uint8_t byte);

/* Whether an entry has no more bytes than those that `entries` share; it is entries.low then. */
int tw_dictionary_ends(const tw_dictionary *dictionary, tw_entries entries);

/* The value of a rule: kind in bits 0 to 1, spaced 2, starter 3, length of a text 4 to 7, operand from 8 on. */
static inline uint32_t tw_rule_kind(uint32_t rule)
{
    return rule & 3;
}

static inline int tw_rule_spaced(uint32_t rule)
{
    return rule >> 2 & 1;
}

static inline int tw_rule_starter(uint32_t rule)
{
    return rule >> 3 & 1;
}

static inline uint32_t tw_rule_length(uint32_t rule)
{
    return rule >> 4 & 15;
}

static inline int32_t tw_rule_operand(uint32_t rule)
{
    return (int32_t)rule >> 8;
}

#endif
