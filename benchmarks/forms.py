"""Random-weight models in every form that an engine wants, made once and kept in `.bench/models`.

The folder's name says which model, sparsity and block; remove it to have its forms made anew. Our own artifact alone is
made in every run, since the compiler is what is measured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import tilewright
from benchmarks import assets, exports, models
from benchmarks.peers.table import ROOT, WORK, Block, environment_python

_TEXTS, _TOKENS = 32, 128  # calibration, the same for all


class FormError(Exception):
    """A form could not be made; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """A model of `models.SIZES`, and the share and shape of its zero blocks."""

    model: str
    sparsity: float
    block: Block

    @property
    def directory(self) -> Path:
        """Where its forms are kept; without zeros the block makes no difference."""
        blocks = f"{self.sparsity:.0%}-{self.block[0]}x{self.block[1]}" if self.sparsity else "dense"
        return WORK / "models" / f"{self.model}-{blocks}"

    def form(self, name: str) -> Path:
        """Path of the form `name`, made if it is not there. Raises FormError where a peer's tool fails."""
        target = self.directory / name
        if not target.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            scratch = target.with_name(f".{os.getpid()}-{name}")
            try:
                FORMS[name](self, scratch)
                scratch.rename(target)
            finally:
                if scratch.exists():
                    shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()
        return target


def compiled(checkpoint: Checkpoint, form: str, directory: Path) -> Path:
    """Our artifact as the new directory `directory`/`form`, where `form` is LEVEL.tw."""
    return tilewright.compile(checkpoint.form("int8"), form.removesuffix(".tw"), directory / form).path


def _float(checkpoint: Checkpoint, target: Path) -> None:
    """A Hugging Face directory, with inputs to calibrate on beside the weights."""
    models.build(models.SIZES[checkpoint.model], checkpoint.block, checkpoint.sparsity, target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    tokenizer.enable_truncation(_TOKENS)
    tokenizer.enable_padding(length=_TOKENS)
    found = tokenizer.encode_batch(assets.squad_sentences(_TEXTS))
    arrays = {"input_ids": [item.ids for item in found], "attention_mask": [item.attention_mask for item in found]}
    np.savez(target / "calibration.npz", **arrays)


def _int8(checkpoint: Checkpoint, target: Path) -> None:
    models.quantized(checkpoint.form("float"), target)


def _plain(checkpoint: Checkpoint, target: Path) -> None:
    exports.export(checkpoint.form("float"), target, exports.QUESTION_ANSWERING)


def _fused(checkpoint: Checkpoint, target: Path) -> None:
    size = models.SIZES[checkpoint.model]
    exports.fuse_attention(checkpoint.form("plain.onnx"), target, size.heads, size.hidden)


def _dynamic(checkpoint: Checkpoint, target: Path) -> None:
    exports.quantize_dynamic(checkpoint.form("fused.onnx"), target)


def _qdq(checkpoint: Checkpoint, target: Path) -> None:
    feeds = _feeds(checkpoint)
    exports.quantize_static(checkpoint.form("plain.onnx"), target, feeds, per_channel=True, float_weights=False)


def _qat(checkpoint: Checkpoint, target: Path) -> None:
    """SparseML's transforms know weights that are quantised per tensor, in the graph itself."""
    feeds = _feeds(checkpoint)
    exports.quantize_static(checkpoint.form("plain.onnx"), target, feeds, per_channel=False, float_weights=True)


def _feeds(checkpoint: Checkpoint) -> Iterator[Mapping[str, NDArray[Any]]]:
    with np.load(checkpoint.form("float") / "calibration.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return ({name: array[i : i + 1] for name, array in arrays.items()} for i in range(_TEXTS))


def _converted(environment: str, source: str) -> Callable[[Checkpoint, Path], None]:
    """A form made by `benchmarks.peers.convert` in a peer's environment."""

    def make(checkpoint: Checkpoint, target: Path) -> None:
        command = [environment_python(environment), "-m", "benchmarks.peers.convert", environment]
        command += [checkpoint.form(source), target]
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            raise FormError(f"{environment} cannot convert {source}: {last}")

    return make


FORMS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "float": _float,
    "int8": _int8,
    "plain.onnx": _plain,
    "fused.onnx": _fused,
    "dynamic.onnx": _dynamic,
    "qdq.onnx": _qdq,
    "qat.onnx": _qat,
    "deepsparse.onnx": _converted("deepsparse", "qat.onnx"),
    "openvino": _converted("openvino", "plain.onnx"),
}
