"""Writes an artifact: the directory `NAME.tw/` that `tilewright.load` runs, complete or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tilewright.artifact import sha256
from tilewright.codegen.replace import check_directory, replacing
from tilewright.codegen.wordpiece import wordpiece_table
from tilewright.manifest import MANIFEST, TOKENIZER, WEIGHTS, WORDPIECE, Manifest
from tilewright.weights import write_weights


def write_artifact(
    path: str | Path,
    *,
    libraries: Mapping[str, Path],
    weights: Mapping[str, NDArray[Any]],
    manifest: Manifest,
    tokenizer: str | None = None,
    overwrite: bool = True,
) -> Manifest:
    """Write the shared object that `libraries` names for each level, the tensors `weights`, the manifest and tokenizer.json.

    A tokenizer that C code can repeat is also written as the table which that reads. Fills in the manifest's `files` and
    returns it. The directory appears at `path` whole, replacing an artifact there if `overwrite`; on any failure or interrupt
    nothing is left behind and what was there stays.
    Raises InvalidInput for an output that cannot be written or must not be replaced.
    """
    with replacing(check_output(path, overwrite=overwrite)) as directory:
        for level in manifest.levels:
            shutil.copyfile(libraries[level.name], directory / level.library)
        write_weights(directory / WEIGHTS, weights)
        if tokenizer is not None:
            (directory / TOKENIZER).write_text(tokenizer, "utf-8")
            if (table := wordpiece_table(tokenizer)) is not None:
                (directory / WORDPIECE).write_bytes(table)
        files = {file.name: sha256(file) for file in sorted(directory.iterdir())}
        complete = dataclasses.replace(manifest, files=files)
        text = complete.to_json()
        Manifest.from_json(text)  # an artifact that cannot be read back is a bug to find now
        (directory / MANIFEST).write_text(text, "utf-8")
    return complete


def check_output(path: str | Path, *, overwrite: bool = True) -> Path:
    """Return `path` if an artifact can be written there, so that a compile can refuse early; raises InvalidInput."""
    return check_directory(path, overwrite=overwrite, kind="an artifact", is_one=lambda target: (target / MANIFEST).is_file())
