#include "manifest.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

enum { MAX_TOKENS = 1 << 20 };

static const struct {
    const char *name;
    tw_dtype dtype;
} dtypes[] = {{"uint8", {1, 8, 1}},  {"int8", {0, 8, 1}},   {"uint16", {1, 16, 1}}, {"int16", {0, 16, 1}},
              {"int32", {0, 32, 1}}, {"int64", {0, 64, 1}}, {"float32", {2, 32, 1}}};

/* The tensors that kernels get from a call; no parameter may have one of these names. */
static const char *const inputs[] = {"input_ids", "position_ids", "token_type_ids", "offsets"};
enum { TYPES_INPUT = 2, OFFSETS_INPUT = 3 };

static tilewright_status invalid(const char *what, const char *which)
{
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, TW_MANIFEST ": %s%s%s; compile the model again", what, which ? " " : "",
                   which ? which : "");
}

bool tw_dtype_named(const char *name, tw_dtype *dtype)
{
    for (size_t i = 0; name && i < sizeof dtypes / sizeof *dtypes; ++i) {
        if (strcmp(dtypes[i].name, name) == 0) {
            *dtype = dtypes[i].dtype;
            return true;
        }
    }
    return false;
}

const char *tw_dtype_name(tw_dtype dtype)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; ++i) {
        if (dtypes[i].dtype.code == dtype.code && dtypes[i].dtype.bits == dtype.bits) return dtypes[i].name;
    }
    return "unknown";
}

bool tw_shape_bytes(const tw_shape *shape, int64_t groups, int64_t sequences, size_t *bytes)
{
    size_t size = shape->dtype.bits / 8u;
    for (int32_t i = 0; i < shape->ndim; ++i) {
        int64_t extent = shape->shape[i];
        if (extent == TW_GROUPS) extent = groups;
        if (extent == TW_SEQUENCES) extent = sequences;
        if (__builtin_mul_overflow(size, (size_t)extent, &size)) return false;
    }
    *bytes = size;
    return size <= SIZE_MAX / 4;
}

/* An array of `count` zeroed elements that lives as long as the manifest. An empty one is not NULL. */
static void *allocate(tw_arena *arena, size_t count, size_t size)
{
    return tw_arena_alloc(arena, count ? count : 1, size);
}

static bool is_array(const tw_json *value)
{
    return value && value->type == TW_JSON_ARRAY;
}

/* Read dtype and shape; `symbolic`: groups and sequences may be extents. */
static bool read_shape(tw_arena *arena, const tw_json *value, bool symbolic, tw_shape *shape)
{
    const tw_json *extents = tw_json_get(value, "shape");
    if (!tw_dtype_named(tw_json_string(tw_json_get(value, "dtype")), &shape->dtype)) return false;
    if (!is_array(extents) || extents->length > INT32_MAX) return false;
    int64_t *to = allocate(arena, extents->length, sizeof *to);
    if (!to) return false;
    shape->ndim = (int32_t)extents->length;
    shape->shape = to;
    for (const tw_json *each = extents->first; each; each = each->next, ++to) {
        const char *name = symbolic ? tw_json_string(each) : NULL;
        if (name && strcmp(name, "groups") == 0) *to = TW_GROUPS;
        else if (name && strcmp(name, "sequences") == 0) *to = TW_SEQUENCES;
        else if (!tw_json_integer(each, to) || *to < 0) return false;
    }
    return true;
}

static tilewright_status read_limits(const tw_json *root, tw_manifest *manifest)
{
    const struct {
        const char *name;
        int64_t *value;
        int64_t most;
    } limits[] = {{"vocab_size", &manifest->vocab_size, INT32_MAX},
                  {"max_positions", &manifest->max_positions, INT32_MAX},
                  {"token_types", &manifest->token_types, INT32_MAX},
                  {"max_tokens", &manifest->max_tokens, MAX_TOKENS}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; ++i) {
        const tw_json *value = tw_json_get(tw_json_get(root, "limits"), limits[i].name);
        if (!tw_json_integer(value, limits[i].value) || *limits[i].value < 1 || *limits[i].value > limits[i].most) {
            return invalid("no valid limit", limits[i].name);
        }
    }
    if (manifest->max_tokens % TW_GROUP || manifest->max_tokens < manifest->max_positions) {
        return invalid("`max_tokens` must be a multiple of 16 that holds a sequence of `max_positions`", NULL);
    }
    return TILEWRIGHT_OK;
}

