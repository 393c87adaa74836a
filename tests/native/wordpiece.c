/* wordpiece TABLE: answers requests of tests/test_wordpiece.py on stdin until it ends.
 *
 * A request, in native words: limit u64, texts i32, room for tokens i32, then for each text its size u64 and its bytes.
 * The answer: what encode returned, i64, then the ids and the types that it wrote, i64 each. */
#include "wordpiece.h"

#include <stdio.h>
#include <stdlib.h>

static int get(void *to, size_t size)
{
    return size == 0 || fread(to, size, 1, stdin) == 1;
}

/* A file in memory of exactly its size, so that a read beyond its end is found. */
static void *load(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) return NULL;
    *size = (size_t)ftell(file);
    rewind(file);
    void *bytes = malloc(*size);
    int whole = fread(bytes, 1, *size, file) == *size;
    fclose(file);
    return whole ? bytes : NULL;
}

int main(int argc, char **argv)
{
    size_t size = 0;
    void *bytes = argc == 2 ? load(argv[1], &size) : NULL;
    tw_wordpiece table;
    const char *problem = tw_wordpiece_read(bytes, size, &table);
    if (problem) {
        fprintf(stderr, "%s\n", problem);
        free(bytes);
        return 2;
    }
    uint64_t limit;
    int32_t count, capacity;
    while (get(&limit, 8) && get(&count, 4) && get(&capacity, 4)) {
        tilewright_text texts[2] = {{NULL, 0}, {NULL, 0}};
        for (int i = 0; i < count; ++i) {
            uint64_t length;
            if (!get(&length, 8)) return 1;
            char *text = malloc(length);
            if (!get(text, length)) return 1;
            texts[i] = (tilewright_text){text, length};
        }
        int64_t *ids = malloc((size_t)capacity * 8), *types = malloc((size_t)capacity * 8);
        int64_t total = tw_wordpiece_encode(&table, texts, count, limit, ids, types, (size_t)capacity);
        size_t written = total < 0 ? 0 : total < capacity ? (size_t)total : (size_t)capacity;
        fwrite(&total, 8, 1, stdout);
        fwrite(ids, 8, written, stdout);
        fwrite(types, 8, written, stdout);
        fflush(stdout);
        for (int i = 0; i < count; ++i) free((char *)texts[i].bytes);
        free(ids);
        free(types);
    }
    free(bytes);
    return 0;
}
