"""What is in a model: sizes, and for each Linear of the encoder the share of non-zero blocks per block shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tilewright.codegen.block_sparse import BLOCKS, block_density
from tilewright.codegen.model import EncoderConfig, EncoderModel, Head


@dataclass(frozen=True)
class LinearReport:
    """One Linear: `shape` [out, in], share of non-zero elements, and per block shape the share of non-zero blocks.

    A block shape that does not divide the matrix has density None. `block` is the one the layer would run sparse with.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    density: float
    block_density: Mapping[tuple[int, int], float | None]
    block: tuple[int, int] | None


@dataclass(frozen=True)
class ModelReport:
    """A model's sizes, its encoder Linears in the order of data, and the frontend's notes."""

    config: EncoderConfig
    num_layers: int
    head: Head
    quantized: bool
    linears: tuple[LinearReport, ...]
    notes: tuple[str, ...]


def report(model: EncoderModel) -> ModelReport:
    """Describe `model`."""
    linears = tuple(
        LinearReport(
            name=linear.name,
            shape=(linear.weight.shape[0], linear.weight.shape[1]),
            dtype=str(linear.weight.dtype),
            density=float(np.count_nonzero(linear.weight) / linear.weight.size),
            block_density={block: block_density(linear.weight, block) for block in BLOCKS},
            block=linear.block,
        )
        for linear in model.linears()
    )
    return ModelReport(model.config, len(model.layers), model.head, model.quantized, linears, model.notes)
