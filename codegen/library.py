"""Links a compiled model and the runtime into a library for C programs: `libNAME.so` or `libNAME.a`, `NAME.h`, and the weights.

The object files of all ISA levels, the runtime's, and the artifact's files become one object, in which everything but the
functions of `NAME.h` is local: libraries of several models link into one program, and load into one process. Needs a C
compiler, which the environment variable CC may name, such as one for musl or for an older glibc, and binutils.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tilewright.codegen.header import api, header
from tilewright.codegen.replace import check_directory, replacing
from tilewright.cpu import available_cores
from tilewright.errors import InvalidInput, TilewrightError
from tilewright.manifest import MANIFEST, WEIGHTS, WORDPIECE

Kind = Literal["c-library", "static"]
SUFFIX: dict[Kind, str] = {"c-library": ".so", "static": ".a"}

_FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread")
_PREFIX, _RAISE = "tw_kernels", "tilewright_raise"

_SUPPORT = """\
/* What kernels call when arguments do not fit, and the variable by which the runtime has it called. */
void (*tilewright_raise)(const char *kind, const char **parts, int count);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int count)
{
    if (tilewright_raise) tilewright_raise(kind, parts, count);
}

#include "library.h"

"""


@dataclass(frozen=True)
class Library:
    """What to link: a shared library or an archive, called `name`; weights in it or in a file beside it."""

    kind: Kind
    name: str
    embed_weights: bool = False

    def __post_init__(self) -> None:
        """Refuse names that are no prefix of C identifiers of their own."""
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", self.name):
            raise InvalidInput(f"the library's name is {self.name!r}; expected a letter, then up to 63 letters, digits and _")
        if re.match(r"tw(_|$)|tilewright", self.name, re.IGNORECASE):
            raise InvalidInput(f"the library's name is {self.name!r}, which begins like the runtime's names; choose another")


def check_library(path: str | Path, *, overwrite: bool = True) -> Path:
    """Return `path` if a library's directory can be written there; raises InvalidInput."""
    return check_directory(path, overwrite=overwrite, kind="a library's directory", is_one=_is_library)


def _is_library(directory: Path) -> bool:
    return any(
        (directory / f"{file.stem.removeprefix('lib')}.h").is_file()
        for suffix in SUFFIX.values()
        for file in directory.glob(f"lib*{suffix}")
    )


def write_library(
    path: str | Path,
    library: Library,
    *,
    artifact: Path,
    objects: Mapping[str, Path],
    workspace: Path,
    overwrite: bool = True,
) -> None:
    """Write `library` of the `artifact`, whose kernels are in the object file that `objects` names for each level.

    The directory appears at `path` whole; on any failure what was there stays. `workspace` is an empty directory for work.
    Raises InvalidInput for an output that cannot be written, and TilewrightError where the tools fail.
    """
    target = check_library(path, overwrite=overwrite)
    sources = runtime_sources()
    text = (sources / "tilewright.h").read_text("utf-8")
    _Linker(library, sources, workspace).link(artifact, objects, api(text))
    with replacing(target) as directory:
        name = library.name
        shutil.copyfile(workspace / f"lib{name}{SUFFIX[library.kind]}", directory / f"lib{name}{SUFFIX[library.kind]}")
        (directory / f"{name}.h").write_text(header(text, name, embedded=library.embed_weights), "utf-8")
        if not library.embed_weights:
            shutil.copyfile(artifact / WEIGHTS, directory / f"{name}.safetensors")


def runtime_sources() -> Path:
    """The directory of the runtime's sources: `runtime` in the repository, `csrc` in an installed package."""
    places = [Path(__file__).resolve().parent.parent / name for name in ("runtime", "csrc")]
    for place in places:
        if (place / "tilewright.h").is_file():
            return place
    raise TilewrightError(f"the runtime's sources are not at {places[-1]}; install tilewright again")


