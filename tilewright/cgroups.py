"""The share of the machine's time that Linux gives this process: CPU quotas of control groups, which containers set.

A quota is a number of microseconds in each period that all threads of a group may run. Linux has two interfaces, of which a
machine mounts one or both (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/); a group's parents bound it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process may use, such as 1.5; None if nothing bounds it. `root` holds proc and sys."""
    bounds = [quota for quota in _quotas(root) if quota is not None]
    return min(bounds, default=None)


def _quotas(root: Path) -> Iterator[float | None]:
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            yield from (_version_2(mount / group / "cpu.max") for group in _groups(path))
        elif "cpu" in controllers.split(","):
            for name in ("cpu", controllers):  # mounted by either name
                yield from (_version_1(mount / name / group) for group in _groups(path))


def _groups(path: str) -> Iterator[str]:
    """The group at `path` and its parents. In a container the mounted tree may begin anywhere between them."""
    own = PurePosixPath(path.lstrip("/"))
    yield from map(str, (own, *own.parents))


def _version_2(file: Path) -> float | None:
    match _words(file):
        case [quota, period] if quota != "max":
            return _cores(quota, period)
    return None


def _version_1(group: Path) -> float | None:
    match _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us"):
        case [quota], [period]:
            return _cores(quota, period)
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _cores(quota: str, period: str) -> float | None:
    """A quota that is not positive means none."""
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except ValueError:
        return None
