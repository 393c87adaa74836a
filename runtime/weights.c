#include "weights.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "tensor.h"

enum { ALIGNMENT = 64 };

/* safetensors' names of dtypes */
static const struct {
    const char *theirs, *ours;
} dtypes[] = {{"U8", "uint8"},  {"I8", "int8"},   {"U16", "uint16"},  {"I16", "int16"},
              {"I32", "int32"}, {"I64", "int64"}, {"F32", "float32"}};

static tilewright_status foreign(const char *reason)
{
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, TW_WEIGHTS " is not an artifact's weights file (%s); compile the model again", reason);
}

/* Where the data of a tensor lies among the `size` bytes behind the header. */
static bool place(const tw_json *tensor, size_t size, size_t *begin, size_t *end)
{
    const tw_json *offsets = tw_json_get(tensor, "data_offsets");
    if (!offsets || offsets->type != TW_JSON_ARRAY || offsets->length != 2) return false;
    int64_t from, to;
    if (!tw_json_integer(offsets->first, &from) || !tw_json_integer(offsets->first->next, &to)) return false;
    if (from < 0 || to < from || (uint64_t)to > size) return false;
    *begin = (size_t)from;
    *end = (size_t)to;
    return true;
}

/* Our name of the dtype of a header's entry, NULL if there is none. */
static const char *dtype_name(const tw_json *tensor)
{
    const char *name = tw_json_string(tw_json_get(tensor, "dtype"));
    for (size_t i = 0; name && i < sizeof dtypes / sizeof *dtypes; ++i) {
        if (strcmp(dtypes[i].theirs, name) == 0) return dtypes[i].ours;
    }
    return NULL;
}

/* Whether dtype and shape of a header's entry are `shape`. */
static bool agrees(const tw_json *tensor, const tw_shape *shape)
{
    const tw_json *extents = tw_json_get(tensor, "shape");
    tw_dtype dtype;
    if (!tw_dtype_named(dtype_name(tensor), &dtype) || dtype.code != shape->dtype.code || dtype.bits != shape->dtype.bits) return false;
    if (!extents || extents->type != TW_JSON_ARRAY || extents->length != (size_t)shape->ndim) return false;
    const int64_t *expected = shape->shape;
    for (const tw_json *each = extents->first; each; each = each->next) {
        int64_t extent;
        if (!tw_json_integer(each, &extent) || extent != *expected++) return false;
    }
    return true;
}

enum { DESCRIPTION = 128 };

/* Add a piece of text to the `used` characters of a description; what does not fit is left out. */
__attribute__((format(printf, 3, 4))) static void add(char *to, size_t *used, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(to + *used, DESCRIPTION - *used, format, arguments);
    va_end(arguments);
    if (length > 0) *used = *used + (size_t)length < DESCRIPTION ? *used + (size_t)length : DESCRIPTION - 1;
}

static tilewright_status other_kind(const tw_parameter *parameter, const char *level, const tw_json *tensor)
{
    char found[DESCRIPTION], expected[DESCRIPTION];
    const tw_json *extents = tw_json_get(tensor, "shape");
    const char *name = dtype_name(tensor);
    size_t used = 0;
    add(found, &used, "%s[", name ? name : "of an unknown dtype, ");
    for (const tw_json *each = extents ? extents->first : NULL; each; each = each->next) {
        add(found, &used, "%s%s", each->text ? each->text : "?", each->next ? ", " : "");
    }
    add(found, &used, "]");
    used = 0;
    add(expected, &used, "%s[", tw_dtype_name(parameter->shape.dtype));
    for (int32_t i = 0; i < parameter->shape.ndim; ++i) {
        add(expected, &used, "%s%lld", i ? ", " : "", (long long)parameter->shape.shape[i]);
    }
    add(expected, &used, "]");
    return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, TW_WEIGHTS ": %s is %s, but %s of %s is %s; compile the model again",
                   parameter->tensor, found, parameter->name, level, expected);
}

static int64_t address(const void *data, tw_dtype dtype, size_t index)
{
    if (dtype.bits == 8) return ((const uint8_t *)data)[index];
    if (dtype.bits == 16) return ((const uint16_t *)data)[index];
    return ((const int32_t *)data)[index];
}

