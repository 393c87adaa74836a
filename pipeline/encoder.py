"""A float encoder in PyTorch that shows every value which will be quantised to an observer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.codegen.model import Activation, Attention, EncoderModel, Layer, LayerNorm, Linear

Observe = Callable[[str, Tensor], None]
"""Called with a name (`0.attention.input`, `0.query`, `0.up.input` ...) and the values f32[tokens, channels] there."""

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True)
class Batch:
    """Token ids s64[batch, tokens], padded; token types of the same shape; mask bool, true at tokens."""

    ids: Tensor
    types: Tensor
    mask: Tensor


def run(model: EncoderModel, batch: Batch, observe: Observe) -> None:
    """Run the layers of a float `model` on `batch`; padding is masked, and left out of what is observed."""
    embeddings = model.embeddings
    with torch.inference_mode(), warnings.catch_warnings():
        # arrays of a file are read-only; nothing here writes to one
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        positions = torch.from_numpy(embeddings.position[: batch.ids.shape[1]])
        x = functional.embedding(batch.ids, torch.from_numpy(embeddings.word)) + positions
        if embeddings.token_type is not None:
            x = x + functional.embedding(batch.types, torch.from_numpy(embeddings.token_type))
        x = _norm(x, embeddings.norm)
        for index, layer in enumerate(model.layers):
            x = _layer(model, layer, x, batch.mask, partial(_tap, observe, batch.mask, index))


def _tap(observe: Observe, mask: Tensor, index: int, name: str, values: Tensor) -> None:
    observe(f"{index}.{name}", values[mask])


def _layer(model: EncoderModel, layer: Layer, x: Tensor, mask: Tensor, tap: Observe) -> Tensor:
    tap("attention.input", x)
    context = _attention(layer.attention, x, mask, model.config.num_heads, tap)
    tap("output.input", context)
    x = _norm(_linear(context, layer.attention.output) + x, layer.attention_norm)
    tap("up.input", x)
    inner = _ACTIVATIONS[model.config.activation](_linear(x, layer.up))
    tap("down.input", inner)
    return _norm(_linear(inner, layer.down) + x, layer.output_norm)


def _attention(attention: Attention, x: Tensor, mask: Tensor, num_heads: int, tap: Observe) -> Tensor:
    heads = []
    for name, linear in (("query", attention.query), ("key", attention.key), ("value", attention.value)):
        y = _linear(x, linear)
        tap(name, y)
        heads.append(y.reshape(*y.shape[:2], num_heads, -1).transpose(1, 2))
    query, key, value = heads
    logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    probabilities = logits.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
    return (probabilities @ value).transpose(1, 2).reshape(x.shape)


def _linear(x: Tensor, linear: Linear) -> Tensor:
    return functional.linear(x, torch.from_numpy(linear.real_weight), torch.from_numpy(linear.bias))


def _norm(x: Tensor, norm: LayerNorm) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], torch.from_numpy(norm.weight), torch.from_numpy(norm.bias), eps=norm.eps)
