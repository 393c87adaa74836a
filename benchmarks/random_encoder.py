"""INT8 encoders with random weights, made as `EncoderModel`s: nothing is trained, exported or quantised."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import tilewright
from benchmarks.linear_kernel import Case, weights
from tilewright.codegen.decisions import Block
from tilewright.codegen.model import (
    Attention,
    Embeddings,
    EncoderConfig,
    EncoderModel,
    Head,
    Layer,
    LayerNorm,
    Linear,
    Quantization,
)
from tilewright.predict import Sizes
from tilewright.schedules.isa import Isa

WORDS, _POSITIONS = 1000, 512
_INPUT = Quantization(0.05, 128)
_ATTENTION_SCALE = 0.05  # of q, k and v


def random_encoder(sizes: Sizes, block: Block | None, sparsity: float) -> EncoderModel:
    """An encoder of `sizes` without a head, in every linear of which exactly the share `sparsity` of blocks is zero."""
    random = np.random.default_rng(0)
    hidden, wide = sizes.hidden, sizes.intermediate
    norm = LayerNorm(np.ones(hidden, np.float32), np.zeros(hidden, np.float32), 1e-12)

    def linear(n: int, k: int) -> Linear:
        values = weights(Case("avx2", (n, k), block, 0, sparsity, "random"), random)
        scale = np.full(n, 0.2 / 127 / (k * (1 - sparsity)) ** 0.5, np.float32)
        return Linear("random", values, np.zeros(n, np.float32), scale, _INPUT, block)

    def layer() -> Layer:
        query, key, value, output = (linear(hidden, hidden) for _ in range(4))
        attention = Attention(query, key, value, output, _ATTENTION_SCALE, _ATTENTION_SCALE, _ATTENTION_SCALE)
        return Layer(attention, norm, linear(wide, hidden), linear(hidden, wide), norm)

    words, positions = (random.standard_normal((count, hidden)).astype(np.float32) for count in (WORDS, _POSITIONS))
    config = EncoderConfig("distilbert", hidden, sizes.heads, wide, WORDS, _POSITIONS, "gelu")
    layers = tuple(layer() for _ in range(sizes.layers))
    return EncoderModel(config, Embeddings(words, positions, None, norm), layers, Head("none"))


def compiled(sizes: Sizes, isa: Isa, block: Block | None, sparsity: float) -> tilewright.Engine:
    """An engine of one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        artifact = tilewright.compile(random_encoder(sizes, block, sparsity), isa.name, Path(scratch) / "model.tw")
        return tilewright.load(artifact.path, num_threads=1)
