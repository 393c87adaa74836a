#include "batch.h"

#include <string.h>

#include "error.h"

/* The lowest and highest of the valid elements. */
static void extremes(const int64_t *values, const int64_t *mask, size_t size, int64_t *low, int64_t *high)
{
    int64_t lowest = INT64_MAX, highest = INT64_MIN;
    for (size_t i = 0; i < size; ++i) {
        if (mask && !mask[i]) continue;
        lowest = values[i] < lowest ? values[i] : lowest;
        highest = values[i] > highest ? values[i] : highest;
    }
    *low = lowest;
    *high = highest;
}

static tilewright_status check_range(const char *name, const int64_t *values, const int64_t *mask, size_t size, int64_t bound)
{
    int64_t low, high;
    extremes(values, mask, size, &low, &high);
    if (low >= 0 && high < bound) return TILEWRIGHT_OK;
    return tw_fail(TILEWRIGHT_INVALID_INPUT, "%s holds %lld; the model takes 0 to %lld", name, (long long)(low < 0 ? low : high),
                   (long long)bound - 1);
}

static tilewright_status check_tokens(const tw_manifest *manifest, const tw_batch *batch, size_t size)
{
    tilewright_status status = check_range("input_ids", batch->ids, batch->mask, size, manifest->vocab_size);
    if (status != TILEWRIGHT_OK || !batch->types) return status;
    return check_range("token_type_ids", batch->types, batch->mask, size, manifest->token_types);
}

static tilewright_status check_types(const tw_manifest *manifest, const tw_batch *batch)
{
    if (!batch->ids) return tw_fail(TILEWRIGHT_INVALID_INPUT, "input_ids is NULL; expected the ids of at least one token");
    if (!batch->types || manifest->takes_token_types) return TILEWRIGHT_OK;
    return tw_fail(TILEWRIGHT_INVALID_INPUT, "token_type_ids was passed; the model takes input_ids and attention_mask");
}

static tilewright_status too_long(const tw_manifest *manifest, size_t sequence, int64_t length)
{
    return tw_fail(TILEWRIGHT_INVALID_INPUT, "sequence %zu has %lld tokens; the model takes at most %lld", sequence, (long long)length,
                   (long long)manifest->max_positions);
}

/* Fill `offsets` from a mask of zeros and ones. */
static tilewright_status measure_mask(const tw_manifest *manifest, const tw_batch *batch, int64_t *offsets)
{
    size_t longest = 0;
    int64_t most = 0;
    for (size_t i = 0, size = batch->count * batch->seq; i < size; ++i) {
        if (batch->mask[i] & ~INT64_C(1)) {
            return tw_fail(TILEWRIGHT_INVALID_INPUT, "attention_mask holds %lld; expected 1 for tokens and 0 for padding",
                           (long long)batch->mask[i]);
        }
    }
    for (size_t b = 0; b < batch->count; ++b) {
        const int64_t *row = batch->mask + b * batch->seq;
        int64_t length = 0;
        for (size_t i = 0; i < batch->seq; ++i) length += row[i];
        offsets[b + 1] = offsets[b] + length;
        if (length > most) {
            most = length;
            longest = b;
        }
    }
    for (size_t b = 0; b < batch->count; ++b) {
        if (offsets[b + 1] == offsets[b]) {
            return tw_fail(TILEWRIGHT_INVALID_INPUT, "attention_mask of sequence %zu is all zero; every sequence needs a token", b);
        }
    }
    return most > manifest->max_positions ? too_long(manifest, longest, most) : TILEWRIGHT_OK;
}

tilewright_status tw_batch_pad_check(const tw_manifest *manifest, tw_batch *batch, int64_t *offsets)
{
    size_t size;
    if (batch->count == 0 || batch->seq == 0 || __builtin_mul_overflow(batch->count, batch->seq, &size) || size > PTRDIFF_MAX / 8) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "input_ids has shape [%zu, %zu]; expected at least one sequence of at least one token",
                       batch->count, batch->seq);
    }
    tilewright_status status = check_types(manifest, batch);
    if (status != TILEWRIGHT_OK) return status;
    offsets[0] = 0;
    if (batch->mask) {
        status = measure_mask(manifest, batch, offsets);
        if (status == TILEWRIGHT_OK && (size_t)offsets[batch->count] == size) batch->mask = NULL;
    } else {
        for (size_t b = 0; b < batch->count; ++b) offsets[b + 1] = offsets[b] + (int64_t)batch->seq;
        if ((int64_t)batch->seq > manifest->max_positions) status = too_long(manifest, 0, (int64_t)batch->seq);
    }
    batch->offsets = offsets;
    return status == TILEWRIGHT_OK ? check_tokens(manifest, batch, size) : status;
}

