"""provenance.json of a checkpoint: the steps that made it, each with its settings and the hashes of what it read and wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tilewright.artifact import sha256
from tilewright.frontend.config import read_json

PROVENANCE = "provenance.json"
_VERSIONS = ("tilewright", "torch", "tokenizers", "numpy")


def append_step(
    name: str, settings: Mapping[str, Any], source: Path | None, output: Path, given: Mapping[str, Any] | None = None
) -> None:
    """Write provenance.json into the directory `output`: what `source` has, if anything, with step `name` after its steps.

    `given` replaces the hashes of the files of `source`, for a model that is in memory only.
    """
    before: dict[str, Any] = {}
    if source is not None and (source / PROVENANCE).is_file():
        before = read_json(source / PROVENANCE, dict)
    step = {
        "step": name,
        "settings": dict(settings),
        "input_sha256": dict(given) if source is None and given is not None else file_hashes(source or output),
        "output_sha256": file_hashes(output),
        "versions": {package: version(package) for package in _VERSIONS},
    }
    write_provenance(output, before | {"steps": [*before.get("steps", []), step]})


def extend(output: Path, recipe: Mapping[str, Any], **more: Any) -> None:
    """Add the `recipe` to provenance.json in `output`, and `more` (metrics, seed) to its last step."""
    found = read_json(output / PROVENANCE, dict)
    last = found["steps"][-1] | more
    write_provenance(output, found | {"recipe": dict(recipe), "steps": [*found["steps"][:-1], last]})


def write_provenance(output: Path, value: Mapping[str, Any]) -> None:
    """Write provenance.json into the directory `output`."""
    (output / PROVENANCE).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def file_hashes(path: Path) -> dict[str, str]:
    """sha256 of the file at `path`, or of the model's files in the directory, by name."""
    return {file.name: sha256(file) for file in _model_files(path)}


def _model_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for pattern in ("config.json", "tokenizer.json", "*.safetensors", "*.onnx"):
        yield from sorted(path.glob(pattern))
