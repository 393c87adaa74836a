"""The provenance of an artifact or a checkpoint: its chain of steps, and whether the files of a run still are those of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tilewright.artifact import open_artifact, read_manifest, sha256
from tilewright.errors import InvalidInput
from tilewright.frontend.config import read_json
from tilewright.manifest import MANIFEST
from tilewright.pipeline.provenance import PROVENANCE


@dataclass(frozen=True)
class Check:
    """One thing that was verified, and what is wrong with it, if anything."""

    what: str
    wrong: str | None = None


def read_chain(path: Path) -> dict[str, Any]:
    """What an artifact's manifest, or a checkpoint's provenance.json, says of how it was made; raises InvalidInput."""
    if (path / MANIFEST).is_file():
        return read_manifest(path).provenance
    if (path / PROVENANCE).is_file():
        return dict(read_json(path / PROVENANCE, dict))
    raise InvalidInput(f"{path} holds neither {MANIFEST} nor {PROVENANCE}; give an artifact, or a checkpoint that a step wrote")


def verify(path: Path, run: Path) -> list[Check]:
    """Check the chain of `path` itself, and the output of each of its steps against the files that lie below `run`."""
    steps = read_chain(path).get("steps", [])
    if not run.is_dir():
        raise InvalidInput(f"{run} is no directory; give the one that compress wrote")
    if (path / MANIFEST).is_file():
        open_artifact(path)  # raises where a file was altered
    held = {sha256(file) for file in _files(run)}
    checks = []
    for before, after in pairwise(steps):
        given, made = after.get("input_sha256", {}), before.get("output_sha256", {})
        other = [name for name in made if name in given and given[name] != made[name]]
        wrong = f"{other[0]} is another than {before['step']} wrote" if other else None
        checks.append(Check(f"{after['step']} read what {before['step']} wrote", wrong))
    for number, step in enumerate(steps):
        made = step.get("output_sha256", {})  # an artifact's own are in its manifest
        missing = [name for name, digest in made.items() if digest not in held]
        if made:
            wrong = f"no file below {run} is its {missing[0]} ({made[missing[0]][:12]}...)" if missing else None
            checks.append(Check(f"step {number}, {step['step']}: {len(made)} files", wrong))
    return checks


def summary(step: Mapping[str, Any]) -> list[str]:
    """Lines that tell a step: settings, metrics, hashes, versions."""
    lines = [", ".join(f"{key} {value}" for key, value in step.get("settings", {}).items())]
    if step.get("metrics"):
        lines.append("metrics: " + ", ".join(f"{name} {value:.4g}" for name, value in step["metrics"].items()))
    for name in ("input_sha256", "output_sha256"):
        if step.get(name):
            found = ", ".join(f"{file} {digest[:12]}" for file, digest in step[name].items())
            lines.append(f"{name.removesuffix('_sha256')}: {found}")
    lines.append(", ".join(f"{name} {version}" for name, version in step.get("versions", {}).items()))
    return [line for line in lines if line]


def _files(run: Path) -> Iterator[Path]:
    suffixes = {".json", ".safetensors", ".onnx"}
    return (file for file in sorted(run.rglob("*")) if file.suffix in suffixes and file.is_file())
