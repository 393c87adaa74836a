/* Opens mutated models in memory, over and over, under sanitizers: whatever is in them, the answer is a status.
 *
 *     fuzz_open ARTIFACT SEED COUNT
 *
 * Mutations are of bytes, of whole chunks, of numbers and words of JSON, and of the header of the weights; half of the
 * manifests are signed again, so that what lies behind the checksum is reached. Kernels are stubs that succeed: what a
 * manifest could make of real ones is not for them to bear. Models that open are run. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "kernel.h"
#include "manifest.h"

typedef struct {
    char *bytes;
    size_t size;
} text;

static uint64_t state;

static size_t draw(size_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return below ? (size_t)(state % below) : 0;
}

static text read_file(const char *directory, const char *name, size_t alignment)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) exit(2);
    text result = {.size = (size_t)ftell(file)};
    rewind(file);
    result.bytes = aligned_alloc(alignment, (result.size / alignment + 1) * alignment);
    if (fread(result.bytes, 1, result.size, file) != result.size) exit(2);
    fclose(file);
    return result;
}

/* A copy of exactly as many bytes, at a multiple of 64, so that reading behind it is noticed. */
static text copy(const char *bytes, size_t size)
{
    text result = {NULL, size};
    void *memory = NULL;
    if (posix_memalign(&memory, 64, size ? size : 1) != 0) exit(2);
    result.bytes = memory;
    if (size) memcpy(memory, bytes, size);
    return result;
}

static text splice(text from, size_t at, size_t remove, const char *insert, size_t length)
{
    text result = copy("", 0);
    free(result.bytes);
    void *memory = NULL;
    result.size = from.size - remove + length;
    if (posix_memalign(&memory, 64, result.size ? result.size : 1) != 0) exit(2);
    result.bytes = memory;
    memcpy(result.bytes, from.bytes, at);
    if (length) memcpy(result.bytes + at, insert, length);
    memcpy(result.bytes + at + length, from.bytes + at + remove, from.size - at - remove);
    free(from.bytes);
    return result;
}

static text mutate(text from, size_t limit)
{
    static const char *const words[] = {"-1",   "0",  "9223372036854775807", "-9223372036854775808", "99999999999999999999", "1e9", "null",
                                        "true", "[]", "{}", "\"\"", "\"groups\"", "\"sequences\"", "\"\\u0000\"", "\"\\ud800\"", "2147483648",
                                        "[[[[[[[[", "\"input_ids\"", "\"table\"", "16", "1048576", "\"addresses\"", "\"int64\""};
    size_t bound = limit < from.size ? limit : from.size, at = draw(bound), run = 1 + draw(40);
    if (bound == 0) return from;
    if (run > from.size - at) run = from.size - at;
    switch (draw(6)) {
    case 0: from.bytes[at] = (char)draw(256); return from;
    case 1: return splice(from, at, run, "", 0);
    case 2: {
        char repeated[40];
        memcpy(repeated, from.bytes + at, run);
        return splice(from, draw(bound), 0, repeated, run);
    }
    case 3: return draw(8) ? from : splice(from, at, from.size - at, "", 0);
    default: { /* the value that follows becomes another */
        while (at < bound && !strchr("0123456789\"-", from.bytes[at])) ++at;
        size_t end = at;
        if (at < bound && from.bytes[at] == '"') {
            for (++end; end < bound && from.bytes[end] != '"'; ++end) continue;
            if (end < bound) ++end;
        } else {
            while (end < bound && strchr("0123456789-", from.bytes[end])) ++end;
        }
        const char *word = words[draw(sizeof words / sizeof *words)];
        return splice(from, at, end - at, word, strlen(word));
    }
    }
}

