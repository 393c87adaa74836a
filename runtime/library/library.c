/* tilewright_open of a library that holds a model: its code and manifest are in it, its weights too or in a file. */
#define _GNU_SOURCE
#include "library.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"
#include "error.h"
#include "sha256.h"

typedef struct {
    void *bytes;
    size_t size;
} mapping;

static void release(void *argument)
{
    mapping *weights = argument;
    if (weights->bytes) munmap(weights->bytes, weights->size);
    free(weights);
}

/* Map the regular file at `path`; false and errno if that cannot be. */
static bool map_file(const char *path, mapping *result)
{
    struct stat status;
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return false;
    int error = fstat(file, &status) != 0 ? errno : S_ISREG(status.st_mode) ? 0 : EINVAL;
    if (!error) {
        void *memory = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0);
        error = errno;
        if (memory != MAP_FAILED) {
            *result = (mapping){memory, (size_t)status.st_size};
            error = 0;
        }
    }
    close(file);
    errno = error;
    return !error;
}

static tilewright_status check_weights(const char *path, const mapping *weights, const tw_manifest *manifest)
{
    char found[TW_SHA256_HEX];
    tw_sha256 hash;
    tw_sha256_init(&hash);
    tw_sha256_update(&hash, weights->bytes, weights->size);
    tw_sha256_finish(&hash, found);
    for (size_t i = 0; i < manifest->file_count; ++i) {
        const tw_file *file = &manifest->files[i];
        if (strcmp(file->name, TW_WEIGHTS) == 0 && strcmp(file->sha256, found) == 0) return TILEWRIGHT_OK;
    }
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s is not the weights of this library, or was altered; copy it again", path);
}

static tilewright_status map_weights(const char *path, const tilewright_options *options, tilewright_engine *engine, mapping *held)
{
    if (!path) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "no path was given; expected that of the weights, which lie beside the library");
    }
    if (!map_file(path, held)) {
        return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s cannot be read (%s); copy the weights again", path, strerror(errno));
    }
    if (options && options->flags & TILEWRIGHT_TRUST_FILES) return TILEWRIGHT_OK;
    return check_weights(path, held, tw_engine_manifest(engine));
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
    mapping *held = calloc(1, sizeof *held);
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