static tilewright_status read_inputs(const tw_json *root, tw_manifest *manifest)
{
    const tw_json *names = tw_json_get(root, "inputs");
    bool ids = false;
    for (const tw_json *each = is_array(names) ? names->first : NULL; each; each = each->next) {
        const char *name = tw_json_string(each);
        ids |= name && strcmp(name, "input_ids") == 0;
        manifest->takes_token_types |= name && strcmp(name, "token_type_ids") == 0;
    }
    manifest->input_count = manifest->takes_token_types ? 4 : 3;
    return ids ? TILEWRIGHT_OK : invalid("`inputs` must list input_ids", NULL);
}

static tilewright_status read_outputs(tw_arena *arena, const tw_json *root, tw_manifest *manifest)
{
    const tw_json *listed = tw_json_get(root, "outputs");
    if (!is_array(listed) || listed->length == 0) return invalid("`outputs` must be a list that is not empty", NULL);
    tilewright_output *output = allocate(arena, listed->length, sizeof *output);
    if (!output) return tw_out_of_memory();
    manifest->outputs = output;
    manifest->output_count = listed->length;
    for (const tw_json *each = listed->first; each; each = each->next, ++output) {
        const char *per = tw_json_string(tw_json_get(each, "per"));
        bool squeeze = false;
        output->name = tw_json_string(tw_json_get(each, "name"));
        bool valid = output->name && per && (strcmp(per, "token") == 0 || strcmp(per, "sequence") == 0);
        valid = valid && tw_json_integer(tw_json_get(each, "width"), &output->width) && output->width >= 1;
        valid = valid && output->width <= INT32_MAX && tw_json_boolean(tw_json_get(each, "squeeze"), &squeeze);
        if (!valid || (squeeze && output->width > 1)) return invalid("an output is not described as it must be", NULL);
        output->per_token = strcmp(per, "token") == 0;
        output->squeeze = squeeze;
    }
    return TILEWRIGHT_OK;
}

static bool lists_file(const tw_manifest *manifest, const char *name)
{
    for (size_t i = 0; i < manifest->file_count; ++i) {
        if (strcmp(manifest->files[i].name, name) == 0) return true;
    }
    return false;
}

static tilewright_status read_files(tw_arena *arena, const tw_json *root, tw_manifest *manifest)
{
    const tw_json *listed = tw_json_get(root, "files");
    if (!listed || listed->type != TW_JSON_OBJECT) return invalid("`files` must be an object", NULL);
    tw_file *file = allocate(arena, listed->length, sizeof *file);
    if (!file) return tw_out_of_memory();
    manifest->files = file;
    manifest->file_count = listed->length;
    for (const tw_json *each = listed->first; each; each = each->next, ++file) {
        file->name = each->key;
        file->sha256 = tw_json_string(each);
        bool plain = each->key_length && !memchr(each->key, 0, each->key_length) && !strchr(each->key, '/') &&
                     strcmp(each->key, ".") != 0 && strcmp(each->key, "..") != 0 && strcmp(each->key, TW_MANIFEST) != 0;
        if (!file->sha256 || !plain) return invalid("`files` must be plain names, none of them the manifest's own", NULL);
    }
    return lists_file(manifest, TW_WEIGHTS) ? TILEWRIGHT_OK : invalid("`files` must list", TW_WEIGHTS);
}

/* Whether the first extent of a table that ids look up is the limit that ids are held to. */
static bool rows_match(const tw_manifest *manifest, const char *role, const tw_shape *shape)
{
    int64_t limit = strcmp(role, "vocab_size") == 0      ? manifest->vocab_size
                    : strcmp(role, "max_positions") == 0 ? manifest->max_positions
                    : strcmp(role, "token_types") == 0   ? manifest->token_types
                                                         : -1;
    return limit >= 0 && shape->ndim > 0 && shape->shape[0] == limit;
}

static bool holds_places(const tw_shape *shape)
{
    tw_dtype dtype = shape->dtype;
    return shape->ndim > 0 && ((dtype.code == 1 && dtype.bits <= 16) || (dtype.code == 0 && dtype.bits == 32));
}

