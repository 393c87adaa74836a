/* Calls kernels of a library in a pool of the runtime, for tests that need no artifact. */
#include <dlfcn.h>

#include "kernel.h"
#include "pool.h"

static void *find_symbol(void *library, const char *level, const char *symbol)
{
    (void)level;
    return dlsym(library, symbol);
}

/* Point the kernels of a library that dlopen returned to the runtime. */
void harness_connect(void *library)
{
    tw_connect_library(find_symbol, library, "");
}

tw_pool *harness_pool(int threads)
{
    tw_pool *pool = NULL;
    return tw_pool_create(threads, NULL, 0, &pool) == TILEWRIGHT_OK ? pool : NULL;
}

void harness_end(tw_pool *pool)
{
    tw_pool_destroy(pool);
}

/* Give the pool's first thread scratch memory that no kernel of the tests outgrows. */
void harness_reserve(tw_pool *pool)
{
    enum { BLOCKS = 8, BYTES = 1 << 20 };
    void *blocks[BLOCKS];
    if (tw_pool_enter(pool) != TILEWRIGHT_OK) return;
    for (int i = 0; i < BLOCKS; ++i) blocks[i] = tw_scratch_take(BYTES);
    for (int i = BLOCKS; i--;) tw_scratch_return(blocks[i]);
    tw_pool_leave();
}

/* Let the calling thread run kernels from now on. */
int harness_enter(tw_pool *pool)
{
    return (int)tw_pool_enter(pool);
}

/* 0 if the kernel returned that. */
int harness_call(tw_pool *pool, tw_kernel kernel, const tw_any *arguments, int count)
{
    tw_any result = {0};
    if (tw_pool_enter(pool) != TILEWRIGHT_OK) return -1;
    int status = kernel(NULL, arguments, count, &result);
    tw_pool_leave();
    return status;
}
