"""What an `EncoderModel` computes, in NumPy and float32: the meaning that a frontend gave a checkpoint, to be held against it.

Sequences meet nowhere: attention takes them one at a time, everything else takes tokens one at a time. (They are laid
end to end only because NumPy multiplies one tall matrix faster than many flat ones.) There is no padding and no layout.
The products are parameters, so that the tests' integer arithmetic runs through the same encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.model import Activation, Attention, EncoderModel, Layer, LayerNorm, Linear, Pooling

Array = NDArray[np.float32]
Integers = NDArray[np.int64]
Observe = Callable[[str, Array], None]
"""Called with a name (`embeddings`, `layer 0 attention`, `layer 0` ...) and the residual stream f32[tokens, hidden] there."""


@dataclass(frozen=True)
class Arithmetic:
    """How products are computed.

    linear(linear, x f32[tokens, K], unit): f32[tokens, N], in multiples of `unit` where one is given.
    attend(q, k, v, attention): context f32[heads, tokens, channels] of three such arrays, which are in units of their scales.
    """

    linear: Callable[[Linear, Array, float | None], Array]
    attend: Callable[[Array, Array, Array, Attention], Array]


def apply_float(linear: Linear, x: Array, unit: float | None = None) -> Array:
    """x @ weight.T + bias with the real weight; `unit` is for quantised operands only."""
    return x @ linear.real_weight.T + linear.bias


def attend_float(q: Array, k: Array, v: Array, attention: Attention) -> Array:
    """softmax(q k' / sqrt(channels)) v."""
    logits = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(q.shape[-1]))
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(p @ v / p.sum(axis=-1, keepdims=True))


FLOAT = Arithmetic(apply_float, attend_float)


def forward(
    model: EncoderModel,
    sequences: Sequence[Integers],
    token_types: Sequence[Integers] | None = None,
    arithmetic: Arithmetic = FLOAT,
    observe: Observe = lambda name, values: None,
) -> list[dict[str, Array]]:
    """Outputs of `model` by name for each sequence of token ids; `observe` sees the residual stream of all sequences."""
    if token_types is None:
        token_types = [np.zeros(len(ids), np.int64) for ids in sequences]
    bounds = np.cumsum([0, *map(len, sequences)])
    spans = [slice(start, end) for start, end in pairwise(bounds)]
    hidden = np.concatenate([_embed(model, ids, types) for ids, types in zip(sequences, token_types, strict=True)])
    observe("embeddings", hidden)
    for index, layer in enumerate(model.layers):
        attended = _attention(model, layer, hidden, spans, arithmetic)
        observe(f"layer {index} attention", attended)
        hidden = _feed_forward(model, layer, attended, arithmetic)
        observe(f"layer {index}", hidden)
    return [_head(model, hidden[span]) for span in spans]


def layer_norm(x: Array, norm: LayerNorm) -> Array:
    """LayerNorm over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + np.float32(norm.eps)) * norm.weight + norm.bias)


def activate(x: Array, kind: Activation) -> Array:
    """The activation function `kind`; "gelu" is the exact one."""
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "gelu_tanh":
        inner = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3))
    else:
        inner = erf(x / np.float32(math.sqrt(2)))
    return np.asarray(np.float32(0.5) * x * (1 + inner))


def erf(x: Array) -> Array:
    """Error function to 1.5e-7, as NumPy has none (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    magnitude = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * magnitude)
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(coefficient)) * t
    return np.asarray(np.copysign(1 - series * np.exp(-magnitude * magnitude), x))


def _embed(model: EncoderModel, ids: Integers, types: Integers) -> Array:
    table = model.embeddings
    x = table.word[ids] + table.position[: len(ids)]
    if table.token_type is not None:
        x = x + table.token_type[types]
    return layer_norm(x, table.norm)


def _attention(model: EncoderModel, layer: Layer, x: Array, spans: list[slice], arithmetic: Arithmetic) -> Array:
    attention = layer.attention
    operands = [
        arithmetic.linear(linear, x, scale)
        for linear, scale in (
            (attention.query, attention.query_scale),
            (attention.key, attention.key_scale),
            (attention.value, attention.value_scale),
        )
    ]

    def context(span: slice) -> Array:
        length = span.stop - span.start
        q, k, v = (y[span].reshape(length, model.config.num_heads, -1).transpose(1, 0, 2) for y in operands)
        return arithmetic.attend(q, k, v, attention).transpose(1, 0, 2).reshape(length, -1)

    joined = np.concatenate([context(span) for span in spans])
    return layer_norm(arithmetic.linear(attention.output, joined, None) + x, layer.attention_norm)


def _feed_forward(model: EncoderModel, layer: Layer, x: Array, arithmetic: Arithmetic) -> Array:
    inner = activate(arithmetic.linear(layer.up, x, None), model.config.activation)
    return layer_norm(arithmetic.linear(layer.down, inner, None) + x, layer.output_norm)


def pool(hidden: Array, pooling: Pooling, normalize: bool) -> Array:
    """Sentence embedding [channels] of one sequence's tokens [tokens, channels]."""
    embedding = {"cls": hidden[0], "mean": hidden.mean(axis=0), "max": hidden.max(axis=0)}[pooling]
    return np.asarray(embedding / max(np.linalg.norm(embedding), 1e-12)) if normalize else embedding


def _head(model: EncoderModel, hidden: Array) -> dict[str, Any]:
    head = model.head
    if head.projection is None:
        return {"last_hidden_state": hidden, "sentence_embedding": pool(hidden, head.pooling, head.normalize)}
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
