"""Embedding, head and pooling kernels against PyTorch and NumPy in float64."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel_harness import (
    FEW_EXAMPLES,
    LEVELS,
    Array,
    Kernel,
    assert_u8,
    from_groups,
    from_stored,
    group_shape,
    read_as,
    round_up,
    spread,
    to_groups,
)
from tilewright.codegen.epilogues import Norm
from tilewright.codegen.kernels.embedding import embedding
from tilewright.codegen.kernels.head import VECTOR, padded_width, pool, sequence_head, token_head
from tilewright.codegen.model import Pooling
from tilewright.codegen.workload import KernelSpec

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
HIDDEN, WORDS, POSITIONS = 48, 70, 40


def spec(isa: str, op: str, n: int, k: int, epilogue: str = "", residual=None) -> KernelSpec:
    return KernelSpec(op, n, k, isa, epilogue, residual=residual)


@cache
def embedding_kernel(isa: str, types: int, residual, stream, consumer) -> Kernel:
    norm = Norm(1e-12, residual, stream, consumer and read_as(isa, consumer))
    own = spec(isa, "embedding", WORDS, HIDDEN, norm.label, residual)
    return Kernel.of(embedding(own, norm, POSITIONS, types), own)


EMBEDDINGS = [
    (types, residual, stream, consumer)
    for residual in ("rows", "columns")
    for types, stream, consumer in (
        (0, residual, "rows"),
        (2, residual, "columns"),
        (1, "rows", None),
        (2, residual, "packed"),
    )
]


@pytest.mark.parametrize(("isa", "types", "residual", "stream", "consumer"), spread(EMBEDDINGS))
@FEW_EXAMPLES
@given(tokens=st.integers(1, 80), seed=SEEDS)
def test_embedding(isa: str, types: int, residual, stream, consumer, tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = {"word": WORDS, "position": POSITIONS} | ({"token_type": types} if types else {})
    tables = {name: random.standard_normal((size, HIDDEN)).astype(np.float32) for name, size in sizes.items()}
    shape = (round_up(tokens) // 16, 16)
    ids = {f"{name}_ids": random.integers(0, size, shape).astype(np.int32) for name, size in sizes.items()}
    gamma, beta = (random.standard_normal(HIDDEN).astype(np.float32) for _ in range(2))
    quant = np.array([random.uniform(10, 60), random.integers(0, 256)], np.float32)
    outputs = {"stream": group_shape(round_up(tokens), HIDDEN, stream)}
    stored = consumer and read_as(isa, consumer)
    if stored is not None:
        outputs["quantized"] = stored.shape(round_up(tokens) // 16, HIDDEN)
    inputs = {**ids, **tables, "gamma": gamma, "beta": beta, "quant": quant}
    found = embedding_kernel(isa, types, residual, stream, consumer)(inputs, outputs)

    total = sum(tables[name].astype(np.float64)[ids[f"{name}_ids"].ravel()] for name in sizes)
    norms = [torch.from_numpy(array.astype(np.float64)) for array in (total, gamma, beta)]
    expected = torch.nn.functional.layer_norm(norms[0], (HIDDEN,), *norms[1:], eps=1e-12).numpy()
    np.testing.assert_allclose(from_groups(found["stream"], stream), expected, atol=1e-4, rtol=1e-4)
    if consumer is not None:
        small = from_stored(found["quantized"], stored)
        assert_u8(small, expected * quant[0].astype(np.float64), quant[1])


@cache
def token_kernel(isa: str, width: int, split: bool) -> Kernel:
    own = spec(isa, "token_head", width, HIDDEN)
    return Kernel.of(token_head(own, split), own)


def packed(weight: Array) -> Array:
    """f32[n, k] as [k, blocks, 16], padded with zeros."""
    n, k = weight.shape
    whole = np.zeros((k, padded_width(n)), np.float32)
    whole[:, :n] = weight.T
    return whole.reshape(k, -1, VECTOR)


def random_linear(random: np.random.Generator, n: int, k: int) -> tuple[Array, Array]:
    return random.standard_normal((n, k)).astype(np.float32), random.standard_normal(n).astype(np.float32)


@pytest.mark.parametrize(("isa", "width"), spread([(1,), (2,), (3,), (16,), (17,), (213,)]))
@FEW_EXAMPLES
@given(tokens=st.integers(1, 60), seed=SEEDS)
def test_token_head(isa: str, width: int, tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((round_up(tokens), HIDDEN)).astype(np.float32)
    weight, bias = random_linear(random, width, HIDDEN)
    inputs = {"stream": to_groups(x, "rows"), "project_weight": packed(weight), "bias": bias}
    found = token_kernel(isa, width, False)(inputs, {"out0": group_shape(len(x), width, "rows")})["out0"]
    np.testing.assert_allclose(from_groups(found, "rows"), x.astype(np.float64) @ weight.T + bias, atol=1e-4)


@pytest.mark.parametrize("isa", LEVELS)
@FEW_EXAMPLES
@given(tokens=st.integers(1, 60), seed=SEEDS)
def test_question_answering_head(isa: str, tokens: int, seed: int) -> None:
    """Two columns, each an output of its own."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((round_up(tokens), HIDDEN)).astype(np.float32)
    weight, bias = random_linear(random, 2, HIDDEN)
    inputs = {"stream": to_groups(x, "rows"), "project_weight": packed(weight), "bias": bias}
    shape = group_shape(len(x), 1, "rows")
    found = token_kernel(isa, 2, True)(inputs, {"out0": shape, "out1": shape})
    both = np.concatenate([from_groups(found[name], "rows") for name in ("out0", "out1")], axis=1)
    np.testing.assert_allclose(both, x.astype(np.float64) @ weight.T + bias, atol=1e-4)


