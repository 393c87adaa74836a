"""Linears of the compressed-tensors `int-quantized` format: s8 weights beside their scales, static activation scales.

`NAME.weight` s8[N, K], `NAME.weight_scale` f32[N, 1], `NAME.input_scale` and `NAME.input_zero_point` one value each.
The format's activations are s8; ours are u8, the same quantisation with 128 added to the value and the zero point.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.codegen.block_sparse import detect_block
from tilewright.codegen.model import Linear, Quantization
from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.frontend.tensors import Checkpoint

QUANT_METHOD = "compressed-tensors"
FORMAT = "int-quantized"


def check_quantization(config: dict[str, Any]) -> None:
    """Raise UnsupportedModel unless config.json's `quantization_config` names the one format that is read."""
    method, form = config.get("quant_method"), config.get("format")
    if (method, form) != (QUANT_METHOD, FORMAT):
        raise UnsupportedModel(
            f"quantization_config is {method} {form}; supported: {QUANT_METHOD} {FORMAT}, or a float checkpoint"
        )


def int8_linear(checkpoint: Checkpoint, name: str, n: int, k: int, notes: list[str]) -> Linear:
    """Take the quantised Linear `name` [n, k]; a weight of -128 is saturated to -127 and noted."""
    weight = checkpoint.int8(f"{name}.weight", n, k)
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
