"""The parts of a transformers encoder (BERT, DistilBERT; with or without a head) that pruning and distillation work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from tilewright.errors import UnsupportedModel
from tilewright.frontend.families import FAMILIES
from tilewright.frontend.family import Family

LINEARS = ("query", "key", "value", "output", "up", "down")
"""The linears of an encoder layer, in the order in which data passes through them; these are pruned and quantised."""


@dataclass(frozen=True)
class LayerModules:
    """The modules of one encoder layer, which normalises after each residual sum."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    attention_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    output_norm: nn.LayerNorm
    activation: nn.Module
    num_heads: int

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Context of the attention over x f32[batch, tokens, channels]; mask bool[batch, tokens] is true at tokens."""
        query, key, value = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        where = None if bool(mask.all()) else mask[:, None, None]
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=where).transpose(1, 2).flatten(2)

    def inner(self, x: Tensor) -> Tensor:
        """Activations of the feed-forward part, which `down` takes."""
        return cast(Tensor, self.activation(self.up(x)))


@dataclass(frozen=True)
class EncoderModules:
    """The embeddings and layers of an encoder; `linears` has the linears of all layers by their names in the model."""

    embeddings: nn.Module
    layers: tuple[LayerModules, ...]
    linears: Mapping[str, nn.Linear]


def encoder_modules(model: nn.Module) -> EncoderModules:
    """Find the parts of a transformers `model`; raises UnsupportedModel for an architecture that is not in `FAMILIES`."""
    config = cast(Any, model).config
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(f"architecture {config.model_type} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[config.model_type]
    names = dict(model.named_modules())
    bare = family.embeddings_norm in names
    prefix = "" if bare else family.prefix
    settings = family.settings
    linears: dict[str, nn.Linear] = {}
    layers = []
    for index in range(getattr(config, settings.num_layers)):
        start = prefix + family.layer.format(index)
        found = {part: start + getattr(family, part) for part in (*LINEARS, "attention_norm", "output_norm")}
        linears |= {found[part]: cast(nn.Linear, names[found[part]]) for part in LINEARS}
        layers.append(
            LayerModules(
                **cast(Any, {part: names[name] for part, name in found.items()}),
                activation=ACT2FN[getattr(config, settings.activation)],
                num_heads=getattr(config, settings.num_heads),
            )
        )
    return EncoderModules(names[prefix + _embeddings(family)], tuple(layers), linears)


def _embeddings(family: Family) -> str:
    return family.embeddings_norm.rpartition(".")[0]
