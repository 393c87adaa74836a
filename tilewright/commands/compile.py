"""`tilewright compile`: a quantised checkpoint to an artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tilewright.commands.output import Json, SelfCheck, print_json, stages, stdout
from tilewright.errors import InvalidInput

if TYPE_CHECKING:
    from tilewright.codegen.library import Library

Emit = Literal["artifact", "c-library", "static"]


def compile(
    model: Annotated[Path, typer.Argument(help="Quantised Hugging Face directory or QDQ ONNX file.")],
    target: Annotated[
        str,
        typer.Option(
            help="native, an ISA level, an LLVM CPU, an instance type or a CPU model name; several with commas; or server, "
            "the levels of server CPUs."
        ),
    ] = "native",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write.", show_default="NAME.tw, a library's NAME")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Tokens one run may hold; larger batches are split.")] = 4096,
    self_check: SelfCheck = True,
    sparse: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(help="Skip zero blocks where the CPU's rates say that it pays, wherever a kernel can, or nowhere."),
    ] = "auto",
    emit: Annotated[
        Emit,
        typer.Option(
            help="An artifact directory; a shared library for C programs, libNAME.so with NAME.h and its weights; or an "
            "archive, libNAME.a. CC names the C compiler that links a library, such as one for musl."
        ),
    ] = "artifact",
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a library, and the prefix of its functions.", show_default="that of the output"),
    ] = None,
    embed_weights: Annotated[bool, typer.Option("--embed-weights", help="Put the weights into the library.")] = False,
    debug_dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the module after each pass to DIR, for each level.")
    ] = None,
    tuning_records: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Tuning log, or directory of them.", show_default="that of the target's CPU"),
    ] = None,
    tuned_for: Annotated[
        str | None, typer.Option(metavar="CPU", help="CPU whose records to take where the target is a level or server.")
    ] = None,
    tuned_threads: Annotated[int, typer.Option(min=1, help="Take the records of kernels on so many threads.")] = 1,
    as_json: Json = False,
) -> None:
    """Compile a quantised model for a CPU."""
    from tilewright.commands.artifact import print_kernels, print_levels, report, size
    from tilewright.compiler import compile as compile_model

    seconds: dict[str, float] = {}
    own = model.resolve().stem if model.is_file() else model.resolve().name
    library = _library(emit, name, re.sub(r"\W", "_", output.stem if output else own), embed_weights)
    target_path = output or Path(library.name if library else f"{own}.tw")
    with stages(seconds) as progress:
        artifact = compile_model(
            model,
            target,
            target_path,
            max_tokens=max_tokens,
            sparse=sparse,
            library=library,
            self_check=self_check,
            debug_dump=debug_dump,
            tuning_records=tuning_records,
            tuned_for=tuned_for,
            tuned_threads=tuned_threads,
            progress=progress,
        )
    replays = artifact.replays.items()
    counts = {
        level: {"tuned": len(one.applied), "default": one.kernels - len(one.applied), "stale": dict(one.stale)}
        for level, one in replays
    }
    written = report(artifact.path) if library is None else _report(artifact.path, library)
    result = written | {"seconds": seconds, "tuning": counts}
    if as_json:
        print_json(result)
        return
    if library is None:
        print_kernels(result)
        if len(artifact.manifest.levels) > 1:
            print_levels(result)
    for name, one in replays:
        stdout().print(f"{name}: {one.summary}", markup=False, soft_wrap=True)
    levels = ", ".join(level.name for level in artifact.manifest.levels)
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    stdout().print(f"{artifact.path}: {levels}, {size(result)} ({times})", markup=False, soft_wrap=True)


def _library(emit: Emit, name: str | None, default: str, embed_weights: bool) -> Library | None:
    """The library to write, None for an artifact; `default` is its name where none was asked for."""
    if emit == "artifact":
        if name is not None or embed_weights:
            raise InvalidInput("--name and --embed-weights are for libraries; add --emit c-library or --emit static")
        return None
    from tilewright.codegen.library import Library

    return Library(emit, default if name is None else name, embed_weights)


def _report(directory: Path, library: Library) -> dict[str, Any]:
    """What was written, as plain data."""
    files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    return {"library": str(directory), "name": library.name, "kind": library.kind, "bytes": files}
