#include "tensor.h"

bool tw_tensor_make(tw_arena *arena, const tw_shape *shape, tw_tensor *tensor)
{
    int64_t *extents = tw_arena_alloc(arena, 2 * (size_t)shape->ndim + 1, sizeof *extents);
    if (!extents) return false;
    *tensor = (tw_tensor){.device = {TW_CPU, 0}, .ndim = shape->ndim, .dtype = shape->dtype};
    tensor->shape = extents;
    tensor->strides = extents + shape->ndim;
    tw_tensor_resize(shape, 0, 0, tensor);
    return true;
}

void tw_tensor_resize(const tw_shape *shape, int64_t groups, int64_t sequences, tw_tensor *tensor)
{
    int64_t stride = 1;
    for (int32_t i = shape->ndim - 1; i >= 0; --i) {
        int64_t extent = shape->shape[i];
        tensor->shape[i] = extent == TW_GROUPS ? groups : extent == TW_SEQUENCES ? sequences : extent;
        tensor->strides[i] = stride;
        stride = (int64_t)((uint64_t)stride * (uint64_t)tensor->shape[i]); /* whoever makes the tensor bounds its size */
    }
}
