#define _POSIX_C_SOURCE 200809L
#include "engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "batch.h"
#include "cpu.h"
#include "error.h"
#include "kernel.h"
#include "pool.h"
#include "tensor.h"
#include "weights.h"

enum {
    MAX_THREADS = 1024,
    LINE = 64,       /* alignment of all arrays, in bytes */
    INDEX_WIDTH = 32 /* bits of ids, positions, types and offsets for kernels */
};

typedef struct {
    tw_kernel kernel;
    const char *name;
    int32_t count;
    tw_any *arguments;
} step;

struct tilewright_engine {
    pthread_mutex_t lock; /* of all below that calls change */
    tw_arena arena;
    tw_manifest manifest;
    const tw_level *level;
    tw_wordpiece wordpiece;
    bool tokenizes;
    tilewright_options options;
    tilewright_info info;
    tw_pool *pool;
    int64_t run_tokens; /* of one run, if it has more than one sequence */

    tw_tensor *inputs, *parameters, *values;
    step *steps;
    size_t *storage_sizes; /* bytes, for the extents of the last run */

    char *workspace; /* inputs, then storages */
    size_t workspace_size;
    int64_t groups, sequences; /* extents that tensors and workspace are set to; 0: none */
    int64_t *offsets;
    size_t offsets_size;

    tilewright_observer observer;
    void *observer_context;
    void (*release)(void *resources);
    void *resources;
};

static tilewright_status check_options(const tilewright_options *options)
{
    if (options->threads < 0 || options->threads > MAX_THREADS) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "threads is %d; expected 1 to %d, or 0 for the cores available", options->threads,
                       MAX_THREADS);
    }
    if (options->cores && !options->threads) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "cores are given without threads; expected a core for each of `threads`");
    }
    return TILEWRIGHT_OK;
}

tilewright_status tw_engine_begin(const char *manifest, size_t size, const tilewright_options *options, tilewright_engine **result)
{
    tilewright_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return tw_out_of_memory();
    pthread_mutex_init(&engine->lock, NULL);
    if (options) engine->options = *options;
    const char *name = engine->options.level ? engine->options.level : getenv("TILEWRIGHT_ISA");
    bool any_cpu = engine->options.flags & TILEWRIGHT_ANY_CPU;
    tilewright_status status = check_options(&engine->options);
    if (status == TILEWRIGHT_OK) status = tw_manifest_read(&engine->arena, manifest, size, &engine->manifest);
    if (status == TILEWRIGHT_OK) status = tw_choose_level(&engine->manifest, name && *name ? name : NULL, any_cpu, &engine->level);
    if (status == TILEWRIGHT_OK) *result = engine;
    else tilewright_close(engine);
    return status;
}

const tw_manifest *tw_engine_manifest(const tilewright_engine *engine)
{
    return &engine->manifest;
}

const tw_level *tw_engine_level(const tilewright_engine *engine)
{
    return engine->level;
}

const tw_wordpiece *tw_engine_wordpiece(const tilewright_engine *engine)
{
    return engine->tokenizes ? &engine->wordpiece : NULL;
}

void tw_engine_on_close(tilewright_engine *engine, void (*release)(void *resources), void *resources)
{
    engine->release = release;
    engine->resources = resources;
}

static void describe(tilewright_engine *engine)
{
    const tw_manifest *manifest = &engine->manifest;
    engine->info = (tilewright_info){
        .level = engine->level->name,
        .threads = engine->options.threads,
        .takes_token_types = manifest->takes_token_types,
        .vocab_size = manifest->vocab_size,
        .token_types = manifest->token_types,
        .max_positions = manifest->max_positions,
        .max_tokens = manifest->max_tokens,
        .outputs = manifest->output_count,
        .output = manifest->outputs,
    };
    int64_t most = engine->level->run_tokens * engine->options.threads;
    engine->run_tokens = most < manifest->max_tokens ? most : manifest->max_tokens;
}

