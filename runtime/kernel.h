/* The calling convention of compiled kernels, which is TVM's: packed functions of tensors (tvm/ffi/c_api.h, dlpack.h), and
 * four variables of a library by which its kernels reach the runtime. */
#ifndef TW_KERNEL_H
#define TW_KERNEL_H

#include <stdint.h>

#include "tilewright.h"

typedef struct {
    uint8_t code; /* 0 signed, 1 unsigned, 2 float */
    uint8_t bits;
    uint16_t lanes;
} tw_dtype;

/* DLTensor */
typedef struct {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    tw_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements */
    uint64_t byte_offset;
} tw_tensor;

enum { TW_CPU = 1 /* kDLCPU */, TW_TENSOR_POINTER = 7 /* kTVMFFIDLTensorPtr */ };

/* TVMFFIAny */
typedef struct {
    int32_t type;
    int32_t padding;
    union {
        int64_t integer;
        void *pointer;
    } value;
} tw_any;

/* Returns 0, or another number after it has told what is wrong through TVMFFIErrorSetRaisedFromCStrParts. */
typedef int (*tw_kernel)(void *self, const tw_any *arguments, int32_t count, tw_any *result);

#define TW_KERNEL_PREFIX "__tvm_ffi_"

/* Point the variables of a library, whose symbols `symbol` finds, to this runtime. */
void tw_connect_library(void *(*symbol)(void *context, const char *level, const char *name), void *context,
                        const char *level);

/* What the last failed kernel of this thread said; empty if nothing since tw_clear_kernel_error. */
const char *tw_kernel_error(void);
void tw_clear_kernel_error(void);

#endif
