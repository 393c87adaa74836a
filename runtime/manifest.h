/* What of manifest.json is needed to run: limits, outputs, and for each ISA level its parameters and its program. */
#ifndef TW_MANIFEST_H
#define TW_MANIFEST_H

#include <stdbool.h>

#include "json.h"
#include "kernel.h"

#define TW_MANIFEST "manifest.json"
#define TW_WEIGHTS "weights.safetensors"
#define TW_WORDPIECE "wordpiece.bin"

enum { TW_SCHEMA_VERSION = 4, TW_GROUP = 16 /* tokens that the kernels' token axis is padded to */ };

/* Extents that a call decides, in place of a number. */
enum { TW_GROUPS = -1 /* of TW_GROUP tokens */, TW_SEQUENCES = -2 };

typedef struct {
    tw_dtype dtype;
    int32_t ndim;
    const int64_t *shape; /* at least 0, or one of the above where that is allowed */
} tw_shape;

/* A weight, and what its values must be for the kernels to be safe (tilewright/manifest.py). */
typedef struct {
    const char *name;
    const char *tensor; /* of weights.safetensors */
    tw_shape shape;
    bool addresses; /* its integers are places: */
    int64_t lowest, highest;
    bool ascending;
} tw_parameter;

/* A result of a kernel. Those that are not needed at the same time share a storage. */
typedef struct {
    size_t storage;
    tw_shape shape;
} tw_value;

typedef enum { TW_INPUT, TW_PARAMETER, TW_VALUE } tw_argument_kind;

typedef struct {
    tw_argument_kind kind;
    size_t index;
} tw_argument;

typedef struct {
    const char *kernel;
    size_t argument_count;
    const tw_argument *arguments;
} tw_call;

typedef struct {
    const char *name, *library;
    int64_t run_tokens; /* of one run for each thread, if it has more than one sequence */
    size_t feature_count, parameter_count, storage_count, value_count, call_count;
    const char *const *features; /* LLVM's names */
    const tw_parameter *parameters;
    const tw_value *values;
    const tw_call *calls;
    const size_t *outputs; /* the values that are outputs, as many as the manifest's */
} tw_level;

typedef struct {
    const char *name, *sha256;
} tw_file;

/* The inputs of kernels, in this order: ids, positions, token types if the model takes them, offsets. */
typedef struct {
    int64_t vocab_size, max_positions, max_tokens, token_types;
    bool takes_token_types;
    size_t input_count; /* of kernels */
    size_t output_count, level_count, file_count;
    const tilewright_output *outputs;
    const tw_level *levels; /* from the least to the best */
    const tw_file *files;
} tw_manifest;

/* Read and check a manifest; what *manifest points to lives in `arena`. */
tilewright_status tw_manifest_read(tw_arena *arena, const char *text, size_t size, tw_manifest *manifest);

/* The dtype of NumPy's name `name`, false if there is none. */
bool tw_dtype_named(const char *name, tw_dtype *dtype);

/* NumPy's name of one of these. */
const char *tw_dtype_name(tw_dtype dtype);

/* Bytes of an array with `groups` and `sequences` for these extents; false if they overflow. */
bool tw_shape_bytes(const tw_shape *shape, int64_t groups, int64_t sequences, size_t *bytes);

#endif
