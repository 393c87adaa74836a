"""Reading files that others wrote: regular files only, and JSON that may be hostile.

Opening a FIFO would wait for its writer for ever, and a device may have no end; both are refused before a byte is read.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any


def open_regular(path: Path) -> io.BufferedReader:
    """Open the regular file at `path` for reading; raises OSError, also for a name or a kind of file that cannot be one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL in the name
        raise OSError(errno.EINVAL, "the name holds a NUL") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: Path) -> str:
    """The UTF-8 text of the regular file at `path`; raises OSError, and ValueError where it is not text."""
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises ValueError, also for nesting that Python's parser cannot follow, NaN and infinity."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
