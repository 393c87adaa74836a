"""The quickstart: two real models quantised, compiled for this CPU, run on real text and set beside ONNX Runtime.

    python -m benchmarks.quickstart [--json PATH] [--output DIR]

- A DistilBERT tagger that comes as INT8 (static QDQ ONNX): both engines run the same file's arithmetic.
- all-MiniLM-L6-v2 in float32: quantised here on SQuAD's training texts, then judged on its development set against the
  float model in ONNX Runtime; and beside it the same model with 80 % of its (4, 1) blocks pruned, distilled and quantised,
  which this repository ships in models/minilm-l6-80-4x1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tilewright
from benchmarks import assets, exports
from tilewright.baseline import OnnxRuntime, time_in_turns
from tilewright.commands.output import stdout, table
from tilewright.errors import TilewrightError
from tilewright.measure import summarize
from tilewright.pipeline import quantize

ROOT = Path(__file__).parent.parent
SPARSE = ROOT / "models" / "minilm-l6-80-4x1"
SENTENCES, QUESTIONS, CALIBRATION = 200, 200, 256
BATCH = 16
SEQ_LEN, SECONDS = 128, 4.0
MISTAKE = "He have a dog and they walk to school with there cat ."  # every word is one token

Array = NDArray[Any]
Run = Callable[..., dict[str, Array]]
Embed = Callable[[list[str]], Array]

console = stdout()
seconds: dict[str, float] = {}


@contextmanager
def step(name: str) -> Iterator[None]:
    """Show that `name` is under way, then how long it took."""
    start = time.perf_counter()
    with console.status(f"{name} ..."):
        yield
    seconds[name] = time.perf_counter() - start
    console.print(f"{name} [dim]({seconds[name]:.1f} s)[/dim]")


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantise, compile and run two real models beside ONNX Runtime.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quickstart", help="where models and artifacts go")
    parser.add_argument("--json", type=Path, help="file to write all results to")
    options = parser.parse_args()
    try:
        results = quickstart(options.output)
    except TilewrightError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def quickstart(output: Path) -> dict[str, Any]:
    """Run everything in the directory `output`; returns the figures that are printed."""
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    with step("fetch the models and SQuAD"):
        tagger_file, minilm = assets.distilbert_qdq(), assets.minilm()
        sentences, questions = assets.squad_sentences(SENTENCES), assets.squad_questions(QUESTIONS)
        calibration = assets.squad_contexts(CALIBRATION)
    quantized = quantize_minilm(minilm, calibration, output / "minilm-int8")
    with step("export MiniLM to ONNX, float32 and dynamic INT8, for ONNX Runtime"):
        float_file = exports.export(minilm, output / "minilm.onnx")
        dynamic_file = exports.quantize_dynamic(float_file, output / "minilm-dynamic.onnx")
    with step("compile DistilBERT for this CPU"):
        tagger = tilewright.load(tilewright.compile(tagger_file, output=output / "distilbert.tw").path, num_threads=1)
    with step("compile MiniLM for this CPU"):
        embedder = tilewright.load(tilewright.compile(quantized, output=output / "minilm.tw").path, num_threads=1)
    with step("compile MiniLM, 80 % sparse, for this CPU"):
        sparse = tilewright.load(tilewright.compile(SPARSE, output=output / "minilm-sparse.tw").path, num_threads=1)
    reference, real, dynamic = (OnnxRuntime(path, threads=1) for path in (tagger_file, float_file, dynamic_file))
    exact = OnnxRuntime(tagger_file, threads=1, unfused=True)
    with step(f"tag {SENTENCES} sentences with both engines"):
        tagging = compare_tags(tagger, exact, sentences)
    with step(f"embed {SENTENCES} sentences and answer {QUESTIONS} questions with each form of MiniLM"):
        embedding = compare_embeddings({"dense INT8": embedder, "sparse INT8": sparse}, real, sentences, questions)
    with step(f"time 1 x {SEQ_LEN} tokens on one thread, the engines in turns"):
        latency = {
            "DistilBERT": time_engines({"tilewright": tagger, "ONNX Runtime, same file": reference}),
            "MiniLM": time_engines(
                {
                    "tilewright, sparse INT8": sparse,
                    "tilewright, dense INT8": embedder,
                    "ONNX Runtime, float32": real,
                    "ONNX Runtime, dynamic INT8": dynamic,
                }
            ),
        }
    sizes = {
        "DistilBERT": {"source": size(tagger_file), "artifact": size(output / "distilbert.tw")},
        "MiniLM": {"source": size(minilm / "model.safetensors"), "artifact": size(output / "minilm.tw")},
        "MiniLM, sparse": {"source": size(SPARSE / "model.safetensors"), "artifact": size(output / "minilm-sparse.tw")},
    }
    results: dict[str, Any] = {
        "isa": tagger.level.name,
        "agreement": tagging,
        "embedding": embedding,
        "latency": latency,
        "bytes": sizes,
        "seconds": {**seconds, "total": time.perf_counter() - started},
    }
    show(results)
    show_examples(tagger, tagger_file.with_name("tag_vocab.json"), sparse, questions[QUESTIONS // 2])
    console.print(f"\nDone in {results['seconds']['total']:.0f} s. The artifacts are ready to run:", markup=False)
    place = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    command = f"tilewright run {place / 'minilm-sparse.tw'} --text 'A man is eating.' --text 'Somebody has lunch.'"
    console.print(f"  {command}", markup=False, soft_wrap=True)
    return results


def quantize_minilm(minilm: Path, texts: list[str], target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    with step(f"quantise MiniLM on {len(texts)} paragraphs of SQuAD"):
        return quantize(minilm, texts, target)


def compare_tags(ours: tilewright.Engine, theirs: Run, sentences: list[str]) -> dict[str, float]:
    """Share of tokens with the same tag, and cosine of the logits, over `sentences`."""
    runs: tuple[Run, ...] = ours, theirs
    same, cosines = [], []
    for start in range(0, len(sentences), BATCH):
        inputs = ours.tokenize(sentences[start : start + BATCH])
        valid = inputs["attention_mask"].astype(bool)
        found, expected = [run(**inputs)["logits"][valid] for run in runs]
        same.append(found.argmax(-1) == expected.argmax(-1))
        cosines.append(cosine(found, expected))
    return {"tags_equal": float(np.concatenate(same).mean()), "tag_logits_cosine": float(np.concatenate(cosines).mean())}


def compare_embeddings(
    forms: dict[str, tilewright.Engine], theirs: Run, sentences: list[str], questions: list[assets.SquadQuestion]
) -> dict[str, dict[str, float]]:
    """For each form of one model and the float one: cosine of its embeddings to float's, and the questions answered right.

    An answer is right when the context sentence nearest to the question is the one that holds it.
    """
    tokenize = next(iter(forms.values())).tokenize

    def embed_float(texts: list[str]) -> Array:
        inputs = tokenize(texts, truncate=True)
        mask = inputs["attention_mask"][..., None]
        return np.asarray((theirs(**inputs)["last_hidden_state"] * mask).sum(1) / mask.sum(1))

    def embed_with(engine: tilewright.Engine) -> Embed:
        return lambda texts: engine(**engine.tokenize(texts, truncate=True))["sentence_embedding"]

    parts = [sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH)]
    embeds = {"float32": embed_float} | {name: embed_with(engine) for name, engine in forms.items()}
    vectors = {name: np.concatenate([embed(part) for part in parts]) for name, embed in embeds.items()}
    right = {
        name: np.mean([pick(embed, question) == question.answer for question in questions]) for name, embed in embeds.items()
    }
    cosines = {name: cosine(found, vectors["float32"]) for name, found in vectors.items()}
    return {
        name: {
            "cosine": float(cosines[name].mean()),
            "cosine_least": float(cosines[name].min()),
            "answers_right": float(right[name]),
        }
        for name, found in cosines.items()
    }


def pick(embed: Embed, question: assets.SquadQuestion) -> int:
    """Index of the sentence whose embedding is nearest to the question's."""
    vectors = embed([question.question, *question.sentences])
    return int(cosine(vectors[:1], vectors[1:]).argmax())


