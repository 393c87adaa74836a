/* embed WEIGHTS TEXT...: prints the embedding of each text, a line of numbers each.
 *
 *     tilewright compile models/minilm-l6-80-4x1 --emit c-library --name minilm -o build/minilm
 *     make -C examples/c && examples/c/embed build/minilm/minilm.safetensors "A man is eating." "Somebody has lunch."
 *
 * WEIGHTS is "" for a library that was made with --embed-weights. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "minilm.h"

static int fail(void)
{
    fprintf(stderr, "error: %s\n", minilm_error());
    return 1;
}

/* The number of the output `name`, or -1. */
static int find_output(const minilm_info *info, const char *name)
{
    for (size_t i = 0; i < info->outputs; ++i) {
        if (strcmp(info->output[i].name, name) == 0) return (int)i;
    }
    return -1;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: %s WEIGHTS TEXT...\n", argv[0]);
        return 2;
    }
    const minilm_options options = {.threads = 1};
    minilm_engine *engine;
    if (minilm_open(*argv[1] ? argv[1] : NULL, &options, &engine) != MINILM_OK) return fail();

    const minilm_info *info = minilm_describe(engine);
    int number = find_output(info, "sentence_embedding");
    if (number < 0) {
        fprintf(stderr, "error: the model gives no sentence_embedding\n");
        minilm_close(engine);
        return 1;
    }
    size_t width = (size_t)info->output[number].width, room = (size_t)info->max_positions;
    int64_t *ids = malloc(room * sizeof *ids);
    float *embedding = malloc(width * sizeof *embedding);
    float **outputs = calloc(info->outputs, sizeof *outputs); /* NULL: not wanted */
    int status = ids && embedding && outputs ? 0 : 1;
    if (status == 0) outputs[number] = embedding;

    for (int i = 2; i < argc && status == 0; ++i) {
        const minilm_text text = {argv[i], strlen(argv[i])};
        size_t tokens;
        if (minilm_tokenize(engine, &text, 1, 1, ids, NULL, room, &tokens) != MINILM_OK ||
            minilm_run(engine, ids, NULL, NULL, 1, tokens, outputs) != MINILM_OK) {
            status = fail();
            break;
        }
        for (size_t k = 0; k < width; ++k) printf("%s%.9g", k ? " " : "", embedding[k]);
        printf("\n");
    }
    free(ids);
    free(embedding);
    free(outputs);
    minilm_close(engine);
    return status;
}
