"""Work that may end its process: done in a forked child, so that the caller gets an error instead."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable

_LONGEST = 1800.0  # seconds; a child that inherits a lock which nobody will release must not be waited for for ever
_FATAL = "LLVM ERROR: "


def run_in_child(job: Callable[[], object]) -> str | None:
    """Run `job`, which should only write files, in a forked child; returns None, or in one line why it failed.

    LLVM answers a failed write by ending the process (report_fatal_error), and no caller can catch that.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads run; the job takes no lock of theirs
        child = os.fork()
    if child == 0:
        _work(job, writer)
    os.close(writer)
    try:
        said = _read(reader)
        if said is None:
            return f"it took longer than {_LONGEST:.0f} s"
        _, status = os.waitpid(child, 0)
        child = 0
    finally:
        os.close(reader)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return None if status == 0 else _reason(said, os.waitstatus_to_exitcode(status))


def _work(job: Callable[[], object], errors: int) -> None:
    """The child: runs `job`, writes what goes wrong to `errors`, and ends without its parent's exit handlers."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to both; the parent tells the user
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        os.dup2(errors, 2)
        job()
        status = 0
    except BaseException as error:
        os.write(errors, f"{error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(status)


def _read(reader: int) -> str | None:
    """All that is written to the pipe `reader`, whose end is the child's; None if that does not come in time."""
    parts: list[bytes] = []
    end = time.monotonic() + _LONGEST
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        if not (part := os.read(reader, 1 << 16)):
            return b"".join(parts).decode("utf-8", "replace")
        parts.append(part)
    return None


def _reason(said: str, code: int) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    fatal = [line.removeprefix(_FATAL) for line in lines if line.startswith(_FATAL)]
    if fatal or lines:
        return (fatal or lines)[0]
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
