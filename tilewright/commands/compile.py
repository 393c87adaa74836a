"""`tilewright compile`: a quantised checkpoint to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.commands.output import Json, block_name, print_json, print_note, stages, stdout, table

if TYPE_CHECKING:
    from tilewright.compiler import Artifact


def compile(
    model: Annotated[Path, typer.Argument(help="Quantised Hugging Face directory or QDQ ONNX file.")],
    target: Annotated[
        str, typer.Option(help="native, an ISA level, an LLVM CPU, an instance type or a CPU model name.")
    ] = "native",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Artifact directory to write.", show_default="NAME.tw")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Tokens one run may hold; larger batches are split.")] = 4096,
    as_json: Json = False,
) -> None:
    """Compile a quantised model for a CPU."""
    from tilewright.compiler import compile as compile_model

    seconds: dict[str, float] = {}
    target_path = output or Path(f"{model.resolve().stem if model.is_file() else model.resolve().name}.tw")
    with stages(seconds) as progress:
        artifact = compile_model(model, target, target_path, max_tokens=max_tokens, progress=progress)
    result = _as_json(artifact, seconds)
    if as_json:
        print_json(result)
    else:
        _print(artifact, result)


def _as_json(artifact: Artifact, seconds: dict[str, float]) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "artifact": str(artifact.path),
        "isa": manifest.isa.name,
        "features": list(manifest.isa.features),
        "inputs": list(manifest.inputs),
        "outputs": [{"name": output.name, "per": output.per, "width": output.width} for output in manifest.outputs],
        "max_positions": manifest.limits.max_positions,
        "max_tokens": manifest.limits.max_tokens,
        "bytes": {file.name: file.stat().st_size for file in sorted(artifact.path.iterdir())},
        "seconds": seconds,
        "kernels": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "block": layer.block and list(layer.block),
                "density": layer.density,
                "kernel": layer.kernel,
                "schedule": layer.schedule,
                "record": layer.record,
                "note": layer.note,
            }
            for layer in manifest.layers
        ],
        "notes": manifest.provenance["steps"][-1]["notes"],
    }


def _print(artifact: Artifact, result: dict[str, Any]) -> None:
    console = stdout()
    alike: dict[tuple[str, ...], list[str]] = {}
    for layer in artifact.manifest.layers:
        index, _, name = layer.name.removeprefix("layer").partition(".")
        row = (name, block_name(layer.block), "x".join(map(str, layer.shape)), f"{layer.density:.1%}")
        alike.setdefault(row, []).append(index)
    grid = table("kernel", "stored as", "shape", "stored", "layers", left=2)
    for cells, indices in alike.items():
        grid.add_row(*cells, ", ".join(indices))
    console.print(grid)
    for text in (*dict.fromkeys(layer.note for layer in artifact.manifest.layers if layer.note), *result["notes"]):
        print_note(text)
    size = sum(result["bytes"].values()) / 1e6
    times = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    console.print(f"{artifact.path}: {result['isa']}, {size:.1f} MB ({times})", markup=False)