@cache
def sequence_kernel(isa: str, width: int, activation: str | None) -> Kernel:
    own = spec(isa, "sequence_head", width, HIDDEN, activation or "")
    return Kernel.of(sequence_head(own, activation), own)


def sequences(random: np.random.Generator, lengths: list[int]) -> tuple[Array, Array]:
    """Hidden states f32[T, H] and offsets; what lies past the last token must not matter, so it is not a number."""
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    x = np.full((round_up(offsets[-1]), HIDDEN), np.nan, np.float32)
    x[: offsets[-1]] = random.standard_normal((offsets[-1], HIDDEN))
    return x, offsets


HEADS = [(1, None), (17, None), (3, "tanh"), (17, "relu"), (2, "relu"), (16, "tanh")]


@pytest.mark.parametrize(("isa", "width", "activation"), spread(HEADS))
@FEW_EXAMPLES
@given(lengths=LENGTHS, seed=SEEDS)
def test_sequence_head(isa: str, width: int, activation: str | None, lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    x, offsets = sequences(random, lengths)
    weight, bias = random_linear(random, width, HIDDEN)
    inputs = {"stream": to_groups(x, "rows"), "offsets": offsets, "project_weight": packed(weight), "bias": bias}
    first = x[offsets[:-1]].astype(np.float64)
    if activation is not None:
        pre, pre_bias = random_linear(random, HIDDEN, HIDDEN)
        inputs |= {"pre_weight": packed(pre), "pre_bias": pre_bias}
        first = {"tanh": np.tanh, "relu": lambda y: np.maximum(y, 0)}[activation](first @ pre.T + pre_bias)
    found = sequence_kernel(isa, width, activation)(inputs, {"logits": (len(lengths), width)})["logits"]
    np.testing.assert_allclose(found, first @ weight.T + bias, atol=1e-4, rtol=1e-4)


@cache
def pool_kernel(isa: str, pooling: Pooling, normalize: bool) -> Kernel:
    own = spec(isa, "pool", HIDDEN, HIDDEN, f"{pooling}{normalize}")
    return Kernel.of(pool(own, pooling, normalize), own)


POOLINGS = [(pooling, normalize) for pooling in get_args(Pooling) for normalize in (False, True)]


@pytest.mark.parametrize(("isa", "pooling", "normalize"), spread(POOLINGS))
@FEW_EXAMPLES
@given(lengths=LENGTHS, seed=SEEDS)
def test_pool(isa: str, pooling: Pooling, normalize: bool, lengths: list[int], seed: int) -> None:
    x, offsets = sequences(np.random.default_rng(seed), lengths)
    inputs = {"stream": to_groups(x, "rows"), "offsets": offsets}
    found = pool_kernel(isa, pooling, normalize)(inputs, {"embedding": (len(lengths), HIDDEN)})["embedding"]
    tokens = [torch.from_numpy(x[a:b].astype(np.float64)) for a, b in pairwise(offsets)]
    expected = torch.stack([{"mean": t.mean(0), "cls": t[0], "max": t.amax(0)}[pooling] for t in tokens])
    if normalize:
        expected = torch.nn.functional.normalize(expected)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_an_embedding_of_zeros_stays_zero_when_normalised(pooling: Pooling) -> None:
    inputs = {"stream": np.zeros((1, 16, HIDDEN), np.float32), "offsets": np.array([0, 3], np.int32)}
    assert not pool_kernel("portable", pooling, True)(inputs, {"embedding": (1, HIDDEN)})["embedding"].any()
