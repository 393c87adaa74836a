"""Tiny BERT-like models with random weights: Hugging Face models and directories, and ONNX files exported from them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

VOCAB, HIDDEN, WIDE, HEADS, LAYERS, POSITIONS, LABELS = 50, 32, 64, 4, 2, 32, 3
WORDS = [f"w{i}" for i in range(VOCAB - 1)]


def build(name: str, seed: int = 0, **settings: object) -> torch.nn.Module:
    """The transformers class `name` of a supported family with weights large enough that every part matters."""
    if name.startswith("Distil"):
        sizes = {"dim": HIDDEN, "hidden_dim": WIDE, "n_heads": HEADS, "n_layers": LAYERS}
        kind = transformers.DistilBertConfig
    else:
        sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": HEADS}
        sizes["num_hidden_layers"] = LAYERS
        kind = getattr(transformers, f"{name.partition('For')[0].removesuffix('Model')}Config")
    positions = POSITIONS + 2 * ("Roberta" in name)  # the first two rows are not for tokens
    config = kind(vocab_size=VOCAB, max_position_embeddings=positions, attn_implementation="eager", **(sizes | settings))
    if "Classification" in name and "id2label" not in settings and "num_labels" not in settings:
        config.num_labels = LABELS
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save(model: torch.nn.Module, path: Path) -> Path:
    """Write `model` as a Hugging Face directory with a tokenizer of one id per word."""
    model.save_pretrained(path)
    vocabulary = {"[UNK]": 0} | {word: i + 1 for i, word in enumerate(WORDS)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts of 1 to 20 known words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 21))) for _ in range(count)]


def sequences(*lengths: int, seed: int = 0) -> list[NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, length) for length in lengths]


class Named(torch.nn.Module):
    """Calls a model by keyword, which the exporter does not."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model(**dict(zip(self.names, arguments, strict=True))).to_tuple()


def export(model: torch.nn.Module, path: Path, outputs: Sequence[str], opset: int = 17, types: bool = False) -> Path:
    """Export `model` as an ONNX file with dynamic batch and length; with token types if `types`."""
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    arguments = tuple(torch.ones(2, 7, dtype=torch.long) for _ in names)
    axes = {name: {0: "batch", 1: "length"} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Named(model, names), arguments, path, input_names=names, output_names=list(outputs), dynamic_axes=axes,
            opset_version=opset, dynamo=False,
        )  # fmt: skip
    return path


def quantize(path: Path, output: Path, per_channel: bool = True, activations: QuantType = QuantType.QUInt8) -> Path:
    """Quantise an exported encoder to QDQ with ONNX Runtime, every MatMul and the values around it."""
    names = [i.name for i in onnx.load(path).graph.input]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(sequences(*[9] * 16))

        def get_next(self) -> dict[str, NDArray[np.int64]] | None:
            ids = next(self.batches, None)
            if ids is None:
                return None
            feed = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
            return {name: feed.get(name, np.zeros((1, len(ids)), np.int64)) for name in names}

    quantize_static(
        path, output, Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel, activation_type=activations,
        weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gather", "LayerNormalization"],
    )  # fmt: skip
    return output
