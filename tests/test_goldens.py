"""Scheduled kernels are those that were looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import goldens


@pytest.mark.parametrize("name", goldens.KERNELS)
def test_the_scheduled_kernel_is_the_golden(name: str) -> None:
    assert goldens.text(name) == goldens.path(name).read_text("utf-8"), "renew with: python -m tests.goldens"


def test_there_is_no_golden_of_another_kernel() -> None:
    assert {path.stem for path in Path(goldens.__file__).parent.glob("*.txt")} == set(goldens.KERNELS)
