#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "error.h"

enum {
    PAUSES = 200,           /* before a thread yields its core: some microseconds */
    DEFAULT_SPIN_US = 3000, /* longer than a call's serial stretches on Zen 4 */
    STACK = 1 << 20         /* kernels keep at most some 4 KB arrays there; musl's default is 128 KB */
};

/* Blocks of scratch memory, the first `taken` of which are in use. A block is made larger when more is asked of it. */
typedef struct {
    struct {
        void *memory;
        size_t size;
    } *blocks;
    size_t taken, count;
} scratch;

typedef struct {
    tw_pool *pool;
    int32_t share;
    pthread_t thread;
    scratch scratch;
} worker;

struct tw_pool {
    int32_t threads;
    int64_t spin_ns;
    int32_t *cores;
    pid_t process; /* that the threads run in; 0: they have not been started */
    bool stopping;
    worker *workers; /* [threads]; the first is whoever calls */

    /* A launch: written before `epoch` is, which tells the workers. */
    tw_task task;
    void *data;
    tw_group group;
    atomic_int failed;

    /* Each of the two is written by one side for the other to wait on, so each has a cache line. */
    _Alignas(64) _Atomic uint32_t epoch;
    _Atomic uint32_t sleeping; /* workers that need a system call to notice a new epoch */
    _Alignas(64) _Atomic uint32_t pending;
    _Atomic uint32_t caller_sleeps;
};

static _Thread_local tw_pool *entered;
static _Thread_local scratch *own_scratch;

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Wait actively until *word is not `value`; false if that takes longer than the pool's spinning time. */
static bool spin(const tw_pool *pool, const _Atomic uint32_t *word, uint32_t value)
{
    for (int i = 0; i < PAUSES; ++i) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return true;
        __builtin_ia32_pause();
    }
    for (int64_t end = now_ns() + pool->spin_ns; now_ns() < end;) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return true;
        sched_yield();
    }
    return false;
}

static void await_launch(tw_pool *pool, uint32_t seen)
{
    while (!spin(pool, &pool->epoch, seen)) {
        /* whoever writes a new epoch looks at `sleeping` afterwards, so either sees the other */
        atomic_fetch_add(&pool->sleeping, 1);
        while (atomic_load(&pool->epoch) == seen) futex_wait(&pool->epoch, seen);
        atomic_fetch_sub(&pool->sleeping, 1);
    }
}

static void await_workers(tw_pool *pool)
{
    uint32_t left;
    while ((left = atomic_load_explicit(&pool->pending, memory_order_acquire)) != 0) {
        if (spin(pool, &pool->pending, left)) continue;
        atomic_store(&pool->caller_sleeps, 1);
        while ((left = atomic_load(&pool->pending)) != 0) futex_wait(&pool->pending, left);
        atomic_store(&pool->caller_sleeps, 0);
    }
}

static void *work(void *argument)
{
    worker *self = argument;
    tw_pool *pool = self->pool;
    own_scratch = &self->scratch;
    for (uint32_t seen = 0;; ++seen) {
        await_launch(pool, seen);
        if (pool->stopping) return NULL;
        if (pool->task(self->share, &pool->group, pool->data) != 0) atomic_store(&pool->failed, 1);
        if (atomic_fetch_sub(&pool->pending, 1) == 1 && atomic_load(&pool->caller_sleeps)) futex_wake(&pool->pending);
    }
}

static void announce(tw_pool *pool)
{
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->sleeping)) futex_wake(&pool->epoch);
}

int tw_pool_launch(tw_task task, void *data, int shares)
{
    (void)shares; /* a wish; kernels take whatever number of shares the group has */
    tw_pool *pool = entered;
    if (!pool || pool->threads == 1) {
        tw_group alone = {NULL, 1};
        return task(0, &alone, data);
    }
    pool->task = task;
    pool->data = data;
    pool->group = (tw_group){NULL, pool->threads};
    atomic_store_explicit(&pool->failed, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->pending, (uint32_t)pool->threads - 1, memory_order_relaxed);
    announce(pool);
    int status = task(0, &pool->group, data);
    await_workers(pool);
    return status || atomic_load_explicit(&pool->failed, memory_order_relaxed) ? -1 : 0;
}

/* Bind a thread to `core`, or leave it where it may run if that is no core of this process. */
static void bind_to(pthread_t thread, int32_t core)
{
    if (core < 0 || core >= 1 << 20) return;
    size_t number = (size_t)core, size = CPU_ALLOC_SIZE(number + 1);
    cpu_set_t *set = CPU_ALLOC(number + 1);
    if (!set) return;
    CPU_ZERO_S(size, set);
    CPU_SET_S(number, size, set);
    pthread_setaffinity_np(thread, size, set);
    CPU_FREE(set);
}

