"""Directories that appear whole or not at all, and take the place of earlier ones in one step."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tilewright.errors import InvalidInput
from tilewright.scratch import scratch

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # fcntl.h, linux/fs.h
_ATTEMPTS = 100
"""How often writers of one path may get in each other's way before one of them gives up."""


def check_directory(path: str | Path, *, overwrite: bool, kind: str, is_one: Callable[[Path], bool]) -> Path:
    """Return `path` if a directory can be written there; raises InvalidInput.

    What is there already must be a directory of which `is_one` holds, what users call `kind`, and be free to `overwrite`.
    """
    if "\0" in os.fspath(path):
        raise InvalidInput(f"cannot write {os.fspath(path)!r}: the name holds a NUL; choose another output")
    target = Path(os.path.abspath(path))
    if not target.parent.is_dir():
        raise InvalidInput(f"cannot write {path}: {target.parent} is not a directory; create it or choose another output")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InvalidInput(f"cannot write {path}: {target.parent} is not writable; choose another output")
    if os.path.lexists(target):
        if target.is_symlink() or not is_one(target):
            raise InvalidInput(f"cannot write {path}: it exists and is not {kind}; choose another output")
        if not overwrite:
            raise InvalidInput(f"cannot write {path}: it exists; allow overwriting or choose another output")
    return target


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
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

    At no moment is there nothing at `target`: whoever opens it finds the old directory or the new one. Only where the file
    system cannot exchange two directories (NFS, for one) is there nothing for a moment. rename: in the place of renameat2.
    """
    for flags in (_NOREPLACE, _EXCHANGE) * _ATTEMPTS:
        failure = (rename or _rename)(new, target, flags)
        if failure == 0:
            return
        # another writer was faster, or its directory was removed meanwhile
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
