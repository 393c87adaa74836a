/* Several engines in one process, called from several threads: `threads ARTIFACT`. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "tilewright.h"

enum { ENGINES = 3, CALLERS = 2, CALLS = 200, BATCH = 9, SEQ = 20, WIDTH = 8 };

static const char *path;
static float expected[BATCH][WIDTH];

static int call(tilewright_engine *engine, float (*total)[WIDTH])
{
    int64_t ids[BATCH][SEQ];
    for (int64_t i = 0; i < BATCH * SEQ; ++i) ids[i / SEQ][i % SEQ] = i * 7 % 100;
    float *outputs[] = {NULL, NULL, total[0]};
    return tilewright_run(engine, ids[0], NULL, NULL, BATCH, SEQ, outputs);
}

static void *caller(void *engine)
{
    for (int i = 0; i < CALLS; ++i) {
        float total[BATCH][WIDTH];
        if (call(engine, total) != TILEWRIGHT_OK || memcmp(total, expected, sizeof total) != 0) return engine;
    }
    return NULL;
}

int main(int count, char **arguments)
{
    if (count != 2) return 2;
    path = arguments[1];
    tilewright_engine *engines[ENGINES];
    for (int32_t i = 0; i < ENGINES; ++i) {
        /* threads that sleep at once, that never do, and that do after a while */
        const tilewright_options options = {.threads = i + 2, .spin_us = (int32_t[]){-1, 1000000, 1}[i]};
        if (tilewright_open(path, &options, &engines[i]) != TILEWRIGHT_OK) return 3;
    }
    if (call(engines[0], expected) != TILEWRIGHT_OK) return 4;
    pthread_t threads[ENGINES * CALLERS];
    for (int i = 0; i < ENGINES * CALLERS; ++i) {
        if (pthread_create(&threads[i], NULL, caller, engines[i % ENGINES]) != 0) return 5;
    }
    int failures = 0;
    for (int i = 0; i < ENGINES * CALLERS; ++i) {
        void *failed;
        pthread_join(threads[i], &failed);
        failures += failed != NULL;
    }
    for (int i = 0; i < ENGINES; ++i) tilewright_close(engines[i]);
    printf("%d failures\n", failures);
    return failures != 0;
}