/* Whether each address is one that could not lead kernels out of their arrays. */
static tilewright_status check_addresses(const tw_parameter *parameter, const char *level, const void *data, size_t bytes)
{
    tw_dtype dtype = parameter->shape.dtype;
    size_t count = bytes / (dtype.bits / 8u);
    if (!parameter->addresses || !count) return TILEWRIGHT_OK;
    int64_t lowest = INT64_MAX, highest = INT64_MIN, before = INT64_MIN;
    bool falls = false;
    for (size_t i = 0; i < count; ++i) {
        int64_t each = address(data, dtype, i);
        lowest = each < lowest ? each : lowest;
        highest = each > highest ? each : highest;
        falls |= each < before;
        before = each;
    }
    if (lowest < parameter->lowest || highest > parameter->highest) {
        return tw_fail(TILEWRIGHT_INVALID_ARTIFACT,
                       "%s of %s holds addresses %lld to %lld; its kernel takes %lld to %lld; compile the model again",
                       parameter->name, level, (long long)lowest, (long long)highest, (long long)parameter->lowest,
                       (long long)parameter->highest);
    }
    if (parameter->ascending && falls) {
        return tw_fail(TILEWRIGHT_INVALID_ARTIFACT,
                       "%s of %s must not fall from one address to the next; compile the model again", parameter->name, level);
    }
    return TILEWRIGHT_OK;
}

/* Members of an object in an array, which is in the order of keys. */
static const tw_json **members(tw_arena *arena, const tw_json *object)
{
    const tw_json **all = tw_arena_alloc(arena, object->length + 1, sizeof *all);
    size_t count = 0;
    for (const tw_json *each = object->first; all && each; each = each->next) all[count++] = each;
    return all;
}

static int by_key(const void *name, const void *member)
{
    const tw_json *value = *(const tw_json *const *)member;
    size_t length = strlen(name), shorter = length < value->key_length ? length : value->key_length;
    int order = memcmp(name, value->key, shorter);
    return order ? order : (length > value->key_length) - (length < value->key_length);
}

static tilewright_status bind(const tw_parameter *parameter, const char *level, const tw_json *entry, const char *data, size_t size,
                              tw_tensor *tensor)
{
    size_t begin, end, bytes;
    if (!entry) {
        return tw_fail(TILEWRIGHT_INVALID_ARTIFACT, TW_WEIGHTS " lacks the tensor %s; compile the model again", parameter->tensor);
    }
    if (!agrees(entry, &parameter->shape)) return other_kind(parameter, level, entry);
    if (!place(entry, size, &begin, &end)) return foreign("a tensor outside of the file");
    if (!tw_shape_bytes(&parameter->shape, 0, 0, &bytes) || bytes != end - begin) return foreign("a shape that does not fill its bytes");
    if ((uintptr_t)(data + begin) % ALIGNMENT) return foreign("a tensor that is not aligned");
    /* kernels take pointers that may be written through, and write to none of their parameters */
    memcpy(&tensor->data, &(const char *){data + begin}, sizeof tensor->data);
    return check_addresses(parameter, level, data + begin, bytes);
}

tilewright_status tw_weights_bind(tw_arena *arena, const void *file, size_t size, const tw_level *level, tw_tensor *tensors)
{
    uint64_t header = 0;
    if (size >= 8) memcpy(&header, file, 8); /* little-endian, as x86-64 is */
    if (size < 8 || header > size - 8) return foreign("it is truncated");
    const char *text = (const char *)file + 8, *data = text + header, *problem;
    tw_arena scratch = {0};
    const tw_json *root = tw_json_parse(&scratch, text, (size_t)header, &problem);
    tilewright_status status = TILEWRIGHT_OK;
    if (!root || root->type != TW_JSON_OBJECT) {
        status = root || problem ? foreign(root ? "its header is no object" : problem) : tw_out_of_memory();
    }
    const tw_json **entries = status == TILEWRIGHT_OK ? members(&scratch, root) : NULL;
    if (status == TILEWRIGHT_OK && !entries) status = tw_out_of_memory();
    for (size_t i = 0; status == TILEWRIGHT_OK && i < level->parameter_count; ++i) {
        const tw_parameter *each = &level->parameters[i];
        const tw_json *const *found = bsearch(each->tensor, entries, root->length, sizeof *entries, by_key);
        if (!tw_tensor_make(arena, &each->shape, &tensors[i])) status = tw_out_of_memory();
        else status = bind(each, level->name, found ? *found : NULL, data, size - 8 - (size_t)header, &tensors[i]);
    }
    tw_arena_free(&scratch);
    return status;
}
