/* Threads of an engine that share the tasks of parallel loops, and the scratch memory of each. */
#ifndef TW_POOL_H
#define TW_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tilewright.h"

typedef struct tw_pool tw_pool;

/* A pool of `threads`, of which the caller of tw_pool_enter is the first. Starts the others. `cores`, `spin_us`: as in
 * tilewright_options. */
tilewright_status tw_pool_create(int32_t threads, const int32_t *cores, int32_t spin_us, tw_pool **pool);

void tw_pool_destroy(tw_pool *pool);

/* Until tw_pool_leave, launches of this thread run on `pool`. In a forked child, where the threads that the parent started
 * are not, this starts them anew. */
tilewright_status tw_pool_enter(tw_pool *pool);
void tw_pool_leave(void);

/* TVMBackendParallelLaunch: call `task` once in each thread, as share 0 .. threads - 1, and wait; outside of a pool, once
 * in all. Returns 0 if all did. */
typedef struct {
    void *sync;
    int32_t shares;
} tw_group; /* TVMParallelGroupEnv */
typedef int (*tw_task)(int share, tw_group *group, void *data);
int tw_pool_launch(tw_task task, void *data, int shares);

/* Memory of the running thread, aligned to 64 bytes, taken and returned last in, first out; NULL if there is none. */
void *tw_scratch_take(uint64_t size);
int tw_scratch_return(void *memory);

#endif
