"""Inputs and outputs of a run as npz files."""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import InvalidInput

Arrays = Mapping[str, NDArray[np.generic]]


def read_arrays(path: Path, names: Sequence[str]) -> Arrays:
    """The arrays of the npz file at `path`, which may be those of `names` and must include input_ids."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror or 'not an npz file'}); give a file of np.savez") from None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):  # TypeError: a lone npy array
        raise InvalidInput(f"{path} is not an npz file of plain arrays; write it with np.savez") from None
    unknown = [name for name in arrays if name not in names]
    if unknown or "input_ids" not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise InvalidInput(f"{path} holds {found}; the model takes {', '.join(names)}, of which input_ids is needed")
    return arrays


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an npz file whole or not at all."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
