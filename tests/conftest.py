from collections.abc import Iterator
from pathlib import Path

import pytest

import tilewright
from tests import toy


@pytest.fixture(scope="session")
def toy_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build_library(tmp_path_factory.mktemp("toy") / "toy.so")


@pytest.fixture(scope="session")
def toy_artifact(toy_library: Path) -> Path:
    """A shared artifact; tests that alter it use `toy_copy`."""
    return toy.write(toy_library.with_name("toy.tw"), toy_library)


@pytest.fixture
def toy_copy(tmp_path: Path, toy_library: Path) -> Path:
    return toy.write(tmp_path / "toy.tw", toy_library)


@pytest.fixture(scope="session")
def engine(toy_artifact: Path) -> "Iterator[tilewright.Engine]":
    yield tilewright.load(toy_artifact, num_threads=1)
