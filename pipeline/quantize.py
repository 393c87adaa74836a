"""Static post-training quantisation: a float encoder and calibration texts to an int-quantized checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.codegen.block_sparse import detect_block
from tilewright.codegen.model import EncoderModel, Layer, Linear, Quantization
from tilewright.errors import InvalidInput
from tilewright.frontend import load
from tilewright.pipeline.calibration import Method, Progress, Range, Text, asymmetric, calibrate, symmetric
from tilewright.pipeline.checkpoint import write_checkpoint
from tilewright.pipeline.disk import scratch_directory
from tilewright.pipeline.provenance import append_step
from tilewright.pipeline.torch_checkpoint import is_torch_directory, load_torch_directory

METHODS: tuple[Method, ...] = ("minmax", "percentile")

WEIGHT_BITS = (8, 7)
"""Bits of a weight, which is stored as s8 in any case. With 7, more products of bytes fit the sums of 16 bits with which CPUs
without VNNI are fast (`codegen/budget.py`)."""


def quantize(
    model: str | PathLike[str] | EncoderModel,
    texts: Sequence[Text],
    output: str | PathLike[str],
    method: Method = "minmax",
    percentile: float = 99.999,
    max_length: int = 128,
    progress: Progress = lambda done, total: None,
    weight_bits: int = 8,
    self_check: bool | None = None,
) -> Path:
    """Quantise a float `model` on `texts` into the new directory `output`, which `tilewright.frontend.load` reads.

    Weights become s8 per output channel (of 7 `weight_bits` -63..63), inputs of Linears u8 and query, key and value s8, per
    tensor, with ranges seen on `texts` cut to `max_length` tokens. `output` appears only when complete, with provenance.json on
    how it was made.

    The default percentile spares the few outlier channels of BERT's LayerNorms: 99.99 costs MiniLM 0.07 of its
    embeddings' cosine to float.

    self_check: run the float model beside what it was read from and refuse differences; for a Hugging Face directory, which
    is run by transformers, only if asked to, for an ONNX graph unless told not to.

    Raises InvalidInput for options, texts or an output that cannot be used, and what `load` raises.
    """
    texts = [text for text in texts if "".join(text).strip()]
    _check_options(texts, method, percentile, max_length, weight_bits)
    target = Path(output)
    if target.exists():
        raise InvalidInput(f"output {target} exists; remove it or choose another")
    if isinstance(model, EncoderModel):
        source = model
    elif is_torch_directory(Path(model)):
        source = load_torch_directory(Path(model))
    else:
        source = load(model, self_check is not False)
    if any(linear.input is not None for linear in source.linears()):
        raise InvalidInput("the model is quantised already; give the float checkpoint it was made from")
    if self_check and not isinstance(model, EncoderModel) and Path(model).is_dir():
        from tilewright.pipeline.self_check import check_against_transformers  # transformers takes seconds to import

        check_against_transformers(source, Path(model))
    with scratch_directory(target) as scratch:
        ranges = calibrate(source, texts, method, percentile, max_length, progress)
        result = apply_ranges(source, ranges, weight_bits)
        write_checkpoint(result, scratch)
        settings: dict[str, Any] = {"method": method, "percentile": percentile, "max_length": max_length, "texts": len(texts)}
        settings["weight_bits"] = weight_bits
        if method == "minmax":
            del settings["percentile"]
        settings["texts_sha256"] = hashlib.sha256("\n".join(map("".join, texts)).encode()).hexdigest()
        given = {"model": fingerprint(source)}
        append_step("quantize", settings, None if isinstance(model, EncoderModel) else Path(model), scratch, given)
    return target


def apply_ranges(model: EncoderModel, ranges: Mapping[str, Range], weight_bits: int = 8) -> EncoderModel:
    """Quantise the encoder of a float `model` with activation `ranges` as `calibrate` returns them."""
    layers = tuple(_layer(layer, index, ranges, weight_bits) for index, layer in enumerate(model.layers))
    return replace(model, layers=layers)


def quantize_linear(linear: Linear, activation: Quantization, weight_bits: int = 8) -> Linear:
    """Quantise the weight of `linear` to s8 per output channel, symmetric, rounding to nearest even.

    One that is s8 already stays as it is, unless it has more bits.
    """
    most = 2 ** (weight_bits - 1) - 1
    if linear.quantized and np.abs(linear.weight.astype(np.int16)).max() <= most:
        return replace(linear, input=activation)
    linear = replace(linear, weight=linear.real_weight)
    largest = np.abs(linear.weight).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(most), np.float32(1)).astype(np.float32)
    weight = np.clip(np.rint(linear.weight / scale[:, None]), -most, most).astype(np.int8)
    return replace(linear, weight=weight, scale=scale, input=activation, block=detect_block(weight))


def _layer(layer: Layer, index: int, ranges: Mapping[str, Range], bits: int) -> Layer:
    attention = layer.attention
    shared, context, up, down = (asymmetric(ranges[f"{index}.{name}.input"]) for name in ("attention", "output", "up", "down"))
    return replace(
        layer,
        attention=replace(
            attention,
            query=quantize_linear(attention.query, shared, bits),
            key=quantize_linear(attention.key, shared, bits),
            value=quantize_linear(attention.value, shared, bits),
            output=quantize_linear(attention.output, context, bits),
            query_scale=symmetric(ranges[f"{index}.query"]),
            key_scale=symmetric(ranges[f"{index}.key"]),
            value_scale=symmetric(ranges[f"{index}.value"]),
        ),
        up=quantize_linear(layer.up, up, bits),
        down=quantize_linear(layer.down, down, bits),
    )


def _check_options(texts: Sequence[Text], method: str, percentile: float, max_length: int, weight_bits: int) -> None:
    if not texts:
        raise InvalidInput("no calibration text given; a few hundred sentences like those of the application work well")
    if method not in METHODS:
        raise InvalidInput(f"calibration method {method} is unknown; choose one of {', '.join(METHODS)}")
    if not 50 < percentile <= 100:
        raise InvalidInput(f"percentile is {percentile}; choose one above 50, up to 100, such as 99.999")
    if max_length < 1:
        raise InvalidInput(f"max_length is {max_length}; it is a number of tokens, at least 1")
    if weight_bits not in WEIGHT_BITS:
        raise InvalidInput(f"weight_bits is {weight_bits}; choose one of {', '.join(map(str, WEIGHT_BITS))}")


def fingerprint(model: EncoderModel) -> str:
    """sha256 over the encoder's weights, for a model that is in memory only."""
    digest = hashlib.sha256()
    for linear in model.linears():
        digest.update(np.ascontiguousarray(linear.weight).tobytes())
    return digest.hexdigest()