static tilewright_status read_parameter(tw_arena *arena, const tw_manifest *manifest, const tw_json *value, tw_parameter *parameter)
{
    const char *role = tw_json_string(tw_json_get(value, "role"));
    size_t bytes;
    parameter->name = value->key;
    parameter->tensor = tw_json_string(tw_json_get(value, "tensor"));
    bool valid = !memchr(value->key, 0, value->key_length) && parameter->tensor && role;
    valid = valid && read_shape(arena, value, false, &parameter->shape) && tw_shape_bytes(&parameter->shape, 0, 0, &bytes);
    for (size_t i = 0; valid && i < sizeof inputs / sizeof *inputs; ++i) valid = strcmp(parameter->name, inputs[i]) != 0;
    if (valid && strcmp(role, "values") != 0) {
        parameter->addresses = strcmp(role, "addresses") == 0;
        valid = parameter->addresses ? holds_places(&parameter->shape) : rows_match(manifest, role, &parameter->shape);
    }
    if (valid && parameter->addresses) {
        valid = tw_json_integer(tw_json_get(value, "lowest"), &parameter->lowest) &&
                tw_json_integer(tw_json_get(value, "highest"), &parameter->highest) &&
                tw_json_boolean(tw_json_get(value, "ascending"), &parameter->ascending);
    }
    return valid ? TILEWRIGHT_OK : invalid("what it says is impossible of parameter", value->key);
}

static int by_name(const void *name, const void *parameter)
{
    return strcmp(name, ((const tw_parameter *)parameter)->name);
}

static bool read_argument(const tw_manifest *manifest, const tw_level *level, bool *used, const tw_json *value, tw_argument *argument)
{
    int64_t number;
    if (tw_json_integer(value, &number)) {
        *argument = (tw_argument){TW_VALUE, (size_t)number};
        return number >= 0 && (size_t)number < level->value_count;
    }
    const char *name = tw_json_string(value);
    for (size_t i = 0; name && i < sizeof inputs / sizeof *inputs; ++i) {
        if (strcmp(name, inputs[i]) != 0) continue;
        *argument = (tw_argument){TW_INPUT, i == OFFSETS_INPUT ? manifest->input_count - 1 : i};
        return i != TYPES_INPUT || manifest->takes_token_types;
    }
    /* members of an object, and so the parameters, are sorted */
    const tw_parameter *found = name ? bsearch(name, level->parameters, level->parameter_count, sizeof *found, by_name) : NULL;
    if (!found) return false;
    *argument = (tw_argument){TW_PARAMETER, (size_t)(found - level->parameters)};
    used[argument->index] = true;
    return true;
}

static tilewright_status read_values(tw_arena *arena, const tw_json *program, tw_level *level)
{
    const tw_json *listed = tw_json_get(program, "values");
    if (!is_array(listed)) return invalid("no `values` in the program of", level->name);
    tw_value *value = allocate(arena, listed->length, sizeof *value);
    if (!value) return tw_out_of_memory();
    level->values = value;
    level->value_count = listed->length;
    for (const tw_json *each = listed->first; each; each = each->next, ++value) {
        int64_t storage;
        size_t bytes;
        bool valid = read_shape(arena, each, true, &value->shape) && tw_shape_bytes(&value->shape, MAX_TOKENS, MAX_TOKENS, &bytes);
        valid = valid && tw_json_integer(tw_json_get(each, "storage"), &storage) && storage >= 0 && (size_t)storage < level->value_count;
        if (!valid) return invalid("a value is not described as it must be in the program of", level->name);
        value->storage = (size_t)storage;
        if (value->storage >= level->storage_count) level->storage_count = value->storage + 1;
    }
    return TILEWRIGHT_OK;
}

static tilewright_status read_calls(tw_arena *arena, const tw_manifest *manifest, const tw_json *program, tw_level *level)
{
    const tw_json *listed = tw_json_get(program, "calls");
    if (!is_array(listed)) return invalid("no `calls` in the program of", level->name);
    tw_call *call = allocate(arena, listed->length, sizeof *call);
    bool *used = allocate(arena, level->parameter_count, sizeof *used);
    if (!call || !used) return tw_out_of_memory();
    level->calls = call;
    level->call_count = listed->length;
    for (const tw_json *each = listed->first; each; each = each->next, ++call) {
        const tw_json *arguments = tw_json_get(each, "arguments");
        call->kernel = tw_json_string(tw_json_get(each, "kernel"));
        if (!call->kernel || !is_array(arguments) || arguments->length > INT32_MAX) {
            return invalid("a call is not described as it must be in the program of", level->name);
        }
        tw_argument *to = allocate(arena, arguments->length, sizeof *to);
        if (!to) return tw_out_of_memory();
        call->arguments = to;
        call->argument_count = arguments->length;
        for (const tw_json *argument = arguments->first; argument; argument = argument->next, ++to) {
            if (!read_argument(manifest, level, used, argument, to)) {
                return invalid("it lists other parameters than its module takes: an argument is unknown of kernel", call->kernel);
            }
        }
    }
    for (size_t i = 0; i < level->parameter_count; ++i) {
        if (!used[i]) return invalid("it lists other parameters than its module takes: no kernel takes", level->parameters[i].name);
    }
    return TILEWRIGHT_OK;
}

