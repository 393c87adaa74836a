/* Text to token ids as BERT's tokenizers make them: WordPiece, from a table that the compiler made of tokenizer.json. */
#ifndef TW_WORDPIECE_H
#define TW_WORDPIECE_H

#include "tilewright.h"
#include "wordpiece_table.h"

enum { TW_WORDPIECE_NO_MEMORY = -1, TW_WORDPIECE_NO_ROOM = -2 };

/* Tokens of one text, or of two that belong together, with the special tokens around them.
 *
 * limit: the most tokens to make, by cutting the end of the longer text first; SIZE_MAX for all. ids, types: room for
 * `capacity` tokens each; types may be NULL. Returns the number of tokens, of which at most `capacity` were written;
 * TW_WORDPIECE_NO_MEMORY; or TW_WORDPIECE_NO_ROOM where special tokens alone are more than `limit`. Several threads may use
 * one table. */
int64_t tw_wordpiece_encode(const tw_wordpiece *table, const tilewright_text *texts, int count, size_t limit, int64_t *ids,
                            int64_t *types, size_t capacity);

#endif
