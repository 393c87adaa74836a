"""Random-weight encoders of published sizes with exactly pruned blocks, as Hugging Face directories."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks import assets
from tilewright.pipeline.quantize import quantize


@dataclass(frozen=True)
class Size:
    """An encoder's sizes; `family` is the transformers class prefix."""

    family: str
    layers: int
    hidden: int
    heads: int
    intermediate: int


SIZES = {
    "distilbert": Size("DistilBert", 6, 768, 12, 3072),
    "bert-base": Size("Bert", 12, 768, 12, 3072),
    "minilm-l6": Size("Bert", 6, 384, 12, 1536),
}


def build(size: Size, block: tuple[int, int], sparsity: float, directory: Path) -> Path:
    """Write a question-answering model with random weights and exactly `sparsity` zero blocks in every encoder Linear."""
    torch.manual_seed(0)
    if size.family == "DistilBert":
        config = transformers.DistilBertConfig(
            n_layers=size.layers, dim=size.hidden, n_heads=size.heads, hidden_dim=size.intermediate
        )
    else:
        config = transformers.BertConfig(
            num_hidden_layers=size.layers,
            hidden_size=size.hidden,
            num_attention_heads=size.heads,
            intermediate_size=size.intermediate,
        )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{size.family}ForQuestionAnswering")(config).eval()
    random = np.random.default_rng(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "qa_outputs" not in name:
                module.weight.mul_(torch.from_numpy(_mask(module.weight.shape, block, sparsity, random)))
    model.save_pretrained(directory)
    shutil.copyfile(assets.minilm() / "tokenizer.json", directory / "tokenizer.json")
    return directory


def _mask(shape: tuple[int, ...], block: tuple[int, int], sparsity: float, random: np.random.Generator) -> np.ndarray:
    rows, columns = shape[0] // block[0], shape[1] // block[1]
    keep = np.zeros(rows * columns, np.float32)
    keep[random.permutation(rows * columns)[: round(rows * columns * (1 - sparsity))]] = 1
    return np.kron(keep.reshape(rows, columns), np.ones(block, np.float32))


def quantized(directory: Path, output: Path) -> Path:
    """The model quantised on 32 SQuAD sentences."""
    return quantize(directory, assets.squad_sentences(32), output)
