#include "kernel.h"

#include <stddef.h>
#include <stdio.h>

#include "pool.h"

static _Thread_local char text[1024];

const char *tw_kernel_error(void)
{
    return text;
}

void tw_clear_kernel_error(void)
{
    text[0] = 0;
}

/* TVMFFIErrorSetRaisedFromCStrParts */
static void raise_error(const char *kind, const char **parts, int32_t count)
{
    int at = snprintf(text, sizeof text, "%s: ", kind);
    for (int32_t i = 0; i < count && at >= 0 && (size_t)at < sizeof text; ++i) {
        if (parts[i]) at += snprintf(text + at, sizeof text - (size_t)at, "%s", parts[i]);
    }
}

/* TVMBackendAllocWorkspace: memory of the running thread, which kernels give back in the reverse order. */
static void *allocate(int type, int id, uint64_t size, int code, int bits)
{
    (void)type, (void)id, (void)code, (void)bits;
    return tw_scratch_take(size);
}

static int release(int type, int id, void *memory)
{
    (void)type, (void)id;
    return tw_scratch_return(memory);
}

void tw_connect_library(void *(*symbol)(void *context, const char *level, const char *name), void *context, const char *level)
{
    typedef void (*function)(void);
    const struct {
        const char *name;
        function value;
    } variables[] = {{"__TVMBackendParallelLaunch", (function)tw_pool_launch},
                     {"__TVMBackendAllocWorkspace", (function)allocate},
                     {"__TVMBackendFreeWorkspace", (function)release},
                     {"tilewright_raise", (function)raise_error}};
    for (size_t i = 0; i < sizeof variables / sizeof *variables; ++i) {
        /* a library has those that its kernels use; engines that share it write what stands there already */
        function *variable = symbol(context, level, variables[i].name);
        if (variable) __atomic_store_n(variable, variables[i].value, __ATOMIC_RELAXED);
    }
}
