"""Sizes that no kernel divides: a model whose arrays are widened by zeros to sizes that kernels have.

`config` keeps what is meant: a mean is over its `hidden_size`, scores are divided by the root of its `head_dim`, outputs are as
wide as it says. Zeros stay zeros on their way: LayerNorms scale and shift them by 0, weights multiply them by 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.model import Attention, EncoderModel, Layer, LayerNorm, Linear

UNIT = 16
"""What divides the channels of every activation: row-blocks of dense weights, tiles, the squares of the embedding kernel."""

HEAD_UNIT = 4
"""What divides the channels of a head: bytes that one product sums."""


@dataclass(frozen=True)
class Axis:
    """Channels in `runs` runs of `used`, each stored as `stored` of which the last are 0."""

    runs: int
    used: int
    stored: int

    @classmethod
    def of(cls, runs: int, used: int, unit: int = UNIT) -> Axis:
        """Runs of the fewest multiples of `unit` that hold `used`, together a multiple of UNIT."""
        step = lcm(unit, UNIT // gcd(runs, UNIT))
        return cls(runs, used, -(-used // step) * step)

    def pad(self, array: NDArray[Any], axis: int = 0) -> NDArray[Any]:
        """`array` with its axis `axis` of runs * used channels widened."""
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        runs = array.reshape(*before, self.runs, self.used, *after)
        width = [(0, self.stored - self.used if place == axis + 1 else 0) for place in range(runs.ndim)]
        return np.pad(runs, width).reshape(*before, self.runs * self.stored, *after)

    def divides(self, length: int) -> int:
        """The longest part of a block of `length` channels in which none lies in two runs or is cut off by their end."""
        return length if self.used == self.stored else gcd(length, self.used, self.stored)


def is_padded(model: EncoderModel) -> bool:
    """Whether kernels serve the sizes of the model's arrays."""
    widths = [model.stored_hidden, *(len(linear.bias) for linear in model.linears())]
    return not any(width % UNIT for width in widths) and model.stored_head_dim % HEAD_UNIT == 0


def pad(model: EncoderModel) -> EncoderModel:
    """`model` with arrays of sizes that kernels serve, which a note says; itself if it has such sizes already."""
    config = model.config
    hidden, inner = Axis.of(1, config.hidden_size), Axis.of(1, config.intermediate_size)
    context = Axis.of(config.num_heads, config.head_dim, HEAD_UNIT)
    named = {"hidden size": hidden, "head size": context, "intermediate size": inner}
    padded = [f"{name} {axis.used} to {axis.stored}" for name, axis in named.items() if axis.used != axis.stored]
    if not padded or is_padded(model):
        return model
    tables = model.embeddings
    embeddings = replace(
        tables,
        word=hidden.pad(tables.word, 1),
        position=hidden.pad(tables.position, 1),
        token_type=None if tables.token_type is None else hidden.pad(tables.token_type, 1),
        norm=_norm(tables.norm, hidden),
    )
    layers = tuple(_layer(layer, hidden, context, inner) for layer in model.layers)
    note = f"padded with zeros to sizes that kernels have: {', '.join(padded)}"
    return replace(model, embeddings=embeddings, layers=layers, notes=(*model.notes, note))


def _layer(layer: Layer, hidden: Axis, context: Axis, inner: Axis) -> Layer:
    own = layer.attention
    attention: Attention = replace(
        own,
        query=_linear(own.query, context, hidden),
        key=_linear(own.key, context, hidden),
        value=_linear(own.value, context, hidden),
        output=_linear(own.output, hidden, context),
    )
    return Layer(
        attention,
        _norm(layer.attention_norm, hidden),
        _linear(layer.up, inner, hidden),
        _linear(layer.down, hidden, inner),
        _norm(layer.output_norm, hidden),
    )


def _norm(norm: LayerNorm, hidden: Axis) -> LayerNorm:
    return replace(norm, weight=hidden.pad(norm.weight), bias=hidden.pad(norm.bias))


def _linear(linear: Linear, outputs: Axis, inputs: Axis) -> Linear:
    block = linear.block and (outputs.divides(linear.block[0]), inputs.divides(linear.block[1]))
    return replace(
        linear,
        weight=outputs.pad(inputs.pad(linear.weight, 1)),
        bias=outputs.pad(linear.bias),
        scale=None if linear.scale is None else outputs.pad(linear.scale),
        block=block,
    )