static bool gives(const tw_value *value, const tilewright_output *output)
{
    const tw_shape *shape = &value->shape;
    int32_t ndim = output->per_token ? 3 : 2;
    if (shape->dtype.code != 2 || shape->dtype.bits != 32 || shape->ndim != ndim || shape->shape[ndim - 1] != output->width) return false;
    return output->per_token ? shape->shape[0] == TW_GROUPS && shape->shape[1] == TW_GROUP : shape->shape[0] == TW_SEQUENCES;
}

static tilewright_status read_program_outputs(tw_arena *arena, const tw_manifest *manifest, const tw_json *program, tw_level *level)
{
    const tw_json *listed = tw_json_get(program, "outputs");
    bool valid = is_array(listed) && listed->length == manifest->output_count;
    size_t *index = allocate(arena, manifest->output_count, sizeof *index);
    if (!index) return tw_out_of_memory();
    level->outputs = index;
    const tilewright_output *output = manifest->outputs;
    for (const tw_json *each = valid ? listed->first : NULL; each && valid; each = each->next, ++output, ++index) {
        int64_t number;
        valid = tw_json_integer(each, &number) && number >= 0 && (size_t)number < level->value_count;
        valid = valid && gives(&level->values[number], output);
        if (valid) *index = (size_t)number;
    }
    return valid ? TILEWRIGHT_OK : invalid("it lists other outputs than its module gives at level", level->name);
}

/* Whether values are there when they are needed: an output is one that a kernel takes, and so writes, and no two values share a
   storage that both need at the time of some call, or after the last. */
static tilewright_status check_lifetimes(tw_arena *arena, const tw_manifest *manifest, const tw_level *level)
{
    size_t *end = allocate(arena, level->value_count, sizeof *end); /* behind the last call that takes a value; 0 of none */
    size_t *holder = allocate(arena, level->storage_count, sizeof *holder); /* number of the value in a storage, from 1 on */
    if (!end || !holder) return tw_out_of_memory();
    for (size_t i = 0; i < level->call_count; ++i) {
        const tw_call *call = &level->calls[i];
        for (size_t j = 0; j < call->argument_count; ++j) {
            if (call->arguments[j].kind == TW_VALUE) end[call->arguments[j].index] = i + 1;
        }
    }
    for (size_t i = 0; i < manifest->output_count; ++i) {
        if (!end[level->outputs[i]]) return invalid("an output is written by no kernel in the program of", level->name);
        end[level->outputs[i]] = level->call_count + 1;
    }
    for (size_t i = 0; i < level->call_count; ++i) {
        const tw_call *call = &level->calls[i];
        for (size_t j = 0; j < call->argument_count; ++j) {
            if (call->arguments[j].kind != TW_VALUE) continue;
            size_t value = call->arguments[j].index, *held = &holder[level->values[value].storage];
            if (*held && *held != value + 1 && end[*held - 1] > i) {
                return invalid("two values share a storage that both need in the program of", level->name);
            }
            *held = value + 1;
        }
    }
    return TILEWRIGHT_OK;
}

