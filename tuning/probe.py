"""A small library that is loaded on the machine to be tuned for, next to nothing but TVM's runtime.

It holds the peak loops, and what tells about the machine: any TVM RPC server can then be asked for the files of FILES.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tilewright.errors import TilewrightError
from tilewright.tuning import peak

_CACHE = "/sys/devices/system/cpu/cpu0/cache/index"
FILES = (
    "/proc/cpuinfo",
    "/sys/class/dmi/id/sys_vendor",
    "/sys/class/dmi/id/product_name",
    *(f"{_CACHE}{index}/{name}" for index in range(4) for name in ("level", "type", "size")),
)
"""What function `dump` copies, by number, to DUMP in the server's folder."""

DUMP = "tilewright.dump"
NAME = "tilewright_probe.so"

_SOURCE = """
#include <fcntl.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
typedef struct { int type; unsigned padding; long value; } Any; /* TVMFFIAny: type 0 is None, 1 an integer */
static const char *const files[] = { %s };

int __tvm_ffi_dump(void *self, const Any *args, int count, Any *result) {
  char block[4096];
  int from = open(files[args[0].value], O_RDONLY), to = open("%s", O_WRONLY | O_CREAT | O_TRUNC, 0600);
  long got;
  while (from >= 0 && (got = read(from, block, sizeof block)) > 0 && write(to, block, got) == got) {}
  close(from);
  close(to);
  result->type = 0;
  result->value = 0;
  return 0;
}

/* jiffies of all processors since boot: those that the hypervisor stole (argument 0), or all (1); proc_stat(5) */
int __tvm_ffi_jiffies(void *self, const Any *args, int count, Any *result) {
  long jiffies[8] = {0}, all = 0;
  FILE *from = fopen("/proc/stat", "r");
  if (from) {
    fscanf(from, "cpu");
    for (int i = 0; i < 8 && fscanf(from, "%%ld", &jiffies[i]) == 1; i++) all += jiffies[i];
    fclose(from);
  }
  result->type = 1;
  result->value = args[0].value ? all : jiffies[7];
  return 0;
}

/* asks Linux for the use of AMX tiles, as tilewright/cpu.py does; 0 if it agrees */
int __tvm_ffi_tiles(void *self, const Any *args, int count, Any *result) {
  result->type = 1;
  result->value = syscall(158, 0x1023, 18);
  return 0;
}
"""


def build_probe(directory: Path) -> Path:
    """Make the library in `directory` (needs gcc); returns its path."""
    loops, code, library = directory / "loops.s", directory / "probe.c", directory / NAME
    loops.write_text(peak.source())
    code.write_text(_SOURCE % (", ".join(f'"{name}"' for name in FILES), DUMP))
    try:
        made = subprocess.run(["gcc", "-O1", "-fPIC", "-shared", "-o", library, loops, code], capture_output=True, text=True)
    except OSError as error:
        raise TilewrightError(f"tuning needs gcc, which cannot be run ({error.strerror}); install it") from None
    if made.returncode:
        raise TilewrightError(f"gcc cannot build the probe: {(made.stderr.splitlines() or [''])[0]}")
    return library
