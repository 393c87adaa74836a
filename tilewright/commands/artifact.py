"""What an artifact holds, as `compile` and `inspect` report it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from tilewright.artifact import consistently, open_artifact
from tilewright.commands.output import block_name, print_note, stdout, table
from tilewright.cpu import cpu_features
from tilewright.manifest import LayerRecord, LevelRecord


def report(path: Path) -> dict[str, Any]:
    """The artifact at `path` as plain data; raises InvalidArtifact.

    missing: features that this CPU lacks for a level. shared: bytes of the tensors that other levels use too, which are
    stored once; `shared_weights` is their sum.
    """
    return consistently(path, lambda: _report(path))


def _report(path: Path) -> dict[str, Any]:
    manifest, weights = open_artifact(path)
    available = cpu_features()
    users = Counter(tensor for level in manifest.levels for tensor in _tensors(level))

    def nbytes(tensors: set[str], users_at_least: int = 1) -> int:
        return sum(weights[tensor].nbytes for tensor in tensors if users[tensor] >= users_at_least)

    def level_json(level: LevelRecord) -> dict[str, Any]:
        tensors = _tensors(level)
        return {
            "name": level.name,
            "features": list(level.features),
            "missing": list(level.missing(available)),
            "bytes": {
                "library": (path / level.library).stat().st_size,
                "weights": nbytes(tensors),
                "shared": nbytes(tensors, 2),
            },
            "kernels": [_kernel_json(layer, level) for layer in level.layers],
            "tuning": {name: [dataclasses.asdict(record) for record in records] for name, records in level.tuning.items()},
        }

    steps = manifest.provenance.get("steps") or [{}]
    return {
        "artifact": str(path),
        "architecture": manifest.architecture,
        "inputs": list(manifest.inputs),
        "outputs": [{"name": output.name, "per": output.per, "width": output.width} for output in manifest.outputs],
        "head": dataclasses.asdict(manifest.head),
        "labels": list(manifest.labels),
        "max_positions": manifest.limits.max_positions,
        "max_tokens": manifest.limits.max_tokens,
        "bytes": {file.name: file.stat().st_size for file in sorted(path.iterdir())},
        "shared_weights": nbytes(set(users), 2),
        "levels": [level_json(level) for level in manifest.levels],
        "notes": steps[-1].get("notes", []),
    }


def _tensors(level: LevelRecord) -> set[str]:
    return {parameter.tensor for parameter in level.parameters.values()}


def _kernel_json(layer: LayerRecord, level: LevelRecord) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "block": layer.block and list(layer.block),
        "density": layer.density,
        "kernel": layer.kernel,
        "schedule": layer.schedule,
        "records": [dataclasses.asdict(record) for record in level.tuning.get(layer.name, ())],
        "note": layer.note,
    }


def print_kernels(result: dict[str, Any]) -> None:
    """The linear kernels of a `report`, a row for all layers and levels that are alike, and the remarks."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for level in result["levels"]:
        alike: dict[tuple[str, ...], list[str]] = {}
        for kernel in level["kernels"]:
            index, _, name = kernel["name"].removeprefix("layer").partition(".")
            shape = "x".join(map(str, kernel["shape"]))
            cells = name, block_name(kernel["block"]), shape, f"{kernel['density']:.1%}", _tuned(kernel["records"])
            alike.setdefault(cells, []).append(index)
        for same, indices in alike.items():
            rows.setdefault((*same, ", ".join(indices)), []).append(level["name"])
    grid = table("kernel", "stored as", "shape", "stored", "tuned", "layers", "levels", left=2)
    for row, levels in rows.items():
        grid.add_row(*row, ", ".join(levels))
    stdout().print(grid)
    reasons = (kernel["note"] for level in result["levels"] for kernel in level["kernels"] if kernel["note"])
    for text in dict.fromkeys((*reasons, *result["notes"])):
        print_note(text)


def _tuned(records: list[dict[str, Any]]) -> str:
    """Gain over the default and share of the peak, for each bucket of tokens that has a record."""
    return ", ".join(f"{one['gain']:.2f}x at {one['tokens']} ({one['peak']:.0%} of peak)" for one in records) or "default"


def print_levels(result: dict[str, Any]) -> None:
    """The levels of a `report`: whether this CPU runs them, and their megabytes."""
    grid = table("ISA level", "this CPU", "library MB", "weights MB", "shared MB", left=2)
    for level in result["levels"]:
        megabytes = (f"{level['bytes'][part] / 1e6:.1f}" for part in ("library", "weights", "shared"))
        grid.add_row(level["name"], f"lacks {', '.join(level['missing'])}" if level["missing"] else "supported", *megabytes)
    stdout().print(grid)


def size(result: dict[str, Any]) -> str:
    """Megabytes of all files of a `report`."""
    return f"{sum(result['bytes'].values()) / 1e6:.1f} MB"
