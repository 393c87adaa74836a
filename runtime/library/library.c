/* tilewright_open of a library that holds a model: its code and manifest are in it, its weights too or in a file. */
#define _GNU_SOURCE
#include "library.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "error.h"
#include "file.h"

static void release(void *argument)
{
    tw_mapping *weights = argument;
    tw_file_unmap(weights);
    free(weights);
}

/* The sha256 that the manifest lists for the weights. */
static const char *expected_hash(const tw_manifest *manifest)
{
    for (size_t i = 0; i < manifest->file_count; ++i) {
        if (strcmp(manifest->files[i].name, TW_WEIGHTS) == 0) return manifest->files[i].sha256;
    }
    return "";
}

static tilewright_status unreadable(const char *path)
{
    const char *reason = errno == EINVAL ? "not a regular file, or empty" : strerror(errno);
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s cannot be read (%s); copy the weights again", path, reason);
}

static tilewright_status map_weights(const char *path, const tilewright_options *options, tilewright_engine *engine,
                                     tw_mapping *held)
{
    if (!path) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "no path was given; expected that of the weights beside the library");
    }
    if (!options || !(options->flags & TILEWRIGHT_TRUST_FILES)) {
        char found[TW_SHA256_HEX];
        if (!tw_file_hash(AT_FDCWD, path, found)) return unreadable(path);
        if (strcmp(found, expected_hash(tw_engine_manifest(engine))) != 0) {
            return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s is not this library's, or was altered; copy it again", path);
        }
    }
    return tw_file_map(AT_FDCWD, path, held) ? TILEWRIGHT_OK : unreadable(path);
}

static void *find_symbol(void *context, const char *level, const char *name)
{
    (void)context;
    for (const tw_library_symbol *symbol = tw_library_symbols; symbol->name; ++symbol) {
        if (strcmp(symbol->name, name) == 0 && strcmp(symbol->level, level) == 0) return symbol->address;
    }
    return NULL;
}

static tilewright_status load(const char *path, const tilewright_options *options, tilewright_engine *engine)
{
    size_t embedded = (size_t)(tw_library_weights_end - tw_library_weights);
    size_t wordpiece = (size_t)(tw_library_wordpiece_end - tw_library_wordpiece);
    tw_mapping *held = calloc(1, sizeof *held);
    if (!held) return tw_out_of_memory();
    tw_engine_on_close(engine, release, held);
    if (!embedded) {
        tilewright_status status = map_weights(path, options, engine, held);
        if (status != TILEWRIGHT_OK) return status;
    } else if (path) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "%s was given; expected NULL, since this library holds its weights", path);
    }
    const tilewright_model model = {.weights = embedded ? tw_library_weights : held->bytes,
                                    .weights_size = embedded ? embedded : held->size,
                                    .symbol = find_symbol,
                                    .wordpiece = wordpiece ? tw_library_wordpiece : NULL,
                                    .wordpiece_size = wordpiece};
    return tw_engine_finish(engine, &model);
}

tilewright_status tilewright_open(const char *path, const tilewright_options *options, tilewright_engine **result)
{
    tilewright_engine *engine;
    size_t size = (size_t)(tw_library_manifest_end - tw_library_manifest);
    tilewright_status status = tw_engine_begin(tw_library_manifest, size, options, &engine);
    if (status != TILEWRIGHT_OK) return status;
    status = load(path, options, engine);
    if (status == TILEWRIGHT_OK) *result = engine;
    else tilewright_close(engine);
    return status;
}
