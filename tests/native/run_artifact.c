/* Runs batches with an artifact through the public API, each with the engine's own threads, and writes the outputs.
 *
 *     run_artifact ARTIFACT LEVEL THREADS < batches > outputs
 *
 * A batch is i64 [kind, batch, seq or tokens], then ids, mask (kind 1 and 3), types (kind 2 and 3), or for kind 4 ids and
 * offsets[batch + 1]. Outputs are f32, in the order of the model's. A batch that is refused gives its text on stderr. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tilewright.h"

static int64_t *read_values(size_t count)
{
    int64_t *values = malloc((count ? count : 1) * sizeof *values);
    if (!values || fread(values, sizeof *values, count, stdin) != count) exit(2);
    return values;
}

int main(int count, char **arguments)
{
    if (count != 4) return 2;
    tilewright_engine *engine;
    const tilewright_options options = {.threads = atoi(arguments[3]), .level = *arguments[2] ? arguments[2] : NULL};
    tilewright_status status = tilewright_open(arguments[1], &options, &engine);
    if (status != TILEWRIGHT_OK) {
        fprintf(stderr, "%s\n", tilewright_error());
        return 10 + (int)status;
    }
    const tilewright_info *info = tilewright_describe(engine);
    int64_t header[3];
    while (fread(header, sizeof *header, 3, stdin) == 3) {
        size_t batch = (size_t)header[1], seq = (size_t)header[2], tokens = header[0] == 4 ? seq : batch * seq;
        int64_t *ids = read_values(tokens);
        int64_t *mask = header[0] & 1 ? read_values(tokens) : NULL, *types = header[0] & 2 ? read_values(tokens) : NULL;
        int64_t *offsets = header[0] == 4 ? read_values(batch + 1) : NULL;
        float **outputs = calloc(info->outputs, sizeof *outputs);
        for (size_t i = 0; i < info->outputs; ++i) {
            size_t values = (info->output[i].per_token ? tokens : batch) * (size_t)info->output[i].width;
            outputs[i] = malloc(values * sizeof **outputs + 1); /* not aligned to anything beyond malloc's */
        }
        status = offsets ? tilewright_run_ragged(engine, ids, types, offsets, batch, outputs)
                         : tilewright_run(engine, ids, mask, types, batch, seq, outputs);
        if (status != TILEWRIGHT_OK) fprintf(stderr, "%d %s\n", (int)status, tilewright_error());
        for (size_t i = 0; i < info->outputs; ++i) {
            size_t values = (info->output[i].per_token ? tokens : batch) * (size_t)info->output[i].width;
            if (status == TILEWRIGHT_OK) fwrite(outputs[i], sizeof **outputs, values, stdout);
            free(outputs[i]);
        }
        free(outputs);
        free(ids);
        free(mask);
        free(types);
        free(offsets);
    }
    tilewright_close(engine);
    return 0;
}
