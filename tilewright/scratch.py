"""Working directories that outlive no run: removed at the end, and by a later run where the process that made one was killed.

A directory is locked (flock) while its owner lives; the kernel drops the lock with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A new directory `parent/PREFIX...`, private to this user and gone after the block; raises OSError.

    Removes the directories of that prefix first which nobody owns any more.
    """
    _sweep(parent, prefix)
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(path)
        if lock is not None:
            break  # else another run took it for an abandoned one, in the moment before it was locked
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep(parent: Path, prefix: str) -> None:
    try:
        found = [Path(entry.path) for entry in os.scandir(parent) if _is_ours(entry, prefix)]
    except OSError:
        return  # making a directory will say why
    for path in found:
        if (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _is_ours(entry: os.DirEntry[str], prefix: str) -> bool:
    with suppress(OSError):
        return (
            entry.name.startswith(prefix)
            and entry.is_dir(follow_symlinks=False)
            and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
        )
    return False


def _lock(path: Path) -> int | None:
    """A descriptor that locks the directory `path`; None if another process does, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
