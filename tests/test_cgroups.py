"""CPU quotas of control groups, in the layouts that machines and containers have."""

import os
from pathlib import Path

import pytest

import tilewright.cpu
from tilewright.cgroups import cpu_quota
from tilewright.cpu import available_cores

SYSTEMD = "sys/fs/cgroup/system.slice"
LAYOUTS = [
    ({"proc/self/cgroup": "0::/system.slice/a.service", f"{SYSTEMD}/a.service/cpu.max": "150000 100000"}, 1.5),
    ({"proc/self/cgroup": "0::/system.slice/a.service", f"{SYSTEMD}/a.service/cpu.max": "max 100000"}, None),
    (
        {
            "proc/self/cgroup": "0::/system.slice/a.service",
            f"{SYSTEMD}/a.service/cpu.max": "400000 100000",
            f"{SYSTEMD}/cpu.max": "300000 100000",
        },
        3.0,
    ),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),  # a container with a namespace of its own
    # a container of version 1: its path is the host's, its mount begins at itself
    (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        2.0,
    ),
    (
        {
            "proc/self/cgroup": "1:cpu:/\n0::/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "garbage"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("files", "cores"), LAYOUTS)
def test_quota(files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (2.5, 2), (0.1, 1), (64.0, 8)])
def test_cores_are_those_that_the_quota_keeps_busy(quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(tilewright.cpu, "cpu_quota", lambda: quota)
    assert available_cores() == cores
