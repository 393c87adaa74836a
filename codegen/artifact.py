"""Writes an artifact: the directory `NAME.tw/` that `tilewright.load` runs, complete or not at all."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tilewright.artifact import sha256
from tilewright.codegen.wordpiece import wordpiece_table
from tilewright.errors import InvalidInput
from tilewright.manifest import MANIFEST, TOKENIZER, WEIGHTS, WORDPIECE, Manifest
from tilewright.scratch import scratch
from tilewright.weights import write_weights

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # fcntl.h, linux/fs.h
_ATTEMPTS = 100
"""How often writers of one path may get in each other's way before one of them gives up."""


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
    with _replacing(check_output(path, overwrite=overwrite)) as directory:
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
    if "\0" in os.fspath(path):
        raise InvalidInput(f"cannot write {os.fspath(path)!r}: the name holds a NUL; choose another output")
    target = Path(os.path.abspath(path))
    if not target.parent.is_dir():
        raise InvalidInput(f"cannot write {path}: {target.parent} is not a directory; create it or choose another output")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InvalidInput(f"cannot write {path}: {target.parent} is not writable; choose another output")
    if os.path.lexists(target):
        if not (target / MANIFEST).is_file() or target.is_symlink():
            raise InvalidInput(f"cannot write {path}: it exists and is not an artifact; choose another output")
        if not overwrite:
            raise InvalidInput(f"cannot write {path}: it exists; allow overwriting or choose another output")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place if the block succeeds and is removed if not."""
    try:
        # a dot and a suffix of its own keep what is swept apart from other people's files
        with scratch(target.parent, f".{target.name}.writing-") as place:
            new = place / "new"
            new.mkdir()  # with the user's umask, which the scratch directory does not follow
            yield new
            put(new, target)
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror or error}; choose another output") from error


Rename = Callable[[Path, Path, int], int]
"""Renames a directory with flags of renameat2; returns 0 or an errno."""


def put(new: Path, target: Path, rename: Rename | None = None) -> None:
    """Move the directory `new` to `target` in one step, with what was there, if anything, left in its place.

    At no moment is there nothing at `target`: whoever opens it finds the old artifact or the new one. Only where the file
    system cannot exchange two directories (NFS, for one) is there nothing for a moment. rename: in the place of renameat2.
    """
    for flags in (_NOREPLACE, _EXCHANGE) * _ATTEMPTS:
        failure = (rename or _rename)(new, target, flags)
        if failure == 0:
            return
        # another writer was faster, or its artifact was removed meanwhile
        if failure not in (errno.EEXIST, errno.ENOENT):
            break
    if failure not in (errno.EINVAL, errno.ENOSYS):  # what file systems say that cannot exchange
        raise OSError(failure, os.strerror(failure))
    _put_in_two_steps(new, target)


def _put_in_two_steps(new: Path, target: Path) -> None:
    """As `put`; what was at `target` is put back where the second step fails."""
    for attempt in range(_ATTEMPTS):
        old = new.with_name(f"old{attempt}")
        try:
            with suppress(FileNotFoundError):
                target.rename(old)
            new.rename(target)
            return
        except BaseException as error:
            with suppress(OSError):  # nothing was there, or another writer put its own there meanwhile
                old.rename(target)
            if not isinstance(error, OSError) or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _rename(source: Path, target: Path, flags: int) -> int:
    """renameat2(2) of glibc 2.28, which Python does not have; 0 or an errno."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return errno.ENOSYS
    done = renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags))
    return 0 if done == 0 else ctypes.get_errno()
