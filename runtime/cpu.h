/* What this CPU offers to this process, and which level of an artifact runs on it. */
#ifndef TW_CPU_H
#define TW_CPU_H

#include "manifest.h"

/* The level to run: the one named `name`, or if that is NULL the last whose features this CPU has, or any for `any_cpu`. */
tilewright_status tw_choose_level(const tw_manifest *manifest, const char *name, bool any_cpu, const tw_level **level);

/* The number of cores this process may run on. */
int32_t tw_available_cores(void);

#endif