static tilewright_status read_level(tw_arena *arena, const tw_manifest *manifest, const tw_json *value, tw_level *level)
{
    const tw_json *features = tw_json_get(value, "features"), *parameters = tw_json_get(value, "parameters");
    const tw_json *program = tw_json_get(value, "program");
    level->name = tw_json_string(tw_json_get(value, "name"));
    level->library = tw_json_string(tw_json_get(value, "library"));
    if (!level->name || !level->library || !is_array(features) || !parameters || parameters->type != TW_JSON_OBJECT) {
        return invalid("a level is not described as it must be", NULL);
    }
    if (!lists_file(manifest, level->library)) return invalid("`files` must list", level->library);
    bool counted = tw_json_integer(tw_json_get(value, "run_tokens"), &level->run_tokens);
    if (!counted || level->run_tokens < 1 || level->run_tokens > MAX_TOKENS) return invalid("no valid `run_tokens` of", level->name);
    const char **feature = allocate(arena, features->length, sizeof *feature);
    tw_parameter *parameter = allocate(arena, parameters->length, sizeof *parameter);
    if (!feature || !parameter) return tw_out_of_memory();
    level->features = feature;
    level->feature_count = features->length;
    for (const tw_json *each = features->first; each; each = each->next, ++feature) {
        if (!(*feature = tw_json_string(each))) return invalid("`features` must be texts of", level->name);
    }
    level->parameters = parameter;
    level->parameter_count = parameters->length;
    tilewright_status status = TILEWRIGHT_OK;
    for (const tw_json *each = parameters->first; each && status == TILEWRIGHT_OK; each = each->next, ++parameter) {
        status = read_parameter(arena, manifest, each, parameter);
    }
    if (status == TILEWRIGHT_OK) status = read_values(arena, program, level);
    if (status == TILEWRIGHT_OK) status = read_calls(arena, manifest, program, level);
    if (status == TILEWRIGHT_OK) status = read_program_outputs(arena, manifest, program, level);
    if (status == TILEWRIGHT_OK) status = check_lifetimes(arena, manifest, level);
    return status;
}

static tilewright_status read_levels(tw_arena *arena, const tw_json *root, tw_manifest *manifest)
{
    const tw_json *listed = tw_json_get(root, "levels");
    if (!is_array(listed) || listed->length == 0) return invalid("`levels` must be a list that is not empty", NULL);
    tw_level *level = allocate(arena, listed->length, sizeof *level);
    if (!level) return tw_out_of_memory();
    manifest->levels = level;
    manifest->level_count = listed->length;
    tilewright_status status = TILEWRIGHT_OK;
    for (const tw_json *each = listed->first; each && status == TILEWRIGHT_OK; each = each->next, ++level) {
        status = read_level(arena, manifest, each, level);
        for (const tw_level *other = manifest->levels; status == TILEWRIGHT_OK && other < level; ++other) {
            if (strcmp(other->name, level->name) == 0) status = invalid("two levels are named", level->name);
        }
    }
    return status;
}

static tilewright_status check_identity(const tw_json *root)
{
    int64_t version = -1;
    const tw_json *stated = tw_json_get(root, "schema_version");
    if (!tw_json_integer(stated, &version) || version != TW_SCHEMA_VERSION) {
        return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, TW_MANIFEST " has schema version %.20s, expected %d; compile the model again",
                       stated && stated->text ? stated->text : "none", TW_SCHEMA_VERSION);
    }
    char found[TW_SHA256_HEX];
    tw_sha256 hash;
    tw_sha256_init(&hash);
    tw_json_hash(root, "checksum", &hash);
    tw_sha256_finish(&hash, found);
    const char *says = tw_json_string(tw_json_get(root, "checksum"));
    if (!says || strcmp(says, found) != 0) {
        return tw_fail(TILEWRIGHT_INVALID_ARTIFACT,
                       TW_MANIFEST " was altered: its checksum is %.12s..., it says %.12s...; copy or compile it again", found,
                       says ? says : "none");
    }
    return TILEWRIGHT_OK;
}

tilewright_status tw_manifest_read(tw_arena *arena, const char *text, size_t size, tw_manifest *manifest)
{
    const char *problem;
    const tw_json *root = tw_json_parse(arena, text, size, &problem);
    if (!root && !problem) return tw_out_of_memory();
    if (!root) {
        return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, TW_MANIFEST " is not valid JSON (%s); it is truncated or foreign", problem);
    }
    memset(manifest, 0, sizeof *manifest);
    tilewright_status status = check_identity(root);
    if (status == TILEWRIGHT_OK) status = read_limits(root, manifest);
    if (status == TILEWRIGHT_OK) status = read_inputs(root, manifest);
    if (status == TILEWRIGHT_OK) status = read_outputs(arena, root, manifest);
    if (status == TILEWRIGHT_OK) status = read_files(arena, root, manifest);
    if (status == TILEWRIGHT_OK) status = read_levels(arena, root, manifest);
    return status;
}
