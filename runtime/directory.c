/* Opening an artifact's directory: every file is checked before any of its code runs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"
#include "error.h"
#include "file.h"

enum {
    ATTEMPTS = 50, /* to read an artifact that others replace meanwhile */
    MANIFEST_BYTES = 1 << 28 /* more than any has */
};

/* What an engine holds of its artifact. */
typedef struct {
    tw_mapping weights, wordpiece;
    void *library;
} resources;

static void release(void *argument)
{
    resources *held = argument;
    if (held->library) dlclose(held->library);
    tw_file_unmap(&held->weights);
    tw_file_unmap(&held->wordpiece);
    free(held);
}

static tilewright_status unreadable(const char *path, const char *name, const char *reason)
{
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s/%s cannot be read (%s); copy the artifact again", path, name, reason);
}

static tilewright_status read_manifest(int directory, const char *path, char **text, size_t *size)
{
    int file = tw_file_open(directory, TW_MANIFEST, size);
    ssize_t count = -1;
    *text = NULL;
    if (file >= 0 && *size > MANIFEST_BYTES) errno = EFBIG;
    else if (file >= 0 && (*text = malloc(*size + 1))) count = tw_file_read(file, *text, *size);
    int error = errno;
    if (file >= 0) close(file);
    if (count >= 0) {
        *size = (size_t)count;
        return TILEWRIGHT_OK;
    }
    free(*text);
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT,
                   "%s is not an artifact (" TW_MANIFEST ": %s); expected what `tilewright compile` writes", path, strerror(error));
}

static tilewright_status check_file(int directory, const char *path, const tw_file *expected)
{
    char found[TW_SHA256_HEX];
    if (!tw_file_hash(directory, expected->name, found)) {
        return unreadable(path, expected->name, errno == EINVAL ? "not a regular file" : strerror(errno));
    }
    if (strcmp(found, expected->sha256) == 0) return TILEWRIGHT_OK;
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT,
                   "%s/%s was altered: its sha256 is %.12s..., the manifest says %.12s...; copy or compile it again", path,
                   expected->name, found, expected->sha256);
}

static tilewright_status check_files(int directory, const char *path, const tw_manifest *manifest)
{
    tilewright_status status = TILEWRIGHT_OK;
    for (size_t i = 0; status == TILEWRIGHT_OK && i < manifest->file_count; ++i) {
        status = check_file(directory, path, &manifest->files[i]);
    }
    return status;
}

static tilewright_status map_file(int directory, const char *path, const char *name, tw_mapping *mapping)
{
    return tw_file_map(directory, name, mapping) ? TILEWRIGHT_OK : unreadable(path, name, strerror(errno));
}

static bool has_file(const tw_manifest *manifest, const char *name)
{
    for (size_t i = 0; i < manifest->file_count; ++i) {
        if (strcmp(manifest->files[i].name, name) == 0) return true;
    }
    return false;
}

/* Load the library `name`. glibc takes a path that it has loaded before for the same library, even where another file has
 * taken that place since, as when an artifact is compiled anew; so the path, which goes through the open directory, is
 * spelled by the number of the file: a bit is a slash, with a dot behind it or not. */
static tilewright_status load_library(int directory, const char *path, const char *name, resources *held)
{
    struct stat file;
    if (fstatat(directory, name, &file, 0) != 0) return unreadable(path, name, strerror(errno));
    char *spelling = malloc(strlen(name) + 256);
    if (!spelling) return tw_out_of_memory();
    char *at = spelling + sprintf(spelling, "/proc/self/fd/%d", directory);
    uint64_t number = (uint64_t)file.st_ino ^ (uint64_t)file.st_dev << 48;
    for (int bit = 0; bit < 64; ++bit) {
        *at++ = '/';
        if (number >> bit & 1) *at++ = '.';
    }
    sprintf(at, "/%s", name);
    held->library = dlopen(spelling, RTLD_NOW | RTLD_LOCAL);
    tilewright_status status = TILEWRIGHT_OK;
    if (!held->library) {
        const char *reason = dlerror();
        size_t length = strlen(spelling);
        if (!reason) reason = "no reason given";
        if (strncmp(reason, spelling, length) == 0) reason += length + strspn(reason + length, ": ");
        status = tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s/%s cannot be loaded (%s); compile the model again", path, name, reason);
    }
    free(spelling);
    return status;
}

static void *find_symbol(void *library, const char *level, const char *symbol)
{
    (void)level;
    return dlsym(library, symbol);
}

/* Check the files, then load them. */
static tilewright_status load(int directory, const char *path, const tilewright_options *options, tilewright_engine *engine)
{
    resources *held = calloc(1, sizeof *held);
    if (!held) return tw_out_of_memory();
    tw_engine_on_close(engine, release, held);
    tilewright_status status = TILEWRIGHT_OK;
    if (!options || !(options->flags & TILEWRIGHT_TRUST_FILES)) status = check_files(directory, path, tw_engine_manifest(engine));
    if (status == TILEWRIGHT_OK) status = map_file(directory, path, TW_WEIGHTS, &held->weights);
    if (status == TILEWRIGHT_OK && has_file(tw_engine_manifest(engine), TW_WORDPIECE)) {
        status = map_file(directory, path, TW_WORDPIECE, &held->wordpiece);
    }
    if (status == TILEWRIGHT_OK) status = load_library(directory, path, tw_engine_level(engine)->library, held);
    if (status != TILEWRIGHT_OK) return status;
    const tilewright_model model = {.weights = held->weights.bytes,
                                    .weights_size = held->weights.size,
                                    .symbol = find_symbol,
                                    .context = held->library,
                                    .wordpiece = held->wordpiece.bytes,
                                    .wordpiece_size = held->wordpiece.size};
    return tw_engine_finish(engine, &model);
}

static tilewright_status open_directory(int directory, const char *path, const tilewright_options *options, tilewright_engine **result)
{
    char *text;
    size_t size;
    tilewright_engine *engine = NULL;
    tilewright_status status = read_manifest(directory, path, &text, &size);
    if (status != TILEWRIGHT_OK) return status;
    status = tw_engine_begin(text, size, options, &engine);
    free(text);
    if (status != TILEWRIGHT_OK) return status;
    status = load(directory, path, options, engine);
    if (status == TILEWRIGHT_OK) *result = engine;
    else tilewright_close(engine);
    return status;
}

/* Whether `path` is still the directory that was opened. An open directory's number is not given to another. */
static bool is_still(int directory, const char *path)
{
    struct stat opened, now;
    return fstat(directory, &opened) == 0 && stat(path, &now) == 0 && opened.st_dev == now.st_dev && opened.st_ino == now.st_ino;
}

tilewright_status tilewright_open(const char *path, const tilewright_options *options, tilewright_engine **engine)
{
    for (int attempt = 0; attempt < ATTEMPTS; ++attempt) {
        int directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (directory < 0) {
            return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s is not an artifact (%s); expected what `tilewright compile` writes", path,
                           strerror(errno));
        }
        /* what was read of it is of one artifact; where that failed because it was replaced and removed, try the new one */
        tilewright_status status = open_directory(directory, path, options, engine);
        bool same = status == TILEWRIGHT_OK || is_still(directory, path);
        close(directory);
        if (same) return status;
    }
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s was replaced %d times while it was read; try again", path, ATTEMPTS);
}
