/* Memory that is given back as a whole. */
#ifndef TW_ARENA_H
#define TW_ARENA_H

#include <stddef.h>

typedef struct tw_arena {
    struct tw_arena_block *blocks;
} tw_arena;

/* `count` zeroed elements of `size` bytes, aligned for any type; NULL if memory is out or the product overflows. */
void *tw_arena_alloc(tw_arena *arena, size_t count, size_t size);

void tw_arena_free(tw_arena *arena);

#endif
