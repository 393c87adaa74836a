"""Independent NumPy model of exactly what Tilewright compiles; the reference of the model-level tests.

Sequences meet nowhere: attention takes them one at a time, everything else takes tokens one at a time. (They are laid
end to end only because NumPy multiplies one tall matrix faster than many flat ones.) There is no padding and no layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from tilewright.codegen.model import Activation, Attention, EncoderModel, Layer, LayerNorm, Linear

Array = NDArray[np.float32]
Integers = NDArray[np.int64]
Apply = Callable[[Linear, Array, float | None], Array]
Attend = Callable[[Array, Array, Array, Attention], Array]


def forward(
    model: EncoderModel, sequences: Sequence[Integers], token_types: Sequence[Integers] | None = None
) -> list[dict[str, Array]]:
    """Outputs of a quantised `model` for each sequence of token ids, integer products exact, the rest in f32."""
    return _forward(model, sequences, token_types, _apply_int8, _attend_int8)


def forward_float(
    model: EncoderModel, sequences: Sequence[Integers], token_types: Sequence[Integers] | None = None
) -> list[dict[str, Array]]:
    """As `forward`, with float or dequantised weights and no quantised activations."""
    return _forward(model, sequences, token_types, apply_float, _attend_float)


def quantize_u8(x: Array, scale: float, zero_point: int) -> NDArray[np.int32]:
    """clip(rne(x * (1 / scale)) + zero_point, 0, 255)."""
    return np.clip(np.rint(x * np.float32(1 / scale)) + zero_point, 0, 255).astype(np.int32)


def round_s8(x: Array) -> NDArray[np.int32]:
    """clip(rne(x), -127, 127)."""
    return np.clip(np.rint(x), -127, 127).astype(np.int32)


def apply_float(linear: Linear, x: Array, unit: float | None = None) -> Array:
    """x @ weight.T + bias with the real weight; `unit` is of the quantised path."""
    weight = linear.weight.astype(np.float32)
    if linear.scale is not None:
        weight *= linear.scale[:, None]
    return x @ weight.T + linear.bias


def layer_norm(x: Array, norm: LayerNorm) -> Array:
    """LayerNorm over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(norm.eps)) * norm.weight + norm.bias


def activate(x: Array, kind: Activation) -> Array:
    """The activation function `kind`; "gelu" is the exact one."""
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "gelu_tanh":
        return np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
    return np.float32(0.5) * x * (1 + torch.erf(torch.from_numpy(x / np.float32(math.sqrt(2)))).numpy())


def _forward(
    model: EncoderModel,
    sequences: Sequence[Integers],
    token_types: Sequence[Integers] | None,
    apply: Apply,
    attend: Attend,
) -> list[dict[str, Array]]:
    if token_types is None:
        token_types = [np.zeros(len(ids), np.int64) for ids in sequences]
    bounds = np.cumsum([0, *map(len, sequences)])
    spans = [slice(start, end) for start, end in pairwise(bounds)]
    hidden = np.concatenate([_embed(model, ids, types) for ids, types in zip(sequences, token_types, strict=True)])
    for layer in model.layers:
        hidden = _layer(model, layer, hidden, spans, apply, attend)
    return [_head(model, hidden[span]) for span in spans]


def _embed(model: EncoderModel, ids: Integers, types: Integers) -> Array:
    table = model.embeddings
    x = table.word[ids] + table.position[: len(ids)]
    if table.token_type is not None:
        x = x + table.token_type[types]
    return layer_norm(x, table.norm)


def _layer(model: EncoderModel, layer: Layer, x: Array, spans: list[slice], apply: Apply, attend: Attend) -> Array:
    attention = layer.attention
    operands = [
        apply(linear, x, scale)
        for linear, scale in (
            (attention.query, attention.query_scale),
            (attention.key, attention.key_scale),
            (attention.value, attention.value_scale),
        )
    ]
    context = np.concatenate([_attention(model, [y[span] for y in operands], attention, attend) for span in spans])
    x = layer_norm(apply(attention.output, context, None) + x, layer.attention_norm)
    inner = activate(apply(layer.up, x, None), model.config.activation)
    return layer_norm(apply(layer.down, inner, None) + x, layer.output_norm)


def _attention(model: EncoderModel, operands: list[Array], attention: Attention, attend: Attend) -> Array:
    """Context [tokens, hidden] of one sequence."""
    q, k, v = (y.reshape(len(y), model.config.num_heads, -1).transpose(1, 0, 2) for y in operands)
    return attend(q, k, v, attention).transpose(1, 0, 2).reshape(len(operands[0]), -1)


def _head(model: EncoderModel, hidden: Array) -> dict[str, Array]:
    head = model.head
    if head.projection is None:
        return {"last_hidden_state": hidden, "sentence_embedding": hidden.mean(axis=0)}
    if head.kind == "sequence_classification":
        x = hidden[0]
        if head.pre is not None:
            x = apply_float(head.pre, x)
            x = np.tanh(x) if head.pre_activation == "tanh" else np.maximum(x, 0)
        return {"logits": apply_float(head.projection, x)}
    logits = apply_float(head.projection, hidden)
    if head.kind == "question_answering":
        return {"start_logits": logits[:, 0], "end_logits": logits[:, 1]}
    return {"logits": logits}


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


def _attend_float(q: Array, k: Array, v: Array, attention: Attention) -> Array:
    logits = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(q.shape[-1]))
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p @ v / p.sum(axis=-1, keepdims=True)
