"""Fused epilogues against float64 NumPy: quantised results within 1 of exact and 99.9 % equal, floats within 1e-4."""

from __future__ import annotations

from itertools import product as combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel_harness import (
    FAMILIES,
    FEW_EXAMPLES,
    LEVELS,
    Array,
    Case,
    LinearKernel,
    assert_u8,
    from_groups,
    from_stored,
    group_shape,
    level,
    linear_kernel,
    product,
    read_as,
    round_up,
    spread,
    to_groups,
)
from tilewright.codegen.epilogues import Activate, AddNorm, Norm, Qkv
from tilewright.schedules.isa import ISAS

STREAMS = ("rows", "columns")
CONSUMERS = ("rows", "columns", "packed")
SINGLE: Case = ("column", (1, 4))
"""Single outputs, which are finished a pack at a time."""
TOKENS = st.one_of(st.sampled_from([1, 16, 17]), st.integers(1, 100))
SEEDS = st.integers(0, 2**32 - 1)
K = 64


def draw(kernel: LinearKernel, seed: int, tokens: int, size: float) -> tuple[dict[str, Array], Array, np.random.Generator]:
    """Inputs of a linear kernel and its real results f64[T, N], which spread over a few times `size`."""
    random = np.random.default_rng(seed)
    n, k, block = kernel.spec.n, kernel.spec.k, kernel.spec.linear.block or (1, 1)
    mask = np.kron(random.random((n // block[0], k // block[1])) < 0.5, np.ones(block, int))
    weight = (random.integers(-127, 128, (n, k)) * mask).astype(np.int8)
    x = random.integers(0, 256, (round_up(tokens), k)).astype(np.uint8)
    fold = (-int(random.integers(0, 256)) * weight.astype(np.int64).sum(axis=1)).astype(np.int32)
    sums = product(x, weight) + fold
    scale = (random.uniform(0.5, 2.0, n) * size / (1 + np.abs(sums).std())).astype(np.float32)
    bias = (random.standard_normal(n) * size).astype(np.float32)
    real = sums * scale.astype(np.float64) + bias
    return kernel.arrays(x, weight, fold=fold, scale=scale, bias=bias), real, random


@pytest.mark.parametrize(("isa", "family", "block"), [level(isa, *case) for isa in ISAS for case in (*FAMILIES, SINGLE)])
@FEW_EXAMPLES
@given(tokens=TOKENS, seed=SEEDS, size=st.sampled_from([0.4, 30.0, 300.0]))
def test_qkv(isa: str, family, block, tokens: int, seed: int, size: float) -> None:
    hidden = 48
    kernel = linear_kernel(isa, family, block, 3 * hidden, K, Qkv(ISAS[isa].attention))
    inputs, real, _ = draw(kernel, seed, tokens, size)
    groups = len(real) // 16
    held = ISAS[isa].attention
    pairs = (groups, hidden // held.pack, 16, held.pack)
    found = kernel(inputs, {"query": pairs, "key": pairs, "value": (groups, hidden, 16)})

    query, key, value = np.split(real, 3, axis=1)
    assert_u8(from_groups(found["query"], "packed"), query, 0, -127, 127)
    assert_u8(from_groups(found["key"], "packed"), key, 0, -127, 127, held.key_offset)
    assert_u8(from_groups(found["value"], "columns"), value, 0, -127, 127)


def activation(name: str, x: Array) -> Array:
    """In float64, from PyTorch."""
    tensor = torch.from_numpy(x)
    if name == "relu":
        return torch.relu(tensor).numpy()
    return torch.nn.functional.gelu(tensor, approximate="tanh" if name == "gelu_tanh" else "none").numpy()


ACTIVATE = spread(list(combinations(("gelu", "gelu_tanh", "relu"), CONSUMERS)), families=True)
ACTIVATE += [level(isa, *SINGLE, "relu", "packed") for isa in ISAS]


@pytest.mark.parametrize(("isa", "family", "block", "name", "consumer"), ACTIVATE)
@FEW_EXAMPLES
@given(tokens=TOKENS, seed=SEEDS, size=st.sampled_from([0.1, 1.0, 4.0, 1e4]))
def test_activate(isa: str, family, block, name: str, consumer, tokens: int, seed: int, size: float) -> None:
    n = 96
    stored = read_as(isa, consumer)
    kernel = linear_kernel(isa, family, block, n, K, Activate(name, stored))
    inputs, real, random = draw(kernel, seed, tokens, size)
    step, zero_point = size / random.uniform(20, 80), int(random.integers(0, 256))
    quant = np.array([1 / step, zero_point], np.float32)
    shape = stored.shape(len(real) // 16, n)
    found = kernel({**inputs, "quant": quant}, {"activated": shape})["activated"]
    assert_u8(from_stored(found, stored), activation(name, real) * quant[0].astype(np.float64), zero_point)


# residual, stream, consumer
NORMS = list(combinations(STREAMS, STREAMS, (*CONSUMERS, None)))


@pytest.mark.parametrize(("isa", "family", "block", "residual", "stream", "consumer"), spread(NORMS, families=True))
@FEW_EXAMPLES
@given(tokens=TOKENS, seed=SEEDS, size=st.sampled_from([1e-2, 1.0, 50.0]), mean=st.sampled_from([0.0, 20.0]))
def test_add_norm(
    isa: str, family, block, residual, stream, consumer, tokens: int, seed: int, size: float, mean: float
) -> None:
    hidden, eps = 96, 1e-5
    stored = consumer and read_as(isa, consumer)
    kernel = linear_kernel(isa, family, block, hidden, K, AddNorm(Norm(eps, residual, stream, stored)))
    inputs, real, random = draw(kernel, seed, tokens, size)
    added = (random.standard_normal(real.shape) * size + mean * size).astype(np.float32)
    gamma, beta = random.uniform(0.2, 3, hidden).astype(np.float32), random.standard_normal(hidden).astype(np.float32)
    quant = np.array([random.uniform(10, 60), random.integers(0, 256)], np.float32)
    outputs = {"stream": group_shape(len(real), hidden, stream)}
    if consumer is not None:
        outputs["quantized"] = stored.shape(len(real) // 16, hidden)
    found = kernel({**inputs, "residual": to_groups(added, residual), "gamma": gamma, "beta": beta, "quant": quant}, outputs)
    expected = layer_norm(real + added, gamma, beta, eps)
    np.testing.assert_allclose(from_groups(found["stream"], stream), expected, atol=1e-4, rtol=1e-4)
    if consumer is not None:
        small = from_stored(found["quantized"], stored)
        assert_u8(small, expected * quant[0].astype(np.float64), quant[1])


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float) -> Array:
    """In float64, from PyTorch."""
    tensors = [torch.from_numpy(array.astype(np.float64)) for array in (x, gamma, beta)]
    return torch.nn.functional.layer_norm(tensors[0], x.shape[1:], *tensors[1:], eps=eps).numpy()


@pytest.mark.parametrize("isa", LEVELS)
def test_requantisation_rounds_ties_to_even_and_saturates(isa: str) -> None:
    """Through relu with a scale of 1 / 2: x.5 is exact, so a tie is a tie."""
    kernel = linear_kernel(isa, "row", None, 96, K, Activate("relu", read_as(isa, "rows")))
    weight = np.zeros((96, K), np.int8)
    weight[:, 0] = 1
    x = np.zeros((256, K), np.uint8)
    x[:, 0] = np.arange(256)
    scale, bias = np.full(96, 0.5, np.float32), np.linspace(0, 47.5, 96).astype(np.float32)
    arrays = kernel.arrays(x, weight, fold=np.zeros(96, np.int32), scale=scale, bias=bias)
    quant = np.array([1.0, 101.0], np.float32)  # odd: adding it before rounding would turn ties around
    found = kernel({**arrays, "quant": quant}, {"activated": (16, 16, 96)})["activated"].reshape(256, 96)
    halves = np.arange(256)[:, None] + (2 * bias).astype(np.int64)
    expected = [[min(round(half / 2) + 101, 255) for half in row] for row in halves.tolist()]  # Python rounds ties to even
    np.testing.assert_array_equal(found, expected)
    assert found.max() == 255
