"""Tile kernels: their instructions, what the plans make of them, and the permission to use tiles.

Their sums are tested with those of all kernels (test_kernels_linear.py, where a CPU has tiles) and on the emulated CPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel_harness import innermost_loops, linear_cases, linear_kernel
from tests.test_schedules import model_of
from tilewright import cpu
from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import Family, Storage
from tilewright.codegen.epilogues import Raw
from tilewright.codegen.kernels.tiles import tile_quads
from tilewright.codegen.tiles import configuration
from tilewright.errors import ArtifactTargetMismatch
from tilewright.manifest import LevelRecord
from tilewright.schedules.blocks import DENSE_TILES, legal
from tilewright.schedules.choice import choose, plan, sparse_storage
from tilewright.schedules.isa import ISAS, resolve
from tilewright.schedules.rates import find
from tilewright.schedules.single import linear_spec

AMX = ISAS["amx"]
CASES: list[tuple[Family, tuple[int, int] | None]] = [("tile_row", None), ("tile_column", (16, 4)), ("tile_column", (32, 4))]


def assembly(family: Family, block: tuple[int, int] | None, n: int = 768, k: int = 3072) -> list[str]:
    """The lines of a kernel; a K of this size is not unrolled whole."""
    return linear_kernel("amx", family, block, n, k, Raw()).assembly.splitlines()


def test_the_cases_are_all_tile_kernels() -> None:
    assert set(CASES) == {case for case in linear_cases("amx") if case[0].startswith("tile")}


@pytest.mark.parametrize(("family", "block"), CASES)
def test_tiles_are_configured_and_released_once_in_a_task(family: Family, block: tuple[int, int] | None) -> None:
    lines = [line.strip() for line in assembly(family, block)]
    assert [sum(line.startswith(name) for line in lines) for name in ("ldtilecfg", "tilerelease")] == [1, 1]


@pytest.mark.parametrize(("family", "block"), CASES)
def test_accumulators_stay_in_tiles(family: Family, block: tuple[int, int] | None) -> None:
    """Accumulators are cleared and stored, operands loaded, and none of them goes to memory and back."""
    lines = assembly(family, block)
    for line in lines:
        if match := re.search(r"(tileloadd|tilestored|tilezero)\s.*%tmm(\d)", line):
            assert (match[1] == "tileloadd") == (int(match[2]) >= 4), line
    for body in innermost_loops("\n".join(lines), r"\btdpb"):
        assert not [line for line in body if re.match(r"tilestored|tilezero", line)]


@pytest.mark.parametrize(("family", "block"), CASES)
def test_two_groups_share_the_loads_of_weights(family: Family, block: tuple[int, int] | None) -> None:
    """Loads take half as long as products, so that as many loads as products keep the multiplier busy."""
    ratios = []
    for body in innermost_loops("\n".join(assembly(family, block)), r"\btdpb"):
        loads, products = (sum(line.startswith(name) for line in body) for name in ("tileloadd", "tdpb"))
        assert loads <= 2 * products
        ratios.append(loads / products)
    assert min(ratios) <= (1.0 if block != (16, 4) else 1.5)


def test_only_a_level_with_tiles_has_tile_kernels() -> None:
    for isa in ISAS.values():
        plans = [DENSE_TILES, *(plan for plans in BLOCKS.values() for plan in plans if plan.family == "tile_column")]
        assert {legal(plan, isa) for plan in plans} == {isa.name == "amx"}


def test_what_has_no_tiles_runs_another_levels_intrinsics() -> None:
    assert AMX.vectors == "avx512vnni"
    assert set(ISAS[AMX.vectors].features) < set(AMX.features)
    assert AMX.operands == ISAS[AMX.vectors].operands  # so that weights packed alike are stored once


@pytest.mark.parametrize("block", BLOCKS)
def test_dense_tiles_are_preferred_unless_few_blocks_are_left(block: tuple[int, int]) -> None:
    rates = find("amx", None)
    assert choose(768, 768, "qkv", block, 0.01, AMX, rates).storage == sparse_storage(block, AMX)
    dense = choose(768, 768, "qkv", block, 0.9, AMX, rates)
    assert dense.storage == DENSE_TILES
    assert f"block {block} pays on amx from" in dense.reason


def test_a_plan_counts_the_non_zero_blocks_of_a_model() -> None:
    model = model_of(((16, 4),) * 6)
    up = model.layers[0].up.weight  # [64, 32]
    up[:16] = 1  # a quarter of the blocks
    model.layers[0].down.weight[:, :40] = 1  # 40 of 64 inputs
    made = plan(model, AMX, sparse="auto").layers[0]
    assert made.up.decisions.storage == Storage("tile_column", (16, 4))
    assert made.down.decisions.storage == DENSE_TILES


@given(quads=st.integers(1, 1024))
def test_steps_of_dense_tiles_divide_the_inputs(quads: int) -> None:
    """So no load reads past a row, whatever K is."""
    found = tile_quads(linear_spec(AMX, DENSE_TILES, 16, 4 * quads, Raw()))
    assert quads % found == 0
    assert not [count for count in range(found + 1, 17) if quads % count == 0]


@given(quads=st.integers(1, 16))
def test_configuration_is_laid_out_as_the_cpu_reads_it(quads: int) -> None:
    config = np.frombuffer(configuration(quads), np.uint8)
    assert config.size == 64
    assert config[0] == 1  # palette
    assert config[48:56].tolist() == [16] * 6 + [quads] * 2  # rows
    assert config[16:32].view(np.uint16).tolist() == [64] * 4 + [4 * quads] * 2 + [64] * 2  # bytes of a row
    assert not config[1:16].any()
    assert not config[32:48].any()
    assert not config[56:].any()


@pytest.mark.parametrize("permitted", [False, True])
def test_a_process_that_may_not_use_tiles_runs_the_level_below(
    permitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"bmi": "bmi1", "lzcnt": "abm", "avx512vnni": "avx512_vnni", "amx-tile": "amx_tile", "amx-int8": "amx_int8"}
    (tmp_path / "cpuinfo").write_text("flags\t: " + " ".join(names.get(name, name) for name in AMX.features))
    monkeypatch.setattr(cpu, "_tiles_permitted", lambda: permitted)
    found = cpu.cpu_features(tmp_path / "cpuinfo")
    assert found == frozenset(AMX.features if permitted else ISAS["avx512vnni"].features)
    assert resolve("native", found).name == ("amx" if permitted else "avx512vnni")
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    level = LevelRecord("amx", AMX.features, "model.amx.so", {})
    if permitted:
        assert cpu.choose_level([level], found) == level
    else:
        with pytest.raises(ArtifactTargetMismatch, match="Linux refuses this process amx-tile, amx-int8, which amx needs"):
            cpu.choose_level([level], found)


def test_permission_is_asked_of_linux() -> None:
    """Where the CPU has no tiles Linux refuses; where it has, a container may."""
    flags = Path("/proc/cpuinfo").read_text().split()
    assert cpu._tiles_permitted() in ({True, False} if "amx_tile" in flags else {False})
