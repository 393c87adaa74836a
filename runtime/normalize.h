/* Text to characters, and these to BERT's normal form: clean, lower case, without accents, as the table's rules say. */
#ifndef TW_NORMALIZE_H
#define TW_NORMALIZE_H

#include "wordpiece_table.h"

/* Characters or tokens that grow in number. */
typedef struct {
    uint32_t *items;
    size_t size, capacity;
    int failed; /* memory was short: what is in it is not all */
} tw_buffer;

void tw_buffer_push(tw_buffer *buffer, uint32_t item);

/* A normalised character has its class in the topmost byte. */
static inline uint32_t tw_character(uint32_t item)
{
    return item & 0xFFFFFF;
}

static inline uint32_t tw_class(uint32_t item)
{
    return item >> 24;
}

/* Append the characters of UTF-8; where it is none, U+FFFD for each longest part that begins a character. */
void tw_decode(const char *text, size_t size, tw_buffer *characters);

/* Append the normal form of `count` characters. */
void tw_normalize(const tw_wordpiece *table, const uint32_t *characters, size_t count, tw_buffer *normalized);

#endif