class _Linker:
    def __init__(self, library: Library, sources: Path, workspace: Path) -> None:
        self._library, self._sources, self._workspace = library, sources, workspace
        self._compiler = shlex.split(os.environ.get("CC", "")) or ["gcc"]

    def link(self, artifact: Path, objects: Mapping[str, Path], functions: Sequence[str]) -> None:
        """Make `libNAME.so` or `libNAME.a` in the workspace."""
        library, parts = self._library, []
        symbols: dict[tuple[str, str], str] = {}
        for level, kernels in objects.items():
            names = {name: f"{_PREFIX}_{level}_{name}" for name in self._defined(kernels)}
            symbols |= {(level, name): renamed for name, renamed in names.items()}
            symbols[level, _RAISE] = _RAISE
            parts.append(f"{level}.o")
            self._run(
                "objcopy",
                self._list("names", (f"{a} {b}" for a, b in names.items()), "--redefine-syms"),
                str(kernels),
                parts[-1],
            )
        parts += self._compile(artifact, symbols)
        self._run("ld", "-r", "-z", "noexecstack", "-o", "all.o", *parts)
        exported = {f"tilewright_{function}": f"{library.name}_{function}" for function in functions}
        renamed = self._list("exported", (f"{a} {b}" for a, b in exported.items()), "--redefine-syms")
        kept = self._list("kept", exported.values(), "--keep-global-symbols")
        self._run("objcopy", renamed, "all.o")
        self._run("objcopy", kept, "--strip-debug", "all.o")
        output = f"lib{library.name}{SUFFIX[library.kind]}"
        if library.kind == "static":
            self._run("ar", "rcsD", output, "all.o")
        else:
            self._run(*self._compiler, "-shared", "-pthread", "-Wl,-s", f"-Wl,-soname,{output}", "-o", output, "all.o", "-lm")

    def _compile(self, artifact: Path, symbols: Mapping[tuple[str, str], str]) -> list[str]:
        """The objects of the runtime, of the table of kernels and of the artifact's files."""
        (self._workspace / "symbols.c").write_text(_symbols(symbols))
        (self._workspace / "files.S").write_text(self._files(artifact))
        runtime = sorted(
            file for file in self._sources.glob("*.c") if file.name != "directory.c"
        )  # the library's opens instead
        sources: list[str | Path] = [*runtime, self._sources / "library" / "library.c", "symbols.c", "files.S"]
        include = [f"-I{self._sources}", f"-I{self._sources / 'library'}"]
        objects = [f"{Path(source).stem}.o" for source in sources]
        # one by one, because zig's compiler does not write several objects at once
        commands = [(*self._compiler, *_FLAGS, *include, "-c", str(a), "-o", b) for a, b in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(available_cores()) as pool:
            list(pool.map(lambda command: self._run(*command), commands))
        return objects

    def _files(self, artifact: Path) -> str:
        """Assembly of the files that are part of the library."""
        files = {"manifest": MANIFEST, "weights": WEIGHTS if self._library.embed_weights else None, "wordpiece": WORDPIECE}
        lines = [".section .rodata"]
        for name, file in files.items():
            lines += [f".globl tw_library_{name}, tw_library_{name}_end", ".balign 64", f"tw_library_{name}:"]
            if file is not None and (artifact / file).is_file():
                os.symlink((artifact / file).absolute(), self._workspace / file)
                lines.append(f'.incbin "{file}"')
            lines.append(f"tw_library_{name}_end:")
        return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])

    def _defined(self, file: Path) -> list[str]:
        """The global symbols that the object `file` defines."""
        lines = self._run("nm", "--extern-only", "--defined-only", "--format=posix", str(file)).splitlines()
        return [line.split()[0] for line in lines]

    def _list(self, name: str, lines: Iterable[str], option: str) -> str:
        """An option that takes a file of lines."""
        (self._workspace / name).write_text("".join(f"{line}\n" for line in lines))
        return f"{option}={name}"

    def _run(self, *command: str) -> str:
        """What a tool prints; raises TilewrightError in one line."""
        environment = os.environ | {"TMPDIR": str(self._workspace)}
        failed = f"linking lib{self._library.name} failed"
        try:
            done = subprocess.run(command, cwd=self._workspace, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise TilewrightError(
                f"{failed}: {command[0]} cannot be run ({error.strerror}); install gcc and binutils"
            ) from None
        if done.returncode:
            said = (
                [line for line in done.stderr.splitlines() if "error" in line]
                or done.stderr.splitlines()
                or ["no reason given"]
            )
            raise TilewrightError(
                f"{failed} ({said[0].strip()}); a C compiler (CC) and binutils, and room in TMPDIR are needed"
            )
        return done.stdout


def _symbols(symbols: Mapping[tuple[str, str], str]) -> str:
    """C of the table in which the runtime finds kernels and variables."""
    declared = (f"extern char {symbol}[];\n" for symbol in sorted({*symbols.values()} - {_RAISE}))
    entries = (f'    {{"{level}", "{name}", &{symbol}}},\n' for (level, name), symbol in symbols.items())
    table = ["const tw_library_symbol tw_library_symbols[] = {\n", *entries, "    {0, 0, 0},\n};\n"]
    return "".join([_SUPPORT, *declared, "\n", *table])
