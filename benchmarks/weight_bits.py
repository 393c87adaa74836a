"""What `quantize --weight-bits 7` gains without VNNI, and what it costs in accuracy: MiniLM and the real DistilBERT tagger.

    python -m benchmarks.weight_bits                     # level avx2, all questions of SQuAD's development set
    python -m benchmarks.weight_bits --questions 1000 --sentences 100 --level avx512 --json

Both models are float here (the tagger's INT8 weights are multiplied out) and are quantised on SQuAD's training texts with
weights of 8 and of 7 bits, per output channel. Answers: recall@10 of MiniLM finding each question's paragraph among all of the
file, and the share of the tagger's tokens on which it agrees with the float one. Times: 1 x 128 tokens, one thread, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import tilewright
from benchmarks import assets
from benchmarks.machine import machine
from benchmarks.saturation import dequantized
from tilewright.baseline import time_in_turns
from tilewright.codegen.model import EncoderModel
from tilewright.commands.output import print_json, stderr, stdout, table
from tilewright.frontend import load
from tilewright.frontend.reference import forward
from tilewright.measure import random_ids
from tilewright.pipeline import quantize
from tilewright.pipeline.evaluation import evaluate
from tilewright.pipeline.quantize import WEIGHT_BITS
from tilewright.pipeline.recipe.steps import spread
from tilewright.pipeline.tasks import TASKS
from tilewright.pipeline.tasks.base import TextSettings

TOKENS, SECONDS, TEXTS = 128, 6.0, 256


@dataclass(frozen=True)
class Row:
    """Accuracy of a model with weights of so many bits; ratio: of its time to that with 8 bits, the median of turns."""

    model: str
    bits: int
    metric: str
    accuracy: float
    milliseconds: float
    ratio: float


def recall(artifact: Path, questions: int) -> float:
    """recall@10 of an embedder, from its artifact."""
    task = TASKS["embedding"]
    records = spread(task.read(assets.squad_dev()), questions)
    return evaluate(task, artifact, records, TextSettings(max_length=256)).metrics["recall_at_10"]


def agreement(artifact: Path, real: EncoderModel, sentences: list[str]) -> float:
    """Share of tokens for which the tagger in `artifact` and the float one name the same tag."""
    engine, same = tilewright.load(artifact), []
    for sentence in sentences:
        inputs = engine.tokenize([sentence])
        expected = forward(real, [inputs["input_ids"][0].astype(np.int64)])[0]["logits"]
        same.append(engine(**inputs)["logits"][0].argmax(-1) == expected.argmax(-1))
    return float(np.concatenate(same).mean())


def compare(name: str, real: EncoderModel, metric: str, level: str, judge: Callable[[Path], float], scratch: Path) -> list[Row]:
    artifacts = {}
    for bits in WEIGHT_BITS:
        checkpoint = quantize(real, assets.squad_contexts(TEXTS), scratch / f"{name}-{bits}", weight_bits=bits)
        artifacts[bits] = tilewright.compile(checkpoint, level, scratch / f"{name}-{bits}.tw").path
    engines = {bits: tilewright.load(path, num_threads=1) for bits, path in artifacts.items()}
    ids = random_ids(real.config.vocab_size, 1, TOKENS)
    samples = time_in_turns({str(bits): lambda e=engine: e(input_ids=ids) for bits, engine in engines.items()}, SECONDS)
    rows = []
    for bits, path in artifacts.items():
        times = samples[str(bits)]
        ratio = statistics.median(own / eight for own, eight in zip(times, samples["8"], strict=False))
        rows.append(Row(name, bits, metric, judge(path), statistics.median(times) * 1e3, ratio))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=("avx2", "avx512", "avx512vnni"), default="avx2")
    parser.add_argument("--questions", type=int, default=10_570)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    tagger, sentences = dequantized(load(assets.distilbert_qdq())), assets.squad_sentences(options.sentences)
    with tempfile.TemporaryDirectory() as scratch, stderr().status("quantising, compiling, answering ..."):
        rows = [
            *compare(
                "minilm", load(assets.minilm()), "recall@10", options.level,
                lambda path: recall(path, options.questions), Path(scratch),
            ),
            *compare(
                "tagger", tagger, "agreement with float", options.level,
                lambda path: agreement(path, tagger, sentences), Path(scratch),
            ),
        ]  # fmt: skip
    if options.json:
        print_json({"machine": machine(), "level": options.level, "rows": [asdict(row) for row in rows]})
        return
    grid = table(f"level {options.level}", "bits", "metric", "accuracy", f"1x{TOKENS} ms", "time / 8 bits")
    for row in rows:
        cells = (str(row.bits), row.metric, f"{row.accuracy:.2%}", f"{row.milliseconds:.2f}", f"{row.ratio:.3f}")
        grid.add_row(row.model, *cells)
    stdout().print(grid)


if __name__ == "__main__":
    main()
