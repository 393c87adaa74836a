/* Tensors of weights.safetensors as kernels take them. */
#ifndef TW_WEIGHTS_H
#define TW_WEIGHTS_H

#include "manifest.h"

/* The tensors of the parameters of `level` in the `size` bytes of a weights file, in tensors[level->parameter_count]; they
 * point into `file`, which is at a multiple of 64. Checks that each is there, of the dtype and shape that the manifest
 * lists, aligned to 64 bytes, and that addresses are ones that are safe. */
tilewright_status tw_weights_bind(tw_arena *arena, const void *file, size_t size, const tw_level *level, tw_tensor *tensors);

#endif
