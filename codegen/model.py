"""`EncoderModel`: what every frontend produces and what code generation consumes.

All arrays are NumPy; weights are [out, in]. Activations that enter a quantised `Linear` are u8 with one scale and zero point
per tensor; attention operands are s8 with a scale and zero point 0; softmax probabilities are u8 with scale 1/255;
the residual stream, LayerNorm, softmax internals and the activation function are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Activation = Literal["gelu", "gelu_tanh", "relu"]
HeadKind = Literal["none", "question_answering", "sequence_classification", "token_classification"]
Pooling = Literal["mean", "cls", "max"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Quantization:
    """Per-tensor u8 quantisation: real = scale * (q - zero_point), 0 <= zero_point <= 255."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias.

    Quantised: weight s8[N, K] in -127..127, scale f32[N] (per output channel), input the u8 quantisation of x, or None where
    only weights are quantised so far.
    Float: weight f32[N, K], scale and input None. bias is f32[N] in both. `block` is the sparse block found, if any.
    """

    name: str
    weight: NDArray[np.int8] | Float
    bias: Float
    scale: Float | None = None
    input: Quantization | None = None
    block: tuple[int, int] | None = None

    @property
    def quantized(self) -> bool:
        """Whether the weight is s8."""
        return self.scale is not None

    @property
    def real_weight(self) -> Float:
        """The weight f32[N, K] that is meant: dequantised if it is s8."""
        return np.asarray(self.weight, np.float32) if self.scale is None else self.weight * self.scale[:, None]


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; weight and bias f32[H]."""

    weight: Float
    bias: Float
    eps: float


@dataclass(frozen=True)
class Attention:
    """Multi-head self-attention. The three scales quantise the real q, k, v to s8 (zero point 0); None in a float model.

    The context's quantisation is `output.input`. query, key and value share one `input`.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_scale: float | None = None
    key_scale: float | None = None
    value_scale: float | None = None


@dataclass(frozen=True)
class Layer:
    """A post-norm transformer encoder layer."""

    attention: Attention
    attention_norm: LayerNorm
    up: Linear
    down: Linear
    output_norm: LayerNorm


@dataclass(frozen=True)
class Embeddings:
    """word f32[V, H] + position f32[P, H] + token_type f32[types, H] (absent in DistilBERT), then LayerNorm."""

    word: Float
    position: Float
    token_type: Float | None
    norm: LayerNorm


@dataclass(frozen=True)
class Head:
    """What turns the last hidden state into outputs; float32 throughout.

    none: outputs `last_hidden_state` per token and `sentence_embedding`: the mean or largest value of each channel over the
    sequence's tokens, or the first token (`cls`), which `normalize` divides by its L2 norm, or by 1e-12 where that is less.
    question_answering: `start_logits`, `end_logits` (projection [2, H]). token_classification: `logits` per token.
    sequence_classification: `logits` per sequence from the first token, through `pre` (with `pre_activation`) if present.
    problem_type is what config.json calls the meaning of those logits, None where it is not stated.
    """

    kind: HeadKind
    projection: Linear | None = None
    pre: Linear | None = None
    pre_activation: Literal["tanh", "relu"] | None = None
    pooling: Pooling = "mean"
    normalize: bool = False
    problem_type: ProblemType | None = None

    @property
    def problem(self) -> ProblemType | None:
        """The meaning of a sequence's logits; one logit is a score and several are classes where nothing is stated."""
        if self.kind != "sequence_classification" or self.projection is None:
            return None
        return self.problem_type or ("regression" if len(self.projection.bias) == 1 else "single_label_classification")


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and names of a BERT-like encoder."""

    architecture: str
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    activation: Activation
    labels: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class EncoderModel:
    """A whole encoder, float or quantised. `notes` reports what the frontend changed (dropped Q/DQ pairs, unused tensors)."""

    config: EncoderConfig
    embeddings: Embeddings
    layers: tuple[Layer, ...]
    head: Head
    tokenizer: str | None = None  # the text of tokenizer.json
    notes: tuple[str, ...] = ()

    @property
    def stored_hidden(self) -> int:
        """Channels of the residual stream in the arrays: `config.hidden_size`, or more once padded (`codegen/pad.py`)."""
        return int(self.embeddings.word.shape[1])

    @property
    def stored_head_dim(self) -> int:
        """Channels of a head in the arrays: `config.head_dim`, or more."""
        linears = self.linears()
        return len(linears[0].bias) // self.config.num_heads if linears else self.config.head_dim

    @property
    def quantized(self) -> bool:
        """Whether every encoder Linear is s8, and its input's quantisation and every attention scale is known."""
        return all(linear.quantized and linear.input is not None for linear in self.linears()) and all(
            layer.attention.query_scale is not None for layer in self.layers
        )

    def map_linears(self, change: Callable[[Linear], Linear]) -> EncoderModel:
        """Return the model with `change` applied to each of the encoder's Linears; the head's are not among them."""

        def layer(old: Layer) -> Layer:
            query, key, value, output = map(
                change, (old.attention.query, old.attention.key, old.attention.value, old.attention.output)
            )
            attention = replace(old.attention, query=query, key=key, value=value, output=output)
            return replace(old, attention=attention, up=change(old.up), down=change(old.down))

        return replace(self, layers=tuple(map(layer, self.layers)))

    def linears(self) -> tuple[Linear, ...]:
        """The encoder's Linears in the order in which data passes through them; the head's are not among them."""
        return tuple(
            linear
            for layer in self.layers
            for linear in (
                layer.attention.query,
                layer.attention.key,
                layer.attention.value,
                layer.attention.output,
                layer.up,
                layer.down,
            )
        )
