"""`tilewright compile`: a quantised checkpoint to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tilewright.commands.output import Json, SelfCheck, print_json, stages, stdout


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
        Path | None, typer.Option("--output", "-o", help="Artifact directory to write.", show_default="NAME.tw")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Tokens one run may hold; larger batches are split.")] = 4096,
    self_check: SelfCheck = True,
    sparse: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(help="Skip zero blocks where the CPU's rates say that it pays, wherever a kernel can, or nowhere."),
    ] = "auto",
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
    target_path = output or Path(f"{model.resolve().stem if model.is_file() else model.resolve().name}.tw")
    with stages(seconds) as progress:
        artifact = compile_model(
            model,
            target,
            target_path,
            max_tokens=max_tokens,
            sparse=sparse,
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
    result = report(artifact.path) | {"seconds": seconds, "tuning": counts}
    if as_json:
        print_json(result)
        return
    print_kernels(result)
    if len(artifact.manifest.levels) > 1:
        print_levels(result)
    for name, one in replays:
        stdout().print(f"{name}: {one.summary}", markup=False, soft_wrap=True)
    levels = ", ".join(level.name for level in artifact.manifest.levels)
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    stdout().print(f"{artifact.path}: {levels}, {size(result)} ({times})", markup=False, soft_wrap=True)
