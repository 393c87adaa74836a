/* Hashes for comparison with Python's: `hashes sha` writes the sha256 of the first 0 .. 300 bytes of stdin, once with the
 * SHA extensions where the CPU has them and once without; `hashes json` reads size_t-prefixed texts and writes the hash of
 * each as canonical JSON, or what is wrong with it. */
#include <stdio.h>
#include <stdlib.h>

#include "../../runtime/sha256.c"
#include "json.h"

static void sha(void)
{
    static uint8_t bytes[300];
    if (fread(bytes, 1, sizeof bytes, stdin) != sizeof bytes) exit(2);
    for (size_t size = 0; size <= sizeof bytes; ++size) {
        char hex[TW_SHA256_HEX];
        tw_sha256 hash;
        tw_sha256_init(&hash);
        tw_sha256_update(&hash, bytes, size / 3); /* in pieces */
        tw_sha256_update(&hash, bytes + size / 3, size - size / 3);
        tw_sha256_finish(&hash, hex);
        puts(hex);
    }
    uint32_t portable[8], other[8];
    memcpy(portable, initial, sizeof portable);
    memcpy(other, initial, sizeof other);
    compress_portable(portable, bytes, 4);
    compress(other, bytes, 4);
    puts(memcmp(portable, other, sizeof portable) == 0 ? "equal" : "differ");
}

static void json(void)
{
    size_t size;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        char *text = malloc(size + 1), hex[TW_SHA256_HEX];
        const char *problem;
        if (fread(text, 1, size, stdin) != size) exit(2);
        tw_arena arena = {0};
        tw_sha256 hash;
        const tw_json *value = tw_json_parse(&arena, text, size, &problem);
        if (value) {
            tw_sha256_init(&hash);
            tw_json_hash(value, NULL, &hash);
            tw_sha256_finish(&hash, hex);
        }
        puts(value ? hex : problem);
        tw_arena_free(&arena);
        free(text);
    }
}

int main(int count, char **arguments)
{
    if (count != 2) return 2;
    if (strcmp(arguments[1], "sha") == 0) sha();
    else json();
    return 0;
}
