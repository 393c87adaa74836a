"""Predicted times, by hand from made-up rates; and the table of rates that the package ships."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tilewright import frontend
from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import Storage
from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.predict import BERT_BASE, Sizes, blocks_for, break_even, predict, ranking, read_sizes
from tilewright.schedules.blocks import dense
from tilewright.schedules.choice import choose, sparse_storage
from tilewright.schedules.isa import ISAS
from tilewright.schedules.rates import AttentionRate, LevelRates, LinearRate, find, from_json, table

SIZES = Sizes("tiny", 2, 32, 4, 64)
WORDS = ISAS["portable"]  # a level whose operands have 16 bits, so that each block is stored as it is
DENSE = LinearRate("row", None, 16.0, qkv=1.0, add_norm=3.0, activate=2.0)
FINE = LinearRate("gather", (4, 1), 8.0, qkv=2.0, add_norm=4.0, activate=3.0)
COARSE = LinearRate("row", (16, 4), 12.0, qkv=1.0, add_norm=3.0, activate=2.0)
ATTENTION = AttentionRate(8.0, softmax=0.5, cost=2.0)


def level(*linears: LinearRate, **fields: Any) -> LevelRates:
    values = {"isa": "avx2", "cpu": "znver3", "source": "measured", "about": "made up", "ghz": 2.0} | fields
    return LevelRates(**values, linears=linears, attention=ATTENTION, embedding=0.25)


RATES = level(DENSE, FINE, COARSE)


def at(block: tuple[int, int] | None, sparsity: float = 0.75, rates: LevelRates = RATES, **call: Any) -> Any:
    return predict(SIZES, WORDS, rates, block, sparsity, **({"batch": 1, "seq_len": 16, "ghz": 2.0} | call))


def test_times_by_hand() -> None:
    """16 tokens at 2 GHz, so cycles of a token are divided by 125 to get microseconds."""
    found = at((4, 1))
    expected = {
        "qkv": 96 * 32 / 4 / 8 + 96 * 2,
        "output": 32 * 32 / 4 / 8 + 32 * 4,
        "up": 64 * 32 / 4 / 8 + 64 * 3,
        "down": 32 * 64 / 4 / 8 + 32 * 4,
        "attention": 2 * 16 * 32 / 8 + 16 * 4 * 0.5 + 32 * 2,
    }
    assert found.kernels == pytest.approx({name: cycles / 125 for name, cycles in expected.items()})
    assert found.milliseconds == pytest.approx((2 * sum(expected.values()) + 32 * 0.25) / 125e3)
    dense = at(None)
    assert dense.kernels["qkv"] == pytest.approx((96 * 32 / 16 + 96) / 125)  # nothing is skipped


def test_tokens_are_rounded_up_and_the_clock_divides() -> None:
    assert at((4, 1), seq_len=9).kernels["up"] == at((4, 1), seq_len=16).kernels["up"]
    assert at((4, 1), batch=3).milliseconds == pytest.approx(3 * at((4, 1)).milliseconds)
    assert at((4, 1), batch=2, seq_len=8).kernels["up"] == at((4, 1)).kernels["up"]
    assert at((4, 1), ghz=4.0).milliseconds == pytest.approx(at((4, 1)).milliseconds / 2)
    longer, shorter = at(None, seq_len=64).kernels["attention"], at(None, seq_len=32).kernels["attention"]
    assert longer > 2 * shorter  # it grows faster than the number of tokens


def test_a_block_is_predicted_as_the_level_stores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCKS, (16, 1), (Storage("gather", (4, 1)),))
    found = at((16, 1), 0.9)
    assert (found.block, set(found.stored.values())) == ((16, 1), {Storage("gather", (4, 1))})
    assert found.kernels == at((4, 1), 0.9).kernels
    assert at((4, 4)) is None  # which is stored as it is, and has no rate


def test_what_is_compiled_as_dense_is_predicted_as_dense() -> None:
    """(4, 1) pays from 75 % of zeros on in the linears of 32 inputs, from 62.5 % on in that of 64 (see below)."""
    assert at((4, 1), 0.1).kernels == at(None).kernels
    some = at((4, 1), 0.7)
    assert (some.stored["down"].block, some.stored["output"].block) == ((4, 1), None)
    assert some.kernels["output"] == at(None).kernels["output"]


def test_ranking() -> None:
    found = ranking([at(block, share) for share in (0.9, 0.8) for block in (None, (4, 1), (16, 4))])
    assert [(row.sparsity, row.block) for row in found] == [
        (0.8, (16, 4)), (0.8, (4, 1)), (0.8, None), (0.9, (16, 4)), (0.9, (4, 1)), (0.9, None),
    ]  # fmt: skip
    costless = dataclasses.replace(FINE, qkv=0.0, add_norm=0.0, activate=0.0)
    found = ranking(at(block, 0.9, level(DENSE, costless, COARSE)) for block in (None, (16, 4), (4, 1)))
    assert [row.block for row in found] == [(4, 1), (16, 4), None]


def test_break_even_by_hand() -> None:
    """(16, 4) costs what dense does per output, so it pays once it skips the share its products are slower by."""
    assert break_even(SIZES, WORDS, RATES, (16, 4)) == pytest.approx(1 - 12 / 16)
    assert break_even(SIZES, WORDS, RATES, (4, 4)) is None
    # (4, 1) costs a cycle more per output, of the two that 32 inputs take as dense: the linears of 32 inputs are the last
    assert break_even(SIZES, WORDS, RATES, (4, 1)) == pytest.approx(1 - (32 / 16 - 1) * 8 / 32)
    never = level(DENSE, dataclasses.replace(FINE, activate=1e4))
    assert break_even(SIZES, WORDS, never, (4, 1)) == 1
    always = level(DENSE, dataclasses.replace(FINE, macs=1e6, qkv=0.0, add_norm=0.0, activate=0.0))
    assert break_even(SIZES, WORDS, always, (4, 1)) == 0


POSITIVE = st.floats(0.1, 50)


@given(rate=st.builds(LinearRate, st.just("gather"), st.just((4, 1)), POSITIVE, POSITIVE, POSITIVE, POSITIVE))
def test_all_linears_are_stored_sparse_from_break_even_on(rate: LinearRate) -> None:
    rates = level(DENSE, rate)
    share = break_even(BERT_BASE, WORDS, rates, (4, 1))
    assert share is not None and 0 <= share <= 1

    def chosen(sparsity: float) -> set[str]:
        made = (choose(n, k, kind, (4, 1), 1 - sparsity, WORDS, rates).storage for n, k, kind in BERT_BASE.linears().values())
        return {"dense" if storage.block is None else "sparse" for storage in made}

    if share > 1e-6:
        assert "dense" in chosen(share - 1e-6)
    if share < 1 - 1e-6:
        assert chosen(share + 1e-6) == {"sparse"}


def test_find_prefers_the_cpu_then_its_maker_then_measurements() -> None:
    zen3, zen4 = level(DENSE, cpu="znver3"), level(DENSE, cpu="znver4")
    ice = level(DENSE, cpu="icelake-server", source="modelled", ghz=None)
    other = level(DENSE, isa="avx512")
    known = [ice, zen3, zen4, other]
    assert find("avx2", "znver4", known) == zen4
    assert find("avx2", "znver2", known) == zen3
    assert find("avx2", "icelake-server", known) == ice
    assert find("avx2", "cascadelake", known) == ice
    assert find("avx2", "cascadelake", [zen3, other]) == zen3
    assert find("avx2", None, known) == zen3
    assert find("portable", "znver4", known) is None


def test_rates_survive_json() -> None:
    rates = (RATES, level(DENSE, isa="avx512", source="modelled", ghz=None))
    assert from_json(json.dumps([dataclasses.asdict(entry) for entry in rates])) == rates


@pytest.mark.parametrize("entry", table(), ids=lambda entry: f"{entry.source}-{entry.cpu}-{entry.isa}")
def test_the_shipped_rates_cover_every_block_shape(entry: LevelRates) -> None:
    isa = ISAS[entry.isa]
    assert entry.source in ("measured", "modelled")
    assert (entry.ghz is not None) == (entry.source == "measured")
    assert entry.about
    most = 2 * isa.lanes * isa.operands.pack  # two vector instructions a cycle, on any CPU there is
    for block in (None, *BLOCKS):
        storage = dense(isa) if block is None else sparse_storage(block, isa)
        assert storage is not None
        rate = entry.of(storage)
        assert rate is not None and rate.block == storage.block, f"{block} has no rate; run python -m benchmarks.rates"
        assert 0 < rate.macs <= (1024 if storage.family.startswith("tile") else 1.02 * most)
        assert min(rate.qkv, rate.add_norm, rate.activate) >= 0
    assert 0 < entry.attention.macs <= 1.02 * most
    assert entry.embedding > 0


def test_the_shipped_rates_name_each_level_and_cpu_once() -> None:
    assert len({(entry.isa, entry.cpu, entry.source) for entry in table()}) == len(table())


@pytest.mark.parametrize("name", ["BertModel", "DistilBertForQuestionAnswering"])
def test_sizes_need_no_weights(name: str, tmp_path: Path) -> None:
    directory = tiny.save(tiny.build(name), tmp_path / "model")
    model = frontend.load(directory)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    expected = Sizes(model.config.architecture, tiny.LAYERS, tiny.HIDDEN, tiny.HEADS, tiny.WIDE)
    assert read_sizes(directory) == read_sizes(directory / "config.json") == expected


def test_sizes_of_what_is_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="does not exist"):
        read_sizes(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModel, match="architecture llama is not supported"):
        read_sizes(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidModel, match="cannot be read as JSON"):
        read_sizes(tmp_path)


def test_blocks_that_do_not_divide_the_model_are_left_out() -> None:
    assert blocks_for(BERT_BASE) == list(BLOCKS)
    assert (32, 4) not in blocks_for(Sizes("odd", 1, 48, 4, 96))
