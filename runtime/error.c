#include "error.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char text[2048];

const char *tilewright_error(void)
{
    return text;
}

tilewright_status tw_fail(tilewright_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    /* names in files may hold anything, but an error is one line */
    for (char *c = text; *c; ++c) {
        if ((unsigned char)*c < ' ') *c = ' ';
    }
    return status;
}

tilewright_status tw_out_of_memory(void)
{
    return tw_fail(TILEWRIGHT_OUT_OF_MEMORY, "no memory is left; run smaller batches or fewer engines");
}
