"""Writing a quantised `EncoderModel` as a Hugging Face directory in the compressed-tensors `int-quantized` format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tilewright.codegen.model import EncoderModel, Layer, LayerNorm, Linear
from tilewright.errors import UnsupportedModel
from tilewright.frontend.bert import BERT
from tilewright.frontend.compressed import FORMAT, PACKED_FORMAT, QUANT_METHOD
from tilewright.frontend.families import FAMILIES
from tilewright.frontend.family import ACTIVATIONS, Family, HeadNames
from tilewright.frontend.packed import pack_weight
from tilewright.frontend.sentence_transformers import write_embedding

Tensors = dict[str, NDArray[Any]]

SPARSITY = "sparsity.json"
"""For whoever loads the weights elsewhere, where nothing else says how they are sparse; the frontend looks at the weights."""


def write_checkpoint(model: EncoderModel, path: Path, packed: bool = False) -> None:
    """Write config.json, model.safetensors, sparsity.json and tokenizer.json of a quantised `model` into the directory `path`.

    `packed` stores only the non-zero blocks of sparse weights, and the word embeddings as s8 with a scale for each word.

    Raises UnsupportedModel for a head or LayerNorm that the architecture's config.json cannot express.
    """
    model, family = _expressible(model)
    (path / "config.json").write_text(json.dumps(_config(model, family, packed), indent=2) + "\n", encoding="utf-8")
    save_file(_tensors(model, family, packed), path / "model.safetensors", metadata={"format": "pt"})
    (path / SPARSITY).write_text(json.dumps(_sparsity(model), indent=2) + "\n", encoding="utf-8")
    write_embedding(model, path)
    if model.tokenizer is not None:
        (path / "tokenizer.json").write_text(model.tokenizer, encoding="utf-8")


def _sparsity(model: EncoderModel) -> dict[str, Any]:
    """Block [outputs, inputs] and share of weights that are not zero, by linear; block is null where none was found."""
    return {
        linear.name: {
            "block": list(linear.block) if linear.block else None,
            "density": float(np.count_nonzero(linear.weight) / linear.weight.size),
        }
        for linear in model.linears()
    }


def _expressible(model: EncoderModel) -> tuple[EncoderModel, Family]:
    """`model` and a family whose config.json can say what it is.

    What was read from a graph without token types passes for a DistilBERT. Where its head or eps is none of DistilBERT's, it is
    a BERT, with one token type that adds nothing.
    """
    family = FAMILIES[model.config.architecture]
    try:
        _check_expressible(model, family)
    except UnsupportedModel:
        if model.embeddings.token_type is not None:
            raise
        types = np.zeros((1, model.config.hidden_size), np.float32)
        config, embeddings = replace(model.config, architecture=BERT.model_type), replace(model.embeddings, token_type=types)
        model, family = replace(model, config=config, embeddings=embeddings), BERT
        _check_expressible(model, family)
    return model, family


def _check_expressible(model: EncoderModel, family: Family) -> None:
    head = _head_names(model, family)
    if (model.head.pre is None, model.head.pre_activation) != (head.pre is None, head.pre_activation):
        raise UnsupportedModel(f"{family.model_type} cannot store this {head.kind} head; quantise the Hugging Face checkpoint")
    norms = [model.embeddings.norm, *(n for layer in model.layers for n in (layer.attention_norm, layer.output_norm))]
    found = {float(np.float32(norm.eps)) for norm in norms}
    if len(found) > 1 or not (family.settings.layer_norm_eps or found == {float(np.float32(1e-12))}):
        raise UnsupportedModel(f"{family.model_type} cannot store LayerNorm eps {sorted(found)}; supported: 1e-12")


def _head_names(model: EncoderModel, family: Family) -> HeadNames:
    return next(head for head in family.heads.values() if head.kind == model.head.kind)


def _config(model: EncoderModel, family: Family, packed: bool) -> dict[str, Any]:
    config, keys = model.config, family.settings
    settings: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [next(name for name, head in family.heads.items() if head.kind == model.head.kind)],
        keys.hidden_size: config.hidden_size,
        keys.num_heads: config.num_heads,
        keys.num_layers: len(model.layers),
        keys.intermediate_size: config.intermediate_size,
        keys.activation: next(name for name, kind in ACTIVATIONS.items() if kind == config.activation),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions + family.first_position,
        "quantization_config": quantization_config(list(_head_linears(model, family)), PACKED_FORMAT if packed else FORMAT),
    }
    if keys.layer_norm_eps:
        settings[keys.layer_norm_eps] = model.embeddings.norm.eps
    if keys.token_types and model.embeddings.token_type is not None:
        settings[keys.token_types] = len(model.embeddings.token_type)
    if model.head.problem is not None:
        settings["problem_type"] = model.head.problem
    labels = config.labels
    if not labels and model.head.projection is not None and model.head.kind != "question_answering":
        # an ONNX file need not name them, but their number must be stated: transformers takes it to be two elsewise
        labels = tuple(f"LABEL_{i}" for i in range(len(model.head.projection.bias)))
    if labels:
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    return settings


def quantization_config(ignore: list[str], form: str = FORMAT) -> dict[str, Any]:
    """Return the `quantization_config` of s8 weights per channel and static 8-bit activations per tensor."""
    integer = {"num_bits": 8, "type": "int"}
    return {
        "quant_method": QUANT_METHOD,
        "format": form,
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**integer, "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {**integer, "symmetric": False, "strategy": "tensor", "dynamic": False},
            }
        },
        # the s8 scales of key and value; the query's scale lies beside them
        "kv_cache_scheme": {**integer, "symmetric": True, "strategy": "tensor", "dynamic": False},
    }


def _head_linears(model: EncoderModel, family: Family) -> dict[str, Linear]:
    names, head = _head_names(model, family), model.head
    named = ((names.pre, head.pre), (names.projection, head.projection))
    return {name: linear for name, linear in named if name is not None and linear is not None}


def _tensors(model: EncoderModel, family: Family, packed: bool) -> Tensors:
    embeddings = model.embeddings
    tensors: Tensors = {
        **(_quantized_rows(family.word, embeddings.word) if packed else {f"{family.word}.weight": embeddings.word}),
        f"{family.position}.weight": np.pad(embeddings.position, ((family.first_position, 0), (0, 0))),
        **_norm(family.embeddings_norm, embeddings.norm),
    }
    if family.token_type and embeddings.token_type is not None:
        tensors[f"{family.token_type}.weight"] = embeddings.token_type
    for index, layer in enumerate(model.layers):
        tensors |= _layer(family, family.layer.format(index), layer, packed)
    # a model with a head keeps its encoder under a prefix, the bare encoder does not
    if model.head.kind != "none":
        tensors = {family.prefix + name: tensor for name, tensor in tensors.items()}
    for name, linear in _head_linears(model, family).items():
        tensors |= {f"{name}.weight": linear.weight, f"{name}.bias": linear.bias}
    return tensors


def _layer(family: Family, prefix: str, layer: Layer, packed: bool) -> Tensors:
    attention = layer.attention
    linears: Mapping[str, Linear] = {
        family.query: attention.query,
        family.key: attention.key,
        family.value: attention.value,
        family.output: attention.output,
        family.up: layer.up,
        family.down: layer.down,
    }
    tensors: Tensors = {}
    for name, linear in linears.items():
        tensors |= _linear(prefix + name, linear, packed)
    for operand, scale in zip("qkv", (attention.query_scale, attention.key_scale, attention.value_scale), strict=True):
        tensors[f"{prefix}{family.attention}.{operand}_scale"] = np.array([scale], np.float32)
    tensors |= _norm(prefix + family.attention_norm, layer.attention_norm)
    return tensors | _norm(prefix + family.output_norm, layer.output_norm)


def _linear(name: str, linear: Linear, packed: bool) -> Tensors:
    assert linear.scale is not None and linear.input is not None
    weight: Tensors = {f"{name}.weight": linear.weight}
    if packed and linear.block is not None:
        blocks, bits = pack_weight(linear.weight.astype(np.int8), linear.block)
        weight = {f"{name}.weight_blocks": blocks, f"{name}.weight_bitmask": bits}
    return weight | {
        f"{name}.bias": linear.bias,
        f"{name}.weight_scale": linear.scale[:, None],
        f"{name}.input_scale": np.array([linear.input.scale], np.float32),
        f"{name}.input_zero_point": np.array([linear.input.zero_point - 128], np.int8),
    }


def _quantized_rows(name: str, table: NDArray[Any]) -> Tensors:
    """Rows of an embedding as s8, symmetric, rounded to nearest even, beside a scale for each."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return {f"{name}.weight": np.rint(table / scale).astype(np.int8), f"{name}.weight_scale": scale}


def _norm(name: str, norm: LayerNorm) -> Tensors:
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
