#include <stdbool.h>

#include "engine.h"
#include "error.h"

static tilewright_status check(const tw_wordpiece *table, const tilewright_text *texts, size_t count)
{
    if (!table) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "the model has no WordPiece tokenizer; give input_ids instead of text");
    }
    if (count != 1 && count != 2) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "%zu texts were given; expected one, or two that belong together", count);
    }
    for (size_t i = 0; i < count; ++i) {
        if (!texts[i].bytes && texts[i].size) return tw_fail(TILEWRIGHT_INVALID_INPUT, "text %zu is NULL; expected UTF-8", i);
    }
    return TILEWRIGHT_OK;
}

tilewright_status tilewright_tokenize(const tilewright_engine *engine, const tilewright_text *texts, size_t count,
                                      int32_t truncate, int64_t *input_ids, int64_t *token_type_ids, size_t capacity,
                                      size_t *tokens)
{
    const tw_wordpiece *table = tw_engine_wordpiece(engine);
    int64_t most = tilewright_describe(engine)->max_positions;
    *tokens = 0;
    tilewright_status status = check(table, texts, count);
    if (status != TILEWRIGHT_OK) return status;
    size_t limit = truncate ? (size_t)most : SIZE_MAX;
    int64_t made = tw_wordpiece_encode(table, texts, (int)count, limit, input_ids, token_type_ids, capacity);
    if (made == TW_WORDPIECE_NO_MEMORY) return tw_out_of_memory();
    if (made == TW_WORDPIECE_NO_ROOM) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "the tokenizer adds more special tokens than the %lld that the model takes",
                       (long long)most);
    }
    *tokens = (size_t)made;
    if (*tokens <= capacity) return TILEWRIGHT_OK;
    return tw_fail(TILEWRIGHT_INVALID_INPUT, "the text has %zu tokens, there is room for %zu; give more room, or truncate",
                   *tokens, capacity);
}
