"""Writing the directories of checkpoints: whole or not at all, with one line for a disk that takes no more."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tilewright.errors import InvalidInput
from tilewright.scratch import scratch

_TORCH = "PytorchStreamWriter"  # which alone tells a failed torch.save from other RuntimeErrors


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """Directory beside `target` that is renamed to it on success and removed on any failure; raises InvalidInput.

    What a killed run left of it is removed first.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(), scratch(target.parent, f".{target.name}.writing-") as place:
            path = place / "new"
            path.mkdir()  # with the user's umask, which the scratch directory does not follow
            yield path
            path.rename(target)
    except OSError as error:
        raise InvalidInput(f"output {target} cannot be written: {error.strerror}; choose another place") from None


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise the OSError that safetensors and torch turn into errors of their own when a file cannot be written."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None
    except RuntimeError as error:
        if _TORCH not in str(error):
            raise
        raise OSError(errno.EIO, "a checkpoint could not be written whole; the disk may be full") from None
