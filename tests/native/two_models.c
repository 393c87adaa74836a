/* Two models in one program: prints the first value of what each makes of the same text. */
#include <stdio.h>

#include "minilm.h"
#include "other.h"

int main(void)
{
    int64_t ids[32];
    size_t tokens;
    float values[2][32];
    float *first[] = {NULL, values[0]}, *second[] = {NULL, values[1]};
    minilm_engine *one;
    other_engine *two;
    const minilm_text text = {"a bad cab", 9};
    const other_options options = {.threads = 2};
    if (minilm_open(NULL, NULL, &one) != MINILM_OK || other_open(NULL, &options, &two) != OTHER_OK) return 1;
    if (minilm_tokenize(one, &text, 1, 1, ids, NULL, 32, &tokens) != MINILM_OK) return 2;
    if (minilm_run(one, ids, NULL, NULL, 1, tokens, first) != MINILM_OK) return 3;
    if (other_run(two, ids, NULL, NULL, 1, tokens, second) != OTHER_OK) return 4;
    if (other_run(two, ids, NULL, NULL, 1, 0, second) != OTHER_INVALID_INPUT || !*other_error() || *minilm_error()) return 5;
    printf("%.9g\n%.9g\n", (double)values[0][0], (double)values[1][0]);
    minilm_close(one);
    other_close(two);
    return 0;
}
