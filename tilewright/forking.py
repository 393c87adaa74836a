"""Locks that no fork catches held, for processes that load an engine, fork, and go on in the children (gunicorn --preload).

Threads do not survive a fork, but the locks they hold do, in TVM's allocator too: a child would wait for ever for what a thread
of its parent was doing. So a fork waits until nobody holds a `Gate`, which are held for one call at most.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # see the end
import os
import threading
import weakref
from types import TracebackType


class Gate:
    """A lock to be held around anything that a forked child could not go on with; nobody enters a second one meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _gates.add(self)

    def __enter__(self) -> None:
        with _forking:  # else threads that call without a pause would never let a fork in
            pass
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()


_gates: weakref.WeakSet[Gate] = weakref.WeakSet()
_forking = threading.RLock()  # one fork at a time, so that two cannot wait for each other's gates
_held: list[Gate] = []


def _before() -> None:
    _forking.acquire()
    for gate in list(_gates):
        gate._lock.acquire()
        _held.append(gate)


def _after() -> None:
    """In parent and child alike: the thread that forked is the one that goes on in the child, and holds all gates there."""
    while _held:
        _held.pop()._lock.release()
    _forking.release()


# What is registered last is called first. The module imported above locks its executors before a fork; it is registered by now,
# so that whoever holds a gate can still hand its work to one.
os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