/* The tensors that a run sets: inputs and values. */
static tilewright_status make_tensors(tilewright_engine *engine)
{
    static const int64_t tokens[] = {TW_GROUPS, TW_GROUP}, ends[] = {TW_SEQUENCES}; /* one more than sequences, see resize */
    const tw_dtype index = {0, INDEX_WIDTH, 1};
    const tw_level *level = engine->level;
    tw_arena *arena = &engine->arena;
    size_t inputs = engine->manifest.input_count;
    engine->inputs = tw_arena_alloc(arena, inputs, sizeof *engine->inputs);
    engine->values = tw_arena_alloc(arena, level->value_count, sizeof *engine->values);
    engine->storage_sizes = tw_arena_alloc(arena, level->storage_count, sizeof *engine->storage_sizes);
    bool made = engine->inputs && engine->values && engine->storage_sizes;
    for (size_t i = 0; made && i < inputs; ++i) {
        tw_shape shape = i + 1 < inputs ? (tw_shape){index, 2, tokens} : (tw_shape){index, 1, ends};
        made = tw_tensor_make(arena, &shape, &engine->inputs[i]);
    }
    for (size_t i = 0; made && i < level->value_count; ++i) {
        made = tw_tensor_make(arena, &level->values[i].shape, &engine->values[i]);
    }
    return made ? TILEWRIGHT_OK : tw_out_of_memory();
}

static tw_tensor *tensor_of(tilewright_engine *engine, tw_argument argument)
{
    tw_tensor *of_kind[] = {[TW_INPUT] = engine->inputs, [TW_PARAMETER] = engine->parameters, [TW_VALUE] = engine->values};
    return &of_kind[argument.kind][argument.index];
}

/* The calls of kernels with their addresses and arguments. */
static tilewright_status make_steps(tilewright_engine *engine, const tilewright_model *model)
{
    const tw_level *level = engine->level;
    engine->steps = tw_arena_alloc(&engine->arena, level->call_count, sizeof *engine->steps);
    if (!engine->steps) return tw_out_of_memory();
    for (size_t i = 0; i < level->call_count; ++i) {
        const tw_call *call = &level->calls[i];
        size_t prefix = strlen(TW_KERNEL_PREFIX), length = strlen(call->kernel);
        char *symbol = tw_arena_alloc(&engine->arena, prefix + length + 1, 1);
        tw_any *arguments = tw_arena_alloc(&engine->arena, call->argument_count, sizeof *arguments);
        if (!symbol || !arguments) return tw_out_of_memory();
        memcpy(symbol, TW_KERNEL_PREFIX, prefix);
        memcpy(symbol + prefix, call->kernel, length);
        void *address = model->symbol(model->context, level->name, symbol);
        if (!address) {
            return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "the library of %s lacks the kernel %s; compile the model again", level->name,
                           call->kernel);
        }
        for (size_t k = 0; k < call->argument_count; ++k) {
            arguments[k].type = TW_TENSOR_POINTER;
            arguments[k].value.pointer = tensor_of(engine, call->arguments[k]);
        }
        step *to = &engine->steps[i];
        to->name = call->kernel;
        to->count = (int32_t)call->argument_count;
        to->arguments = arguments;
        memcpy(&to->kernel, &address, sizeof address); /* POSIX lets symbols be functions, C does not convert them */
    }
    return TILEWRIGHT_OK;
}

static tilewright_status read_wordpiece(tilewright_engine *engine, const tilewright_model *model)
{
    if (!model->wordpiece) return TILEWRIGHT_OK;
    const char *problem = tw_wordpiece_read(model->wordpiece, model->wordpiece_size, &engine->wordpiece);
    engine->tokenizes = !problem;
    return problem ? tw_fail(TILEWRIGHT_INVALID_ARTIFACT, "%s", problem) : TILEWRIGHT_OK;
}

tilewright_status tw_engine_finish(tilewright_engine *engine, const tilewright_model *model)
{
    const tw_level *level = engine->level;
    tilewright_options *options = &engine->options;
    if (!options->threads) options->threads = tw_available_cores();
    if (options->threads > MAX_THREADS) options->threads = MAX_THREADS;
    describe(engine);
    engine->parameters = tw_arena_alloc(&engine->arena, level->parameter_count, sizeof *engine->parameters);
    if (!engine->parameters) return tw_out_of_memory();
    tilewright_status status = tw_weights_bind(&engine->arena, model->weights, model->weights_size, level, engine->parameters);
    if (status == TILEWRIGHT_OK) status = read_wordpiece(engine, model);
    if (status == TILEWRIGHT_OK) status = make_tensors(engine);
    if (status == TILEWRIGHT_OK) status = make_steps(engine, model);
    if (status == TILEWRIGHT_OK) tw_connect_library(model->symbol, model->context, level->name);
    if (status == TILEWRIGHT_OK) status = tw_pool_create(options->threads, options->cores, options->spin_us, &engine->pool);
    options->cores = NULL; /* of the caller, as is the name of the level */
    options->level = NULL;
    return status;
}

