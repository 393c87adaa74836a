"""Reads an artifact, checking every file; no code of it runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from tilewright.errors import InvalidArtifact
from tilewright.files import open_regular, read_text
from tilewright.manifest import MANIFEST, WEIGHTS, Manifest, Parameter, Role
from tilewright.weights import map_weights

T = TypeVar("T")
_ATTEMPTS = 50
"""How often reading starts again because the artifact was replaced meanwhile."""


def open_artifact(directory: Path) -> tuple[Manifest, dict[str, NDArray[Any]]]:
    """Check the files of the artifact at `directory`; its manifest and its tensors, mapped. Raises InvalidArtifact."""
    manifest = read_manifest(directory)
    _check_files(directory, manifest)
    weights = map_weights(directory / WEIGHTS)
    for level in manifest.levels:
        for name, parameter in level.parameters.items():
            if (array := weights.get(parameter.tensor)) is None:
                raise InvalidArtifact(f"{directory / WEIGHTS} lacks the tensor {parameter.tensor}; compile the model again")
            found, expected = (str(array.dtype), array.shape), (parameter.dtype, parameter.shape)
            if found != expected:
                raise InvalidArtifact(
                    f"{directory / WEIGHTS}: {parameter.tensor} is {found[0]}{list(found[1])}, but {name} of {level.name} is "
                    f"{expected[0]}{list(expected[1])}; compile the model again"
                )
    return manifest, weights


def describe_parameter(tensor: str, array: NDArray[Any], role: Role) -> Parameter:
    """What the compiler writes down of a parameter; the addresses it packed are the bounds of those a kernel is safe with."""
    if role != "addresses":
        return Parameter(tensor, str(array.dtype), array.shape, role)
    flat = array.reshape(-1)
    ascending = bool((flat[1:] >= flat[:-1]).all())
    return Parameter(tensor, str(array.dtype), array.shape, role, int(flat.min()), int(flat.max()), ascending)


def consistently(directory: Path, read: Callable[[], T]) -> T:
    """What `read` makes of the files of the artifact at `directory`, all of one artifact while others replace it."""
    for _ in range(_ATTEMPTS):
        try:
            descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError):
            return read()  # which says what is wrong with it
        try:
            failure: InvalidArtifact | None = None
            try:
                result = read()
            except InvalidArtifact as error:
                failure = error
            # an open directory's number is not given to another, so equal numbers are the same directory
            if _is_still(descriptor, directory):
                if failure is not None:
                    raise failure
                return result
        finally:
            os.close(descriptor)
    raise InvalidArtifact(f"{directory} was replaced {_ATTEMPTS} times while it was read; try again")


def _is_still(descriptor: int, directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(directory))
    except OSError:
        return False


def read_manifest(directory: Path) -> Manifest:
    """Read an artifact's manifest alone; raises InvalidArtifact."""
    try:
        return Manifest.from_json(read_text(directory / MANIFEST))
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
    """Hex sha256 of the regular file at `path`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
