"""An emulated x86 CPU that runs functions loaded in this process, on this process's own memory.

The CPU is that of Bochs, as the library `bochscpu`. Its page tables map every gigabyte in which this process has memory
to a gigabyte of guest-physical memory, whose pages are this process's pages, so functions and data keep their addresses.
There is no guest system: code runs in ring 0, and return address, system calls and exceptions all lead to instructions
that hand control back to Python, which executes tile instructions itself (see `emulated_amx`). The CPU model can be chosen
once per process.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulated_amx import Bytes, TileFault, Tiles

MODELS = {"haswell": 24, "skylake_x": 26, "icelake_u": 28, "sapphire_rapids": 30, "arrow_lake": 31}
"""CPU to its place in the list of Bochs 3 (cpu/cpudb.h)."""

_AVX512 = ("skylake_x", "icelake_u", "sapphire_rapids")
_AMX = ("sapphire_rapids",)
_PAGE, _GIGABYTE = 1 << 12, 1 << 30
_FIRST_GIGABYTE = 4  # devices have addresses below
_PRESENT_WRITABLE, _HUGE = 3, 0x80
_LEAVE = b"\x0f\x09"  # WBINVD, which calls a hook and does nothing else
_RETURN = b"\x48\xcf"  # IRETQ
_ILLEGAL = 6
_EXCEPTIONS = {0: "#DE divide error", 6: "#UD illegal instruction", 13: "#GP general protection", 14: "#PF page fault"}
_PUSHES_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17)
_REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
_SYSTEM_CALLS = (9, 10, 11, 12, 25, 28, 202)  # mmap, mprotect, munmap, brk, mremap, madvise, futex
_ARCH_PRCTL, _ARCH_GET_FS = 158, 0x1003

# names of glibc 2.38 that the library needs, for older systems
_COMPATIBILITY = """
#include <stdarg.h>
unsigned long long strtoull(const char *, char **, int);
int vsscanf(const char *, const char *, va_list);
unsigned long long __isoc23_strtoull(const char *text, char **end, int base) { return strtoull(text, end, base); }
int __isoc23_sscanf(const char *text, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int count = vsscanf(text, format, arguments);
  va_end(arguments);
  return count;
}
"""


class EmulationError(Exception):
    """What stopped the emulated CPU: an exception, a system call or memory it has no part in."""


class Machine:
    """An emulated CPU; `call` runs a function of this process on it."""

    def __init__(self, model: str) -> None:
        bochs = _load_bochs()
        core = ctypes.CDLL(bochs._bochscpu.__file__)
        core.sim_get_param_enum.restype = ctypes.c_void_p
        choose = core._ZN15bx_param_enum_c3setEl  # bx_param_enum_c::set(long): the Python interface cannot choose a model
        choose(ctypes.c_void_p(core.sim_get_param_enum(b"cpu.model")), ctypes.c_long(MODELS[model]))
        self._xcr0 = 0xE7 if model in _AVX512 else 0x7
        self._bochs, self._session, self._hook = bochs, bochs.Session(), bochs.Hook()
        self._hook.exception = lambda session, cpu, vector, code: self._vectors.append(vector)
        self._hook.cache_cntrl = lambda session, cpu, kind: session.stop()
        self._session.missing_page_handler = self._provide_page
        self._vectors: list[int] = []
        self._wild: list[int] = []
        self._gigabytes: list[int] = []
        self._regions: list[tuple[int, int]] = []
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._fs = _parked_thread(self._libc)
        self._tables, self._kernel, self._nowhere = _pages(16), _pages(3), _pages(1)
        self._stack_top = _pages(1024) + 1024 * _PAGE
        self._returned, self._syscall, self._trap = (self._kernel + offset for offset in (0, 16, 32))
        for address in (self._returned, self._syscall, self._trap):
            ctypes.memmove(address, _LEAVE + _RETURN, 4)
        self._gdt, self._tss, self._idt = self._kernel + 64, self._kernel + 128, self._kernel + _PAGE
        ctypes.memmove(self._gdt, struct.pack("<3Q", 0, 0xAF9B000000FFFF, 0xCF93000000FFFF), 24)
        # exceptions have a stack of their own, because code may use the red zone below its stack pointer
        _write(self._tss + 36, self._kernel + 3 * _PAGE)
        gate = struct.pack("<HHHHII", self._trap & 0xFFFF, 8, 0x8E01, self._trap >> 16 & 0xFFFF, self._trap >> 32, 0)
        ctypes.memmove(self._idt, gate * 256, _PAGE)
        self._tiles = Tiles(self._memory) if model in _AMX else None

    def call(self, function: int, *arguments: int) -> int:
        """rax after function(*arguments), at most six integers or pointers. Raises EmulationError."""
        stack = self._stack_top - 8
        ctypes.c_uint64.from_address(stack).value = self._returned
        state = self._initial_state()
        state.rip, state.rsp = function, stack
        for register, value in zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), arguments, strict=False):
            setattr(state, register, value)
        self._vectors.clear()
        self._wild.clear()
        cpu = self._session.cpu
        cpu.state = state
        while True:
            self._session.run([self._hook])
            if self._wild:
                raise EmulationError(f"access to unmapped memory at {self._wild[0]:#x}, code near {_where(cpu.rip)}")
            if self._vectors:
                self._handle_exception(cpu)
                continue
            if cpu.rip == self._returned + len(_LEAVE):
                return int(cpu.rax)
            if cpu.rip != self._syscall + len(_LEAVE):
                raise EmulationError(f"stopped at {_where(cpu.rip)}")
            cpu.state = self._system_call(cpu.state)

    def _initial_state(self) -> Any:
        def flat(selector: int, attributes: int, base: int = 0) -> Any:
            segment = self._bochs.Segment()
            segment.present, segment.selector, segment.attr = True, selector, attributes
            segment.base, segment.limit = base, 0xFFFFFFFF
            return segment

        state = self._session.cpu.state
        state.cr0, state.cr4, state.efer = 0x80050033, 0x406A0, 0xD01  # long mode with SSE, XSAVE and SYSCALL
        state.cr3, state.xcr0 = self._page_tables(), self._xcr0
        state.rflags, state.mxcsr, state.mxcsr_mask, state.fpcw = 2, 0x1F80, 0xFFFF, 0x37F
        state.lstar, state.star, state.sfmask = self._syscall, 8 << 32, 0
        state.cs, state.fs = flat(8, 0xA09B), flat(16, 0xC093, self._fs)
        state.ss = state.ds = state.es = state.gs = flat(16, 0xC093)
        state.tr = flat(40, 0x8B, self._tss)
        for name, base, size in (("gdtr", self._gdt, 24), ("idtr", self._idt, _PAGE)):
            table = self._bochs.GlobalSegment()
            table.base, table.limit = base, size - 1
            setattr(state, name, table)
        return state

    def _page_tables(self) -> int:
        """Write the tables for the memory this process has now; returns their guest-physical address."""
        self._regions = _memory_regions()
        for start, end in self._regions:
            for gigabyte in range(start // _GIGABYTE, -(-end // _GIGABYTE)):
                if gigabyte not in self._gigabytes and start < 1 << 47:
                    self._gigabytes.append(gigabyte)
        upper = sorted({gigabyte >> 9 for gigabyte in self._gigabytes})
        for place, entry in enumerate(upper):
            table = self._tables + (place + 1) * _PAGE
            _write(self._tables + 8 * entry, self._physical(table) | _PRESENT_WRITABLE)
            for gigabyte in self._gigabytes:
                if gigabyte >> 9 == entry:
                    address = self._physical(gigabyte * _GIGABYTE)
                    _write(table + 8 * (gigabyte & 511), address | _PRESENT_WRITABLE | _HUGE)
        return self._physical(self._tables)

    def _physical(self, address: int) -> int:
        place = self._gigabytes.index(address // _GIGABYTE) + _FIRST_GIGABYTE
        return place * _GIGABYTE + address % _GIGABYTE

    def _provide_page(self, physical: int) -> None:
        """Called by Bochs for a guest-physical page it does not have yet."""
        address = self._gigabytes[physical // _GIGABYTE - _FIRST_GIGABYTE] * _GIGABYTE + physical % _GIGABYTE
        page = address & -_PAGE
        if not self._has(page):
            self._regions = _memory_regions()
        if not self._has(page):
            self._wild.append(address)
            page = self._nowhere
            self._session.stop()
        self._bochs._bochscpu.memory.page_insert(physical & -_PAGE, page)

    def _has(self, page: int) -> bool:
        return any(start <= page < end for start, end in self._regions)

    def _memory(self, address: int, size: int) -> Bytes:
        """A view of this process's memory; raises EmulationError where there is none."""
        for page in range(address & -_PAGE, address + size, _PAGE):
            if not self._has(page):
                self._regions = _memory_regions()
            if not self._has(page):
                raise EmulationError(f"a tile instruction wants unmapped memory at {address:#x}")
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def _handle_exception(self, cpu: Any) -> None:
        """Execute a tile instruction and have the CPU continue after it; raises EmulationError for anything else."""
        vector = self._vectors[0]
        self._vectors.clear()
        frame = cpu.rsp + (8 if vector in _PUSHES_ERROR_CODE else 0)
        rip, stack = (ctypes.c_uint64.from_address(frame + offset).value for offset in (0, 24))
        code = ctypes.string_at(rip, 15) if self._has(rip & -_PAGE) else b""
        if vector == _ILLEGAL and self._tiles and code:
            try:
                length = self._tiles.execute(code, rip, lambda n: stack if n == 4 else getattr(cpu, _REGISTERS[n]))
            except TileFault as fault:
                raise EmulationError(f"{fault} at {_where(rip)}") from None
            if length:
                _write(frame, rip + length)
                return
        name = _EXCEPTIONS.get(vector, f"exception {vector}")
        raise EmulationError(f"{name} at {_where(rip)}, bytes {code[:12].hex() or 'unmapped'}")

    def _system_call(self, state: Any) -> Any:
        """Pass on what malloc and pthread_once need."""
        number = state.rax
        if number not in _SYSTEM_CALLS:
            raise EmulationError(f"system call {number} at {_where(state.rcx)}")
        values = (state.rdi, state.rsi, state.rdx, state.r10, state.r8, state.r9)
        result = self._libc.syscall(ctypes.c_long(number), *(ctypes.c_long(ctypes.c_int64(v).value) for v in values))
        state.rax = (-ctypes.get_errno() if result == -1 else result) & (1 << 64) - 1
        state.rip, state.rflags = state.rcx, state.r11
        self._page_tables()
        return state


