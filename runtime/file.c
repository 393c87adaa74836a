#define _GNU_SOURCE
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUFFER = 1 << 18 };

/* Close a file and leave `error` in errno. */
static void close_with(int file, int error)
{
    close(file);
    errno = error;
}

int tw_file_open(int directory, const char *name, size_t *size)
{
    int file = openat(directory, name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    struct stat status;
    if (file < 0) return -1;
    int error = fstat(file, &status) != 0 ? errno : S_ISREG(status.st_mode) ? 0 : EINVAL;
    if (error) {
        close_with(file, error);
        return -1;
    }
    if (size) *size = (size_t)status.st_size;
    return file;
}

ssize_t tw_file_read(int file, char *to, size_t size)
{
    size_t done = 0;
    while (done < size) {
        ssize_t count = read(file, to + done, size - done);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return -1;
        if (count == 0) break;
        done += (size_t)count;
    }
    return (ssize_t)done;
}

bool tw_file_hash(int directory, const char *name, char hex[TW_SHA256_HEX])
{
    int file = tw_file_open(directory, name, NULL);
    if (file < 0) return false;
    char *buffer = malloc(BUFFER);
    tw_sha256 hash;
    tw_sha256_init(&hash);
    ssize_t count = buffer ? 0 : -1;
    while (buffer && (count = tw_file_read(file, buffer, BUFFER)) > 0) tw_sha256_update(&hash, buffer, (size_t)count);
    int error = errno;
    free(buffer);
    close_with(file, error);
    if (count == 0) tw_sha256_finish(&hash, hex);
    return count == 0;
}

bool tw_file_map(int directory, const char *name, tw_mapping *mapping)
{
    size_t size;
    int file = tw_file_open(directory, name, &size);
    if (file < 0) return false;
    void *memory = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
    close_with(file, errno);
    if (memory == MAP_FAILED) return false;
    *mapping = (tw_mapping){memory, size};
    return true;
}

void tw_file_unmap(const tw_mapping *mapping)
{
    if (mapping->bytes) munmap(mapping->bytes, mapping->size);
}
