"""Independent NumPy model of exactly what Tilewright compiles; the reference of the model-level tests.

The encoder is that of `frontend/reference.py`, which is held to transformers and ONNX Runtime; here are its integer products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.model import Attention, EncoderModel, Linear
from tilewright.frontend import reference
from tilewright.frontend.reference import Arithmetic, Array, Integers, activate, apply_float, layer_norm

__all__ = ["activate", "apply_float", "forward", "forward_float", "layer_norm", "quantize_u8", "round_s8"]


def forward(
    model: EncoderModel, sequences: Sequence[Integers], token_types: Sequence[Integers] | None = None
) -> list[dict[str, Array]]:
    """Outputs of a quantised `model` for each sequence of token ids, integer products exact, the rest in f32."""
    return reference.forward(model, sequences, token_types, Arithmetic(_apply_int8, _attend_int8))


def forward_float(
    model: EncoderModel, sequences: Sequence[Integers], token_types: Sequence[Integers] | None = None
) -> list[dict[str, Array]]:
    """As `forward`, with float or dequantised weights and no quantised activations."""
    return reference.forward(model, sequences, token_types)


def quantize_u8(x: Array, scale: float, zero_point: int) -> NDArray[np.int32]:
    """clip(rne(x * (1 / scale)) + zero_point, 0, 255)."""
    return np.clip(np.rint(x * np.float32(1 / scale)) + zero_point, 0, 255).astype(np.int32)


def round_s8(x: Array) -> NDArray[np.int32]:
    """clip(rne(x), -127, 127)."""
    return np.clip(np.rint(x), -127, 127).astype(np.int32)


def _apply_int8(linear: Linear, x: Array, unit: float | None = None) -> Array:
    """The real result, in multiples of `unit` if given: one multiply-add of the integer sum, rounded once."""
    assert linear.scale is not None
    assert linear.input is not None
    q = quantize_u8(x, linear.input.scale, linear.input.zero_point) - linear.input.zero_point
    # float64 holds these integer sums exactly (below 2**53) and multiplies much faster than NumPy's integers
    acc = (q.astype(np.float64) @ linear.weight.T.astype(np.float64)).astype(np.float32)
    scale = (linear.input.scale * linear.scale.astype(np.float64) / (unit or 1.0)).astype(np.float32)
    bias = (linear.bias.astype(np.float64) / (unit or 1.0)).astype(np.float32)
    return (acc.astype(np.float64) * scale + bias).astype(np.float32)


def _attend_int8(q: Array, k: Array, v: Array, attention: Attention) -> Array:
    """Context [heads, tokens, channels] of q, k, v in units of their scales; probabilities u8, a row's largest 255."""
    q_scale, k_scale, v_scale = attention.query_scale, attention.key_scale, attention.value_scale
    assert q_scale is not None
    assert k_scale is not None
    assert v_scale is not None
    # float64 again stands for exact integers
    q8, k8, v8 = (round_s8(x).astype(np.float64) for x in (q, k, v))
    factor = np.float32(q_scale * k_scale / math.sqrt(q.shape[-1]))
    scores = q8 @ k8.transpose(0, 2, 1)
    logits = (scores - scores.max(axis=-1, keepdims=True)).astype(np.float32) * factor
    p = np.rint(np.exp(logits) * np.float32(255)).astype(np.float64)
    return (p @ v8).astype(np.float32) * np.float32(v_scale) / p.sum(axis=-1, keepdims=True).astype(np.float32)