tilewright_status tilewright_open_model(const tilewright_model *model, const tilewright_options *options, tilewright_engine **result)
{
    tilewright_engine *engine;
    tilewright_status status = tw_engine_begin(model->manifest, model->manifest_size, options, &engine);
    if (status != TILEWRIGHT_OK) return status;
    status = tw_engine_finish(engine, model);
    if (status == TILEWRIGHT_OK) *result = engine;
    else tilewright_close(engine);
    return status;
}

void tilewright_close(tilewright_engine *engine)
{
    if (!engine) return;
    tw_pool_destroy(engine->pool);
    free(engine->workspace);
    free(engine->offsets);
    tw_arena_free(&engine->arena);
    pthread_mutex_destroy(&engine->lock);
    if (engine->release) engine->release(engine->resources);
    free(engine);
}

const tilewright_info *tilewright_describe(const tilewright_engine *engine)
{
    return &engine->info;
}

void tilewright_observe(tilewright_engine *engine, tilewright_observer observer, void *context)
{
    pthread_mutex_lock(&engine->lock);
    engine->observer = observer;
    engine->observer_context = context;
    pthread_mutex_unlock(&engine->lock);
}

/* Add room for `bytes` to `size`, up to the next line, and return where it begins; false if that overflows. */
static bool reserve(size_t *size, size_t bytes, size_t *begin)
{
    *begin = *size;
    /* One line more than needed: storages of round sizes would begin at the same place of a page, where a processor takes
     * loads to depend on stores (4K aliasing). */
    size_t room = (bytes + LINE - 1) / LINE * LINE + LINE;
    return !__builtin_add_overflow(*size, room, size);
}

