/* Tensors as kernels take them, made from the shapes of a manifest. */
#ifndef TW_TENSOR_H
#define TW_TENSOR_H

#include "manifest.h"

/* A tensor of the extents `shape`, for `groups` and `sequences`, whose shape and strides live in `arena`; data is NULL.
 * False if memory is out. */
bool tw_tensor_make(tw_arena *arena, const tw_shape *shape, tw_tensor *tensor);

/* Set the extents of `tensor`, made from `shape`, for a call. */
void tw_tensor_resize(const tw_shape *shape, int64_t groups, int64_t sequences, tw_tensor *tensor);

#endif