def cosine(first: Array, second: Array) -> Array:
    """Cosine of corresponding rows."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.asarray((first * second).sum(-1) / norms)


def time_engines(engines: dict[str, Run]) -> dict[str, dict[str, float]]:
    """Latency percentiles of each engine in milliseconds, and the first one's median over its own."""
    ids = np.random.default_rng(0).integers(1000, 20000, (1, SEQ_LEN))
    samples = time_in_turns({name: lambda run=run: run(input_ids=ids) for name, run in engines.items()}, SECONDS)
    results = {name: summarize(times, 1, SEQ_LEN, 1) for name, times in samples.items()}
    ours = next(iter(results.values())).p50
    return {name: {"p50": r.p50, "p90": r.p90, "calls": r.iterations, "ratio": ours / r.p50} for name, r in results.items()}


def size(path: Path) -> int:
    """Bytes of a file or of a directory's files."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def show(results: dict[str, Any]) -> None:
    agreement = results["agreement"]
    grid = table("agreement with the reference", "tilewright", "reference")
    grid.add_row(f"DistilBERT: tokens tagged alike, {SENTENCES} sentences", f"{agreement['tags_equal']:.2%}", "")
    grid.add_row("DistilBERT: cosine of the logits", f"{agreement['tag_logits_cosine']:.4f}", "")
    console.print(grid)
    grid = table(f"MiniLM, {QUESTIONS} questions", "answer's sentence found", "cosine to float32", "the least")
    for form, row in results["embedding"].items():
        grid.add_row(form, f"{row['answers_right']:.1%}", f"{row['cosine']:.4f}", f"{row['cosine_least']:.4f}")
    console.print(grid)
    grid = table("1 x 128 tokens, 1 thread", "engine", "median ms", "p90 ms", "the first takes", left=2)
    for model, engines in results["latency"].items():
        for name, row in engines.items():
            ratio = "" if name == next(iter(engines)) else f"{row['ratio']:.2f} of it"
            grid.add_row(model, name, f"{row['p50']:.2f}", f"{row['p90']:.2f}", ratio)
    console.print(grid)
    grid = table("size", "source MB", "artifact MB")
    for model, sizes in results["bytes"].items():
        grid.add_row(model, *(f"{sizes[key] / 1e6:.1f}" for key in ("source", "artifact")))
    console.print(grid)


def show_examples(
    tagger: tilewright.Engine, vocabulary: Path, embedder: tilewright.Engine, question: assets.SquadQuestion
) -> None:
    """Print what each model makes of one text: the tagger corrects grammar word by word, MiniLM finds answers."""
    names = json.loads(vocabulary.read_text(encoding="utf-8"))["tags"]
    logits = tagger(**tagger.tokenize([MISTAKE]))["logits"][0, 1:-1]
    tags = [names[index] for index in logits.argmax(-1)]
    words = (word if tag == "$KEEP" else f"{word} [{tag}]" for word, tag in zip(MISTAKE.split(), tags, strict=True))
    console.print(f'DistilBERT on "{MISTAKE}":\n  {" ".join(words)}', markup=False)
    vectors = embedder(**embedder.tokenize([question.question, *question.sentences], truncate=True))["sentence_embedding"]
    nearest = question.sentences[int(cosine(vectors[:1], vectors[1:]).argmax())]
    console.print(f'MiniLM on "{question.question}":\n  {nearest}', markup=False)


if __name__ == "__main__":
    main()