/* Write the checksum that the manifest should have over the one it states. */
static void sign(text manifest)
{
    tw_arena arena = {0};
    const char *problem;
    const tw_json *root = tw_json_parse(&arena, manifest.bytes, manifest.size, &problem);
    char hex[TW_SHA256_HEX];
    static const char name[] = "\"checksum\": \"";
    if (root && root->type == TW_JSON_OBJECT) {
        tw_sha256 hash;
        tw_sha256_init(&hash);
        tw_json_hash(root, "checksum", &hash);
        tw_sha256_finish(&hash, hex);
        for (size_t i = 0; i + sizeof name + 64 < manifest.size; ++i) {
            if (memcmp(manifest.bytes + i, name, sizeof name - 1) == 0) memcpy(manifest.bytes + i + sizeof name - 1, hex, 64);
        }
    }
    tw_arena_free(&arena);
}

static int stub(void *self, const tw_any *arguments, int32_t count, tw_any *result)
{
    (void)self, (void)result;
    for (int32_t i = 0; i < count; ++i) { /* reads each tensor's ends, and writes the last one whole */
        const tw_tensor *tensor = arguments[i].value.pointer;
        size_t size = tensor->dtype.bits / 8u;
        for (int32_t axis = 0; axis < tensor->ndim; ++axis) size *= (size_t)tensor->shape[axis];
        volatile char *bytes = tensor->data;
        if (size && i + 1 == count) memset(tensor->data, 0, size);
        else if (size) (void)(bytes[0] + bytes[size - 1]);
    }
    return 0;
}

static void *find(void *context, const char *level, const char *symbol)
{
    (void)context, (void)level;
    if (strncmp(symbol, TW_KERNEL_PREFIX, strlen(TW_KERNEL_PREFIX)) != 0) return NULL;
    void *address;
    tw_kernel kernel = stub;
    memcpy(&address, &kernel, sizeof address);
    return address;
}

static void run(tilewright_engine *engine)
{
    const tilewright_info *info = tilewright_describe(engine);
    size_t seq = info->max_positions < 5 ? (size_t)info->max_positions : 5;
    float **outputs = calloc(info->outputs, sizeof *outputs);
    int64_t *ids = calloc(3 * seq, sizeof *ids);
    size_t total = 0;
    for (size_t i = 0; i < info->outputs; ++i) total += (size_t)info->output[i].width;
    if (total < 1 << 16) {
        for (size_t i = 0; i < info->outputs; ++i) outputs[i] = malloc(3 * seq * (size_t)info->output[i].width * sizeof **outputs);
        tilewright_run(engine, ids, NULL, NULL, 3, seq, outputs);
        for (size_t i = 0; i < info->outputs; ++i) free(outputs[i]);
    }
    free(outputs);
    free(ids);
}

int main(int count, char **arguments)
{
    if (count != 4) return 2;
    text manifest = read_file(arguments[1], TW_MANIFEST, 64), weights = read_file(arguments[1], TW_WEIGHTS, 64);
    state = strtoull(arguments[2], NULL, 10) * 2654435761u + 1;
    size_t statuses[8] = {0};
    for (long i = 0, end = atol(arguments[3]); i < end; ++i) {
        text m = copy(manifest.bytes, manifest.size), w = copy(weights.bytes, weights.size);
        bool of_weights = draw(4) == 0;
        for (size_t k = 1 + draw(3); k--;) {
            if (of_weights) w = mutate(w, draw(2) ? 16 : 512);
            else m = mutate(m, m.size);
        }
        if (draw(8)) sign(m);
        tilewright_engine *engine = NULL;
        tilewright_options options = {.threads = 1, .flags = TILEWRIGHT_ANY_CPU};
        tilewright_model model = {.manifest = m.bytes, .manifest_size = m.size, .weights = w.bytes, .weights_size = w.size, .symbol = find};
        tilewright_status status = tilewright_open_model(&model, &options, &engine);
        ++statuses[status];
        if (status == TILEWRIGHT_OK) run(engine);
        else if (!*tilewright_error() || strchr(tilewright_error(), '\n')) return 3;
        tilewright_close(engine);
        free(m.bytes);
        free(w.bytes);
    }
    printf("%zu opened, %zu refused, %zu without memory\n", statuses[0], statuses[2] + statuses[3], statuses[4]);
    free(manifest.bytes);
    free(weights.bytes);
    return 0;
}
