/* The text of what went wrong, kept for the thread it went wrong in. */
#ifndef TW_ERROR_H
#define TW_ERROR_H

#include "tilewright.h"

/* Keep the formatted line for tilewright_error() and return `status`. */
tilewright_status tw_fail(tilewright_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

tilewright_status tw_out_of_memory(void);

#endif
