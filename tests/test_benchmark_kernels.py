"""What the kernel benchmarks stand on: exact sparsity, loops that assemble, and rates that are fitted as they are used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.linear_kernel import Case, weights
from benchmarks.peak import available, clock, peak, rate
from benchmarks.rates import EPILOGUES, FITTED, LENGTH, SMALL_HEADS, fit_attention, fit_linear, solve, ways
from tilewright.codegen.decisions import Storage
from tilewright.predict import Sizes, predict
from tilewright.schedules.blocks import dense
from tilewright.schedules.choice import sparse_storage
from tilewright.schedules.isa import ISAS, Isa
from tilewright.schedules.rates import AttentionRate, LevelRates, LinearRate


@given(
    block=st.sampled_from([(1, 4), (4, 1), (16, 4), (8, 2)]),
    sparsity=st.floats(0, 1),
    spread=st.sampled_from(["random", "even", "uneven"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sparsity_is_exact_however_it_is_spread(block: tuple[int, int], sparsity: float, spread: str, seed: int) -> None:
    n, k = 64, 128
    weight = weights(Case("avx2", (n, k), block, 16, sparsity, spread), np.random.default_rng(seed))
    kept = weight.reshape(n // block[0], block[0], k // block[1], block[1]).any(axis=(1, 3))
    assert kept.sum() == round(kept.size * (1 - sparsity))
    assert np.count_nonzero(weight) == kept.sum() * block[0] * block[1]
    counts = kept.sum(axis=1)
    if spread == "even":
        assert counts.max() - counts.min() <= 1


def test_uneven_is_uneven() -> None:
    weight = weights(Case("avx2", (768, 768), (4, 1), 16, 0.8, "uneven"), np.random.default_rng(0))
    counts = weight.reshape(192, 4, 768).any(axis=1).sum(axis=1)
    assert np.quantile(counts, 0.9) > 4 * np.quantile(counts, 0.1)


def test_every_loop_that_this_cpu_has_runs() -> None:
    for loop in available():
        assert rate(loop, 1e-4) > 0
        assert peak(loop.isa, 1e-4) > 0
    assert clock(1e-4) > 0
    lacking = {isa for isa in ISAS} - {loop.isa for loop in available()}
    for isa in lacking:
        with pytest.raises(ValueError, match=f"no peak loop for {isa}"):
            peak(isa)


POSITIVE = st.floats(0.1, 50)


@given(macs=POSITIVE, costs=st.tuples(POSITIVE, POSITIVE, POSITIVE), attention=st.tuples(POSITIVE, POSITIVE, POSITIVE))
def test_fitted_rates_are_those_that_predictions_use(
    macs: float, costs: tuple[float, float, float], attention: tuple[float, float, float]
) -> None:
    """Cycles that the prediction makes of rates are fitted back to these rates."""
    isa = ISAS["avx2"]
    storage = Storage("gather", (4, 1))
    rate = LinearRate("gather", (4, 1), macs, *costs)
    rates = LevelRates("avx2", "x", "measured", "", 1.0, (rate,), AttentionRate(*attention), 0.1)

    def cycles(sizes: Sizes, sparsity: float, length: int) -> dict[str, float]:
        made = predict(sizes, isa, rates, (4, 1), sparsity, batch=1, seq_len=length, ghz=1e-3)
        assert made is not None
        return dict(made.kernels)

    found = fit_linear(storage, {1 - sparsity: cycles(FITTED, sparsity, LENGTH) for sparsity in (0.7, 0.9)})
    assert found.macs == pytest.approx(macs, rel=1e-3)
    assert [getattr(found, name) for name in EPILOGUES] == pytest.approx([getattr(rate, name) for name in EPILOGUES], rel=1e-3)
    seen = {(sizes, length): cycles(sizes, 0.7, length) for sizes in (FITTED, SMALL_HEADS) for length in (64, 128, 384)}
    back = fit_attention(seen)
    assert (back.macs, back.softmax, back.cost) == pytest.approx(attention, rel=1e-3)


def test_no_coefficient_is_negative() -> None:
    assert solve([[1, 1], [2, 1], [3, 1]], [2.0, 4.0, 6.0]) == pytest.approx([2, 0], abs=1e-9)
    assert min(solve([[1, 1], [2, 1], [3, 1]], [1.0, 3.0, 5.0])) == 0  # unconstrained: 2 and -1


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_rates_are_fitted_to_every_way_of_storing(isa: Isa) -> None:
    for storage, block in ways(isa).items():
        assert storage == (dense(isa) if block is None else sparse_storage(block, isa))
