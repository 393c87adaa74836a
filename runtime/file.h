/* Files that others wrote: regular ones only, since a FIFO would wait for its writer for ever and a device may have no end. */
#ifndef TW_FILE_H
#define TW_FILE_H

#include <stdbool.h>
#include <sys/types.h>

#include "sha256.h"

/* A file in memory; bytes is NULL if there is none. */
typedef struct {
    void *bytes;
    size_t size;
} tw_mapping;

/* Open `name` of a directory (AT_FDCWD: a path) for reading, and tell its size unless that is NULL; -1 and errno on failure. */
int tw_file_open(int directory, const char *name, size_t *size);

/* Read up to `size` bytes; fewer at the end of the file, -1 and errno on failure. */
ssize_t tw_file_read(int file, char *to, size_t size);

/* The sha256 of a file; false and errno on failure. It is read, not mapped, so that its pages do not count as the process's. */
bool tw_file_hash(int directory, const char *name, char hex[TW_SHA256_HEX]);

/* Map a file, sharing its pages with others who do; false and errno on failure. */
bool tw_file_map(int directory, const char *name, tw_mapping *mapping);

void tw_file_unmap(const tw_mapping *mapping);

#endif
