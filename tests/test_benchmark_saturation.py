"""Counting what `vpmaddubsw` saturates, against the instruction's definition applied to every pair."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.saturation import Saturation, count

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))


@given(st.data(), SIZES)
def test_count_is_that_of_the_instruction(data: st.DataObject, sizes: tuple[int, int, int]) -> None:
    tokens, outputs, pairs = sizes
    extremes = st.one_of(st.sampled_from([0, 1, 128, 129, 255]), st.integers(0, 255))
    activations = data.draw(arrays(np.uint8, (tokens, 2 * pairs), elements=extremes))
    weights = st.one_of(st.sampled_from([-128, -127, -64, 64, 127]), st.integers(-128, 127))
    weight = data.draw(arrays(np.int8, (outputs, 2 * pairs), elements=weights))
    sums, results = 0, 0
    for token in activations.tolist():
        for row in weight.tolist():
            beyond = [not -32768 <= token[i] * row[i] + token[i + 1] * row[i + 1] <= 32767 for i in range(0, 2 * pairs, 2)]
            sums += sum(beyond)
            results += any(beyond)
    assert count(activations, weight) == Saturation(tokens * outputs * pairs, sums, tokens * outputs, results)


def test_the_bound_is_met_exactly() -> None:
    activations = np.array([[255, 255], [255, 253]], np.uint8)
    assert count(activations, np.array([[64, 65]], np.int8)).saturated_sums == 1  # 32895 and 32765
    assert count(activations, np.array([[-64, -64]], np.int8)).saturated_sums == 0
