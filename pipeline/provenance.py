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
    """Write provenance.json into the directory `output`: the steps of `source`, if it has any, and step `name` after them.

    `given` replaces the hashes of the files of `source`, for a model that is in memory only.
    """
    before: list[Any] = []
    if source is not None and (source / PROVENANCE).is_file():
        before = read_json(source / PROVENANCE, dict).get("steps", [])
    step = {
        "step": name,
        "settings": dict(settings),
        "input_sha256": dict(given) if source is None and given is not None else file_hashes(source or output),
        "output_sha256": file_hashes(output),
        "versions": {package: version(package) for package in _VERSIONS},
    }
    (output / PROVENANCE).write_text(json.dumps({"steps": [*before, step]}, indent=2) + "\n", encoding="utf-8")


def file_hashes(path: Path) -> dict[str, str]:
    """sha256 of the file at `path`, or of the model's files in the directory, by name."""
    return {file.name: sha256(file) for file in _model_files(path)}


def _model_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for pattern in ("config.json", "tokenizer.json", "*.safetensors", "*.onnx"):
        yield from sorted(path.glob(pattern))