tilewright_status tw_batch_ragged_check(const tw_manifest *manifest, const tw_batch *batch)
{
    if (batch->count == 0 || !batch->offsets || batch->offsets[0] != 0) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "%zu sequences with offsets that do not begin with 0; expected at least one", batch->count);
    }
    for (size_t b = 0; b < batch->count; ++b) {
        int64_t length;
        if (__builtin_sub_overflow(batch->offsets[b + 1], batch->offsets[b], &length) || length < 1) {
            return tw_fail(TILEWRIGHT_INVALID_INPUT, "offsets go from %lld to %lld at sequence %zu; every sequence needs a token",
                           (long long)batch->offsets[b], (long long)batch->offsets[b + 1], b);
        }
        if (length > manifest->max_positions) return too_long(manifest, b, length);
    }
    tilewright_status status = check_types(manifest, batch);
    return status == TILEWRIGHT_OK ? check_tokens(manifest, batch, (size_t)batch->offsets[batch->count]) : status;
}

size_t tw_batch_chunk(const tw_batch *batch, size_t first, int64_t tokens)
{
    size_t low = first + 1, high = batch->count; /* the end is in here */
    while (low < high) {
        size_t middle = high - (high - low) / 2;
        if (batch->offsets[middle] - batch->offsets[first] <= tokens) low = middle;
        else high = middle - 1;
    }
    return low;
}

static void pack_row(const int64_t *from, const int64_t *mask, size_t size, int32_t *to)
{
    for (size_t i = 0; i < size; ++i) {
        if (!mask || mask[i]) *to++ = (int32_t)from[i];
    }
}

void tw_batch_pack(const tw_batch *batch, size_t first, size_t last, const tw_packed *packed)
{
    const int64_t *offsets = batch->offsets, base = offsets[first];
    size_t tokens = (size_t)(offsets[last] - base), padding = -tokens % TW_GROUP;
    for (size_t b = first; b < last; ++b) {
        size_t begin = (size_t)(offsets[b] - base), length = (size_t)(offsets[b + 1] - offsets[b]);
        size_t from = batch->seq ? b * batch->seq : (size_t)offsets[b], size = batch->seq ? batch->seq : length;
        const int64_t *mask = batch->mask ? batch->mask + from : NULL;
        packed->offsets[b - first] = (int32_t)begin;
        pack_row(batch->ids + from, mask, size, packed->ids + begin);
        if (packed->types && batch->types) pack_row(batch->types + from, mask, size, packed->types + begin);
        for (size_t i = 0; i < length; ++i) packed->positions[begin + i] = (int32_t)i;
    }
    packed->offsets[last - first] = (int32_t)tokens;
    memset(packed->ids + tokens, 0, padding * sizeof *packed->ids);
    memset(packed->positions + tokens, 0, padding * sizeof *packed->positions);
    if (packed->types && batch->types) memset(packed->types + tokens, 0, padding * sizeof *packed->types);
    else if (packed->types) memset(packed->types, 0, (tokens + padding) * sizeof *packed->types);
}

void tw_batch_scatter(const tw_batch *batch, size_t first, size_t last, size_t width, const float *values, float *to)
{
    if (!batch->mask) {
        size_t begin = (size_t)batch->offsets[first], tokens = (size_t)batch->offsets[last] - begin;
        memcpy(to + begin * width, values, tokens * width * sizeof *values);
        return;
    }
    for (size_t i = first * batch->seq; i < last * batch->seq; ++i) {
        if (batch->mask[i]) {
            memcpy(to + i * width, values, width * sizeof *values);
            values += width;
        } else {
            memset(to + i * width, 0, width * sizeof *values);
        }
    }
}
