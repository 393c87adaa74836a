#define _GNU_SOURCE
#include "cpu.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"

/* Linux's names of flags where LLVM's are others, besides those that differ by underscores (tilewright/cpu.py). */
static const struct {
    const char *linux_name, *llvm_name;
} names[] = {{"abm", "lzcnt"},    {"bmi1", "bmi"},     {"lahf_lm", "sahf"},  {"pclmulqdq", "pclmul"}, {"pni", "sse3"},
             {"rdrand", "rdrnd"}, {"sha_ni", "sha"},   {"sse4_1", "sse4.1"}, {"sse4_2", "sse4.2"}};

/* Ask Linux to let this process use AMX tiles, whose state it saves only for processes that ask (arch/x86/xstate.rst). The
 * permission holds in all threads, those that run already too. */
static bool tiles_permitted(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* asm/prctl.h, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* The flags of the first CPU in /proc/cpuinfo, or NULL; to be freed. */
static char *read_flags(void)
{
    FILE *file = fopen("/proc/cpuinfo", "re");
    char *line = NULL;
    size_t size = 0;
    bool found = false;
    while (file && !found && getline(&line, &size, file) > 0) found = strncmp(line, "flags", 5) == 0;
    if (file) fclose(file);
    char *flags = found ? strchr(line, ':') : NULL;
    if (flags) {
        flags = strdup(flags + 1);
        if (flags) flags[strcspn(flags, "\n")] = 0;
    }
    free(line);
    return flags;
}

/* Whether Linux's flag `flag` is LLVM's feature `feature`: avx512_vnni is avx512vnni, amx_int8 is amx-int8. */
static bool same(const char *flag, size_t length, const char *feature)
{
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
        if (strlen(names[i].linux_name) == length && memcmp(names[i].linux_name, flag, length) == 0) {
            return strcmp(names[i].llvm_name, feature) == 0;
        }
    }
    bool amx = length > 4 && memcmp(flag, "amx_", 4) == 0, avx = length > 3 && memcmp(flag, "avx", 3) == 0;
    for (size_t i = 0; i < length; ++i) {
        if (flag[i] == '_' && avx) continue;
        if ((flag[i] == '_' && amx ? '-' : flag[i]) != *feature++) return false;
    }
    return *feature == 0;
}

static bool listed(const char *flags, const char *feature)
{
    for (const char *flag = flags; flag && *flag;) {
        flag += strspn(flag, " \t");
        size_t length = strcspn(flag, " \t");
        if (length && same(flag, length, feature)) return true;
        flag += length;
    }
    return false;
}

/* The first feature of `level` that is missing, or NULL. */
static const char *missing(const tw_level *level, const char *flags, bool tiles)
{
    for (size_t i = 0; i < level->feature_count; ++i) {
        const char *feature = level->features[i];
        if (!listed(flags, feature) || (!tiles && strncmp(feature, "amx-", 4) == 0)) return feature;
    }
    return NULL;
}

static tilewright_status mismatch(const tw_level *level, const char *asked, const char *feature, const char *flags)
{
    return tw_fail(TILEWRIGHT_TARGET_MISMATCH, "%s; %s %s, which %s needs; compile it here with --target native", asked,
                   listed(flags, feature) ? "Linux refuses this process" : "this CPU lacks", feature, level->name);
}

tilewright_status tw_choose_level(const tw_manifest *manifest, const char *name, bool any_cpu, const tw_level **level)
{
    const tw_level *named = NULL, *best = NULL, *last = &manifest->levels[manifest->level_count - 1];
    for (size_t i = 0; i < manifest->level_count; ++i) {
        if (name && strcmp(manifest->levels[i].name, name) == 0) named = &manifest->levels[i];
    }
    if (name && !named) {
        return tw_fail(TILEWRIGHT_INVALID_INPUT, "level %s is asked for; the artifact holds %s%s", name, last->name,
                       manifest->level_count > 1 ? " and lesser ones" : "");
    }
    char *flags = any_cpu ? NULL : read_flags();
    bool tiles = !listed(flags, "amx-tile") || tiles_permitted();
    for (size_t i = 0; i < manifest->level_count; ++i) {
        const tw_level *each = &manifest->levels[i];
        if (any_cpu || !missing(each, flags, tiles)) best = each;
    }
    tilewright_status status = TILEWRIGHT_OK;
    if (named && !any_cpu && missing(named, flags, tiles)) {
        char asked[256];
        snprintf(asked, sizeof asked, "level %s is asked for", name);
        status = mismatch(named, asked, missing(named, flags, tiles), flags);
    } else if (!named && !best) {
        const tw_level *least = &manifest->levels[0];
        status = mismatch(least, "the artifact holds no level for this CPU", missing(least, flags, tiles), flags);
    } else {
        *level = named ? named : best;
    }
    free(flags);
    return status;
}

int32_t tw_available_cores(void)
{
    for (size_t capacity = 1024; capacity <= 1 << 20; capacity *= 4) { /* fails while the mask is too small for the system */
        size_t size = CPU_ALLOC_SIZE(capacity);
        cpu_set_t *set = CPU_ALLOC(capacity);
        if (!set) break;
        int count = sched_getaffinity(0, size, set) == 0 ? CPU_COUNT_S(size, set) : 0;
        CPU_FREE(set);
        if (count > 0) return count;
    }
    return 1;
}
