/* What the compiler writes of a model into a library that holds it (codegen/library.py). */
#ifndef TW_LIBRARY_H
#define TW_LIBRARY_H

/* A kernel or variable of the library of an ISA level. */
typedef struct {
    const char *level, *name;
    void *address;
} tw_library_symbol;

extern const tw_library_symbol tw_library_symbols[]; /* up to one without a name */

/* Files of the artifact, from their first byte to behind their last; weights and table are empty where there are none. */
extern const char tw_library_manifest[], tw_library_manifest_end[];
extern const char tw_library_weights[], tw_library_weights_end[]; /* at a multiple of 64 */
extern const char tw_library_wordpiece[], tw_library_wordpiece_end[];

#endif
