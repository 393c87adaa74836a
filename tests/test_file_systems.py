"""Artifacts on file systems that are full, or that cannot exchange two directories."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from threading import Thread

import pytest

from tests import tiny
from tilewright.codegen.replace import put
from tilewright.pipeline import quantize

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
MOUNT = 'mount -t tmpfs -o size=4m tmpfs "$1" && shift && exec "$@"'
"""Mounts 4 MB at the first argument, which only this process and its children see, and runs the rest."""

FILLED = """
import os, sys
from pathlib import Path
from tilewright.errors import TilewrightError

disk = Path(sys.argv[1])

def fill(room):
    # leaves `room` bytes, of whole pages
    (disk / "ballast").unlink(missing_ok=True)
    with open(disk / "ballast", "wb", 0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        file.truncate(file.seek(0, 2) - room)

def attempt(room, job):
    before = sorted(str(path) for path in disk.rglob("*"))
    fill(room)
    try:
        job()
        print(room, "written")
    except TilewrightError as error:
        print(room, error)
    (disk / "ballast").unlink()
    assert sorted(str(path) for path in disk.rglob("*")) == before, "something is left"
"""

WRITE = """
import tilewright
from tests import toy

library, path = Path(sys.argv[2]), disk / "toy.tw"
toy.write(path, library)
for room in (0, 4096, 16384, library.stat().st_size + 4096, 1 << 20):
    attempt(room, lambda: toy.write(path, library, shift=toy.SHIFT + 1))
    assert tilewright.load(path, 1)([[1]])["total"][0, 0] == (8 if room < 1 << 20 else 9)
"""

COMPILE = """
import tempfile
import tilewright

tempfile.tempdir = str(disk)
attempt(8192, lambda: tilewright.compile(sys.argv[2], "avx2", sys.argv[3]))
"""

QUANTIZE = """
from tilewright.pipeline import quantize
from tilewright.pipeline.pack import pack

for room in (0, 4096, 32768):
    attempt(room, lambda: quantize(sys.argv[2], ["w1 w2"], disk / "int8"))
attempt(4096, lambda: pack(sys.argv[3], disk / "packed"))
"""


@cache
def mounts() -> bool:
    """Whether this user may mount in a namespace of its own; distributions and containers can forbid it."""
    return subprocess.run([*NAMESPACE, "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False).returncode == 0


def on_a_small_disk(code: str, place: Path, *arguments: object) -> list[str]:
    """The lines that FILLED and `code` print, with 4 MB of disk at `place`."""
    if not mounts():
        pytest.skip("this user may mount nothing; RLIMIT_FSIZE stands for a full disk in test_artifact_safety.py")
    place.mkdir()
    script = [sys.executable, "-c", FILLED + code, str(place), *map(str, arguments)]
    run = subprocess.run([*NAMESPACE, MOUNT, "sh", str(place), *script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in float32, and quantised."""
    root = tmp_path_factory.mktemp("checkpoints")
    source = tiny.save(tiny.build("BertModel"), root / "float")
    return source, quantize(source, tiny.texts(20), root / "int8")


def test_a_full_disk_keeps_the_artifact_that_was_there(tmp_path: Path, toy_library: Path) -> None:
    *full, enough = on_a_small_disk(WRITE, tmp_path / "disk", toy_library)
    assert len(full) == 4
    assert all("cannot write" in line and "No space left on device; choose another output" in line for line in full)
    assert enough.endswith("written")


def test_a_checkpoint_is_written_whole_or_not_at_all(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    lines = on_a_small_disk(QUANTIZE, tmp_path / "disk", *checkpoints)
    assert len(lines) == 4
    assert all("cannot be written" in line and "No space left on device" in line for line in lines), lines


def test_a_full_temporary_directory_is_one_line(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """Where LLVM writes its objects, and ends its process if it cannot."""
    _, checkpoint = checkpoints
    (line,) = on_a_small_disk(COMPILE, tmp_path / "disk", checkpoint, tmp_path / "x.tw")
    assert "No space left on device" in line
    assert not (tmp_path / "x.tw").exists()


def no_exchange(source: Path, target: Path, flags: int) -> int:
    """What renameat2 says on NFS and FAT; the second knows RENAME_NOREPLACE, which is 1."""
    return errno.EINVAL


def directory(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("failure", [errno.EINVAL, errno.ENOSYS])
def test_without_an_exchange_an_artifact_is_replaced_in_two_steps(failure: int, tmp_path: Path) -> None:
    for content in ("first", "second"):
        put(directory(tmp_path / content / "new", content), tmp_path / "x.tw", lambda *_: failure)
        assert (tmp_path / "x.tw" / "file").read_text() == content
    assert (tmp_path / "second" / "old0" / "file").read_text() == "first"


def test_what_was_there_comes_back_when_the_second_step_fails(tmp_path: Path) -> None:
    target = directory(tmp_path / "x.tw", "first")
    with pytest.raises(FileNotFoundError):
        put(tmp_path / "absent", target, no_exchange)
    assert (target / "file").read_text() == "first"


def test_other_failures_of_an_exchange_are_errors(tmp_path: Path) -> None:
    target = directory(tmp_path / "x.tw", "first")
    with pytest.raises(PermissionError):
        put(directory(tmp_path / "scratch" / "new", "second"), target, lambda *_: errno.EACCES)
    assert (target / "file").read_text() == "first"


def test_writers_without_an_exchange_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    failures = []

    def write(name: str) -> None:
        for number in range(50):
            try:
                put(directory(tmp_path / f"{name}{number}" / "new", name), tmp_path / "x.tw", no_exchange)
            except OSError as error:
                failures.append(error)

    threads = [Thread(target=write, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(tmp_path / "x.tw") == ["file"]
