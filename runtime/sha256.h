/* SHA-256 (FIPS 180-4). */
#ifndef TW_SHA256_H
#define TW_SHA256_H

#include <stddef.h>
#include <stdint.h>

enum { TW_SHA256_HEX = 65 }; /* 64 digits and a NUL */

typedef struct {
    uint32_t state[8];
    uint64_t length; /* bytes so far */
    uint8_t block[64];
} tw_sha256;

void tw_sha256_init(tw_sha256 *hash);
void tw_sha256_update(tw_sha256 *hash, const void *bytes, size_t size);
void tw_sha256_finish(tw_sha256 *hash, char hex[TW_SHA256_HEX]);

#endif
