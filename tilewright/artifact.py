"""Reads an artifact, checking every file; no code of it runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tilewright.errors import InvalidArtifact
from tilewright.manifest import MANIFEST, WEIGHTS, Manifest
from tilewright.weights import map_weights


def open_artifact(directory: Path) -> tuple[Manifest, dict[str, NDArray[Any]]]:
    """Check the files of the artifact at `directory`; its manifest and its tensors, mapped. Raises InvalidArtifact."""
    manifest = read_manifest(directory)
    _check_files(directory, manifest)
    weights = map_weights(directory / WEIGHTS)
    for level in manifest.levels:
        for tensor in level.parameters.values():
            if tensor not in weights:
                raise InvalidArtifact(f"{directory / WEIGHTS} lacks the tensor {tensor}; compile the model again")
    return manifest, weights


def read_manifest(directory: Path) -> Manifest:
    """Read an artifact's manifest alone; raises InvalidArtifact."""
    try:
        return Manifest.from_json((directory / MANIFEST).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InvalidArtifact(
            f"{directory} is not an artifact ({MANIFEST}: {reason}); expected what `tilewright compile` writes"
        ) from None


def _check_files(directory: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        try:
            found = sha256(directory / name)
        except OSError as error:
            raise InvalidArtifact(f"{directory / name} cannot be read ({error.strerror}); copy the artifact again") from None
        if found != expected:
            raise InvalidArtifact(
                f"{directory / name} was altered: its sha256 is {found[:12]}..., the manifest says {expected[:12]}...; "
                "copy or compile it again"
            )


def sha256(path: Path) -> str:
    """Hex sha256 of the file at `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