def _load_bochs() -> Any:
    try:
        import bochscpu
    except ImportError as error:
        if "__isoc23" not in str(error):
            raise
        with tempfile.TemporaryDirectory() as directory:
            source, library = Path(directory, "names.c"), Path(directory, "names.so")
            source.write_text(_COMPATIBILITY)
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        import bochscpu
    return bochscpu


def _parked_thread(libc: ctypes.CDLL) -> int:
    """The FS base of a thread that waits for ever: guest code uses its thread-local storage and its malloc arena."""
    base, ready = ctypes.c_uint64(), threading.Event()

    def wait() -> None:
        libc.syscall(ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(_ARCH_GET_FS), ctypes.byref(base))
        libc.malloc(64)
        ready.set()
        threading.Event().wait()

    threading.Thread(target=wait, daemon=True).start()
    ready.wait()
    return base.value


_allocated: list[mmap.mmap] = []


def _pages(count: int) -> int:
    """The address of `count` new pages, kept for ever."""
    _allocated.append(mmap.mmap(-1, count * _PAGE))
    return ctypes.addressof(ctypes.c_char.from_buffer(_allocated[-1]))


def _write(address: int, value: int) -> None:
    ctypes.c_uint64.from_address(address).value = value


def _memory_regions() -> list[tuple[int, int]]:
    """Address ranges of this process that can be read."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        if permissions[0] == "r":
            start, end = (int(address, 16) for address in span.split("-"))
            regions.append((start, end))
    return regions


def _where(address: int) -> str:
    """`address` as file+offset."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, *_, name = line.split(maxsplit=5)
        start, end = (int(limit, 16) for limit in span.split("-"))
        if start <= address < end:
            return f"{Path(name).name}+{address - start + int(offset, 16):#x}"
    return f"{address:#x}"
