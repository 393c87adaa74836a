/* A batch of sequences as a caller gives it, padded or not, and its valid tokens packed as kernels take them. */
#ifndef TW_BATCH_H
#define TW_BATCH_H

#include "manifest.h"

typedef struct {
    const int64_t *ids, *types; /* types may be NULL */
    const int64_t *mask;        /* i64[count, seq]; NULL if all that is given are tokens */
    size_t count, seq;          /* seq is 0 for sequences without padding, which begin at their offsets */
    const int64_t *offsets;     /* i64[count + 1]: valid tokens before each sequence, and in all */
} tw_batch;

/* Check a padded batch whose `ids`, `types`, `mask`, `count` and `seq` are set, fill offsets[count + 1] and set the rest.
 * A mask that keeps everything is dropped. */
tilewright_status tw_batch_pad_check(const tw_manifest *manifest, tw_batch *batch, int64_t *offsets);

/* Check a batch of sequences without padding, all of whose fields are set. */
tilewright_status tw_batch_ragged_check(const tw_manifest *manifest, const tw_batch *batch);

/* The end of the longest run of sequences from `first` on that has at most `tokens` tokens, but at least one sequence. */
size_t tw_batch_chunk(const tw_batch *batch, size_t first, int64_t tokens);

/* Where the valid tokens of sequences go: ids, positions and types (NULL: not wanted) in i32[groups * 16], zero behind the
 * last token, and offsets i32[sequences + 1] from 0. A position counts the sequence's valid tokens. */
typedef struct {
    int32_t *ids, *positions, *types, *offsets;
} tw_packed;

void tw_batch_pack(const tw_batch *batch, size_t first, size_t last, const tw_packed *packed);

/* Put `width` values of each valid token of the sequences from `first` to `last` where the whole batch's output `to` has
 * them; zeros at padding. */
void tw_batch_scatter(const tw_batch *batch, size_t first, size_t last, size_t width, const float *values, float *to);

#endif
