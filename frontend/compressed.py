"""Linears of the compressed-tensors `int-quantized` format: s8 weights beside their scales, static activation scales.

`NAME.weight` s8[N, K], `NAME.weight_scale` f32[N, 1], `NAME.input_scale` and `NAME.input_zero_point` one value each.
The format's activations are s8; ours are u8, the same quantisation with 128 added to the value and the zero point.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.codegen.block_sparse import detect_block
from tilewright.codegen.model import Float, Linear, Quantization
from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.frontend.packed import is_packed, packed_weight
from tilewright.frontend.tensors import Checkpoint, finite

QUANT_METHOD = "compressed-tensors"
FORMAT = "int-quantized"
PACKED_FORMAT = "int-quantized-blocks"
"""Ours: the same, with only the non-zero blocks of weights stored (`tilewright.frontend.packed`)."""


def check_quantization(config: dict[str, Any]) -> None:
    """Raise UnsupportedModel unless config.json's `quantization_config` names a format that is read."""
    method, form = config.get("quant_method"), config.get("format")
    if method != QUANT_METHOD or form not in (FORMAT, PACKED_FORMAT):
        raise UnsupportedModel(
            f"quantization_config is {method} {form}; supported: {QUANT_METHOD} {FORMAT} and {PACKED_FORMAT}, "
            "or a float checkpoint"
        )


def int8_linear(checkpoint: Checkpoint, name: str, n: int, k: int, notes: list[str]) -> Linear:
    """Take the quantised Linear `name` [n, k]; a weight of -128 is saturated to -127 and noted."""
    packed = is_packed(checkpoint, name)
    weight = packed_weight(checkpoint, name, n, k) if packed else checkpoint.int8(f"{name}.weight", n, k)
    extreme = int((weight == -128).sum())
    if extreme:
        notes.append(f"saturated {extreme} weights of -128 to -127 in {name}")
        weight = np.maximum(weight, np.int8(-127))
    scale = checkpoint.floats(f"{name}.weight_scale").reshape(-1)
    if scale.size not in (1, n):
        raise InvalidModel(f"tensor {name}.weight_scale has {scale.size} values, expected 1 or {n}: per-channel scales only")
    if (scale <= 0).any():
        raise InvalidModel(f"tensor {name}.weight_scale holds a scale that is not positive")
    return Linear(
        name=name,
        weight=weight,
        bias=checkpoint.floats(f"{name}.bias", n),
        scale=np.ascontiguousarray(np.broadcast_to(scale, n)),
        input=Quantization(positive(checkpoint, f"{name}.input_scale"), _zero_point(checkpoint, name)),
        block=detect_block(weight),
    )


def float_linear(checkpoint: Checkpoint, name: str, n: int, k: int, notes: list[str]) -> Linear:
    """Take the float Linear `name` [n, k]."""
    weight = checkpoint.floats(f"{name}.weight", n, k)
    return Linear(name, weight, checkpoint.floats(f"{name}.bias", n), block=detect_block(weight))


def embedding_table(checkpoint: Checkpoint, name: str, rows: int, channels: int) -> Float:
    """Take the table f32[rows, channels] of the Embedding `name`, whose rows may be s8 beside scales f32[rows, 1]."""
    if f"{name}.weight_scale" not in checkpoint:
        return checkpoint.floats(f"{name}.weight", rows, channels)
    scale = checkpoint.floats(f"{name}.weight_scale", rows, 1)
    return finite(f"{name}.weight", checkpoint.int8(f"{name}.weight", rows, channels) * scale)


def positive(checkpoint: Checkpoint, name: str) -> float:
    """Take the scale `name`; raises InvalidModel unless it is one positive number."""
    scale = checkpoint.scalar(name)
    if scale <= 0:
        raise InvalidModel(f"tensor {name} is {scale}; a scale is positive")
    return scale


def _zero_point(checkpoint: Checkpoint, name: str) -> int:
    zero_point = int(checkpoint.scalar(f"{name}.input_zero_point"))
    if not -128 <= zero_point <= 127:
        raise InvalidModel(f"tensor {name}.input_zero_point is {zero_point}; an int8 zero point lies in -128..127")
    return zero_point + 128