/* End the first `count` workers, of which the caller is none. */
static void stop(tw_pool *pool, int32_t count)
{
    pool->stopping = true;
    announce(pool);
    for (int32_t i = 1; i < count; ++i) pthread_join(pool->workers[i].thread, NULL);
    pool->stopping = false;
}

static tilewright_status start(tw_pool *pool)
{
    atomic_store(&pool->epoch, 0);
    atomic_store(&pool->sleeping, 0);
    atomic_store(&pool->pending, 0);
    atomic_store(&pool->caller_sleeps, 0);
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return tw_out_of_memory();
    pthread_attr_setstacksize(&attributes, STACK);
    sigset_t all, before; /* signals are for the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int32_t started = 1;
    int error = 0;
    for (; started < pool->threads; ++started) {
        worker *each = &pool->workers[started];
        each->pool = pool;
        each->share = started;
        each->scratch.taken = 0;
        if ((error = pthread_create(&each->thread, &attributes, work, each)) != 0) break;
        if (pool->cores) bind_to(each->thread, pool->cores[started]);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error) {
        stop(pool, started);
        return tw_fail(TILEWRIGHT_OUT_OF_MEMORY, "thread %d of %d cannot be started (%s); ask for fewer", started + 1,
                       pool->threads, strerror(error));
    }
    pool->process = getpid();
    return TILEWRIGHT_OK;
}

tilewright_status tw_pool_create(int32_t threads, const int32_t *cores, int32_t spin_us, tw_pool **result)
{
    tw_pool *pool = NULL;
    if (posix_memalign((void **)&pool, _Alignof(tw_pool), sizeof *pool) != 0) return tw_out_of_memory();
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->spin_ns = spin_us < 0 ? 0 : INT64_C(1000) * (spin_us ? spin_us : DEFAULT_SPIN_US);
    pool->workers = calloc((size_t)threads, sizeof *pool->workers);
    if (cores) pool->cores = calloc((size_t)threads, sizeof *cores);
    tilewright_status status = TILEWRIGHT_OK;
    if (!pool->workers || (cores && !pool->cores)) status = tw_out_of_memory();
    if (status == TILEWRIGHT_OK && cores) memcpy(pool->cores, cores, (size_t)threads * sizeof *cores);
    if (status == TILEWRIGHT_OK && threads > 1) status = start(pool);
    if (status == TILEWRIGHT_OK) *result = pool;
    else tw_pool_destroy(pool);
    return status;
}

void tw_pool_destroy(tw_pool *pool)
{
    if (!pool) return;
    if (pool->process == getpid()) stop(pool, pool->threads);
    for (int32_t i = 0; pool->workers && i < pool->threads; ++i) {
        scratch *each = &pool->workers[i].scratch;
        for (size_t k = 0; k < each->count; ++k) free(each->blocks[k].memory);
        free(each->blocks);
    }
    free(pool->workers);
    free(pool->cores);
    free(pool);
}

tilewright_status tw_pool_enter(tw_pool *pool)
{
    if (pool->threads > 1 && pool->process != getpid()) {
        tilewright_status status = start(pool);
        if (status != TILEWRIGHT_OK) return status;
    }
    entered = pool;
    own_scratch = &pool->workers[0].scratch;
    return TILEWRIGHT_OK;
}

void tw_pool_leave(void)
{
    entered = NULL;
    own_scratch = NULL;
}

void *tw_scratch_take(uint64_t size)
{
    scratch *own = own_scratch;
    if (!own || size > SIZE_MAX / 2) return NULL;
    if (own->taken == own->count) {
        void *more = realloc(own->blocks, (own->count + 1) * sizeof *own->blocks);
        if (!more) return NULL;
        own->blocks = more;
        memset(&own->blocks[own->count++], 0, sizeof *own->blocks);
    }
    if (own->blocks[own->taken].size < size || !own->blocks[own->taken].memory) {
        free(own->blocks[own->taken].memory);
        memset(&own->blocks[own->taken], 0, sizeof *own->blocks);
        if (posix_memalign(&own->blocks[own->taken].memory, 64, size ? size : 1) != 0) return NULL;
        own->blocks[own->taken].size = size;
    }
    return own->blocks[own->taken++].memory;
}

int tw_scratch_return(void *memory)
{
    scratch *own = own_scratch;
    if (!own || own->taken == 0 || own->blocks[own->taken - 1].memory != memory) return -1;
    --own->taken;
    return 0;
}