/* Set the extents and places of all tensors for a run, and see that the workspace holds them. */
static tilewright_status resize(tilewright_engine *engine, int64_t groups, int64_t sequences)
{
    if (engine->groups == groups && engine->sequences == sequences) return TILEWRIGHT_OK;
    const tw_level *level = engine->level;
    size_t inputs = engine->manifest.input_count, size = 0, begins[4];
    engine->groups = 0;
    bool fits = true;
    for (size_t i = 0; i < inputs; ++i) {
        int64_t elements = i + 1 < inputs ? groups * TW_GROUP : sequences + 1;
        engine->inputs[i].shape[0] = i + 1 < inputs ? groups : elements;
        fits &= reserve(&size, (size_t)elements * sizeof(int32_t), &begins[i]);
    }
    memset(engine->storage_sizes, 0, level->storage_count * sizeof *engine->storage_sizes);
    for (size_t i = 0; i < level->value_count; ++i) {
        const tw_value *value = &level->values[i];
        size_t bytes = 0, *storage = &engine->storage_sizes[value->storage];
        fits &= tw_shape_bytes(&value->shape, groups, sequences, &bytes);
        if (bytes > *storage) *storage = bytes;
        tw_tensor_resize(&value->shape, groups, sequences, &engine->values[i]);
    }
    for (size_t i = 0; i < level->storage_count; ++i) fits &= reserve(&size, engine->storage_sizes[i], &engine->storage_sizes[i]);
    if (!fits) return tw_out_of_memory();
    if (size > engine->workspace_size) {
        free(engine->workspace);
        engine->workspace = NULL;
        engine->workspace_size = 0;
        void *memory = NULL;
        if (posix_memalign(&memory, LINE, size) != 0) return tw_out_of_memory();
        engine->workspace = memory;
        engine->workspace_size = size;
    }
    for (size_t i = 0; i < inputs; ++i) engine->inputs[i].data = engine->workspace + begins[i];
    for (size_t i = 0; i < level->value_count; ++i) {
        engine->values[i].data = engine->workspace + engine->storage_sizes[level->values[i].storage];
    }
    engine->groups = groups;
    engine->sequences = sequences;
    return TILEWRIGHT_OK;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static tilewright_status call_kernels(tilewright_engine *engine)
{
    tw_clear_kernel_error();
    for (size_t i = 0; i < engine->level->call_count; ++i) {
        const step *each = &engine->steps[i];
        tw_any result = {0};
        uint64_t start = engine->observer ? now_ns() : 0;
        if (each->kernel(NULL, each->arguments, each->count, &result) != 0) {
            if (!*tw_kernel_error()) return tw_out_of_memory();
            return tw_fail(TILEWRIGHT_INVALID_ARTIFACT,
                           "the manifest lists other parameters than its module takes (%s: %s); compile the model again", each->name,
                           tw_kernel_error());
        }
        if (engine->observer) engine->observer(engine->observer_context, each->name, now_ns() - start);
    }
    return TILEWRIGHT_OK;
}

/* Run the sequences from `first` to `last` and put their results where the batch's outputs have them. */
static tilewright_status run_chunk(tilewright_engine *engine, const tw_batch *batch, size_t first, size_t last, float *const *outputs)
{
    int64_t tokens = batch->offsets[last] - batch->offsets[first];
    tilewright_status status = resize(engine, (tokens + TW_GROUP - 1) / TW_GROUP, (int64_t)(last - first));
    if (status != TILEWRIGHT_OK) return status;
    const tw_tensor *inputs = engine->inputs;
    bool types = engine->manifest.takes_token_types;
    const tw_packed packed = {inputs[0].data, inputs[1].data, types ? inputs[2].data : NULL, inputs[types ? 3 : 2].data};
    tw_batch_pack(batch, first, last, &packed);
    status = call_kernels(engine);
    for (size_t i = 0; status == TILEWRIGHT_OK && i < engine->manifest.output_count; ++i) {
        const tilewright_output *output = &engine->manifest.outputs[i];
        const float *values = engine->values[engine->level->outputs[i]].data;
        size_t width = (size_t)output->width;
        if (!outputs[i]) continue;
        if (output->per_token) tw_batch_scatter(batch, first, last, width, values, outputs[i]);
        else memcpy(outputs[i] + first * width, values, (last - first) * width * sizeof *values);
    }
    return status;
}

static tilewright_status run_batch(tilewright_engine *engine, const tw_batch *batch, float *const *outputs)
{
    tilewright_status status = tw_pool_enter(engine->pool);
    for (size_t first = 0, last; status == TILEWRIGHT_OK && first < batch->count; first = last) {
        last = tw_batch_chunk(batch, first, engine->run_tokens);
        status = run_chunk(engine, batch, first, last, outputs);
    }
    tw_pool_leave();
    return status;
}

/* Make room for the offsets of `count` sequences. */
static bool reserve_offsets(tilewright_engine *engine, size_t count)
{
    if (count < engine->offsets_size) return true;
    if (count > PTRDIFF_MAX / sizeof *engine->offsets - 1) return false;
    int64_t *more = realloc(engine->offsets, (count + 1) * sizeof *more);
    if (!more) return false;
    engine->offsets = more;
    engine->offsets_size = count + 1;
    return true;
}

tilewright_status tilewright_run(tilewright_engine *engine, const int64_t *input_ids, const int64_t *attention_mask,
                                 const int64_t *token_type_ids, size_t batch, size_t seq, float *const *outputs)
{
    tw_batch padded = {.ids = input_ids, .types = token_type_ids, .mask = attention_mask, .count = batch, .seq = seq};
    pthread_mutex_lock(&engine->lock);
    tilewright_status status = reserve_offsets(engine, batch) ? TILEWRIGHT_OK : tw_out_of_memory();
    if (status == TILEWRIGHT_OK) status = tw_batch_pad_check(&engine->manifest, &padded, engine->offsets);
    if (status == TILEWRIGHT_OK) status = run_batch(engine, &padded, outputs);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

tilewright_status tilewright_run_ragged(tilewright_engine *engine, const int64_t *input_ids, const int64_t *token_type_ids,
                                        const int64_t *offsets, size_t batch, float *const *outputs)
{
    const tw_batch ragged = {.ids = input_ids, .types = token_type_ids, .count = batch, .offsets = offsets};
    pthread_mutex_lock(&engine->lock);
    tilewright_status status = tw_batch_ragged_check(&engine->manifest, &ragged);
    if (status == TILEWRIGHT_OK) status = run_batch(engine, &ragged, outputs);
    pthread_mutex_unlock(&engine->lock);
    return status;
}
