"""What a family of Hugging Face encoders calls its tensors and its settings: one `Family` table per architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tilewright.codegen.model import Activation, HeadKind

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Names of activation functions in config.json."""


@dataclass(frozen=True)
class HeadNames:
    """Modules of a head, and patterns (fnmatch) of tensors that belong to the class but take no part in its outputs."""

    kind: HeadKind
    projection: str | None = None
    pre: str | None = None
    pre_activation: Literal["tanh", "relu"] | None = None
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Keys of config.json; `layer_norm_eps` is None where the architecture fixes it at 1e-12."""

    hidden_size: str
    num_heads: str
    num_layers: str
    intermediate_size: str
    activation: str
    layer_norm_eps: str | None
    token_types: str | None


@dataclass(frozen=True)
class Family:
    """Modules are named without `prefix`, which a model with a head puts before those of its encoder.

    The modules of an encoder layer are relative to `layer`, whose `{}` is the number of the layer. `heads` maps the
    class in config.json's `architectures` to its head; its first entry is the bare encoder. `first_position` is the row of the
    position table that the first token takes; where it is not 0, the row before it is that of padding, whose id is the same.
    """

    model_type: str
    prefix: str
    settings: Settings
    word: str
    position: str
    token_type: str | None
    embeddings_norm: str
    layer: str
    attention: str  # owns q_scale, k_scale and v_scale in a quantised checkpoint
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    output_norm: str
    heads: Mapping[str, HeadNames]
    unused: tuple[str, ...] = ()
    first_position: int = 0
