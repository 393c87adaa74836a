"""Quality of compressed embedders against their speed: each question of SQuAD's development set must find its paragraph.

    python -m benchmarks.frontier MODEL ... [--latency] [--json docs/benchmarks/frontier.json] [--png docs/frontier.png]

Every MODEL is an INT8 checkpoint of MiniLM, packed or not. It is compiled for this CPU, and the artifact embeds all 10,570
questions and 2,067 paragraphs, cut to 256 tokens. Recall and MRR stand beside those of the float model in ONNX Runtime, with
the 95 % interval of the difference in recall@10 over the questions, paired. `--latency` also times 1 x 128 tokens on one
thread, the engines in turns, on a machine that does nothing else. `--curve STATE` evaluates the snapshots of a training
(`benchmarks.compress_minilm`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import tilewright
from benchmarks import assets, exports
from benchmarks.machine import machine
from tilewright.baseline import OnnxRuntime, time_in_turns
from tilewright.commands.output import stdout, table

MAX_LENGTH, BATCH, SEQ_LEN, SECONDS = 256, 32, 128, 10.0
FLOAT = "ONNX Runtime, float32"

Array = NDArray[Any]
Embed = Callable[[Array, Array], Array]
"""Takes ids and mask s64[batch, tokens], returns embeddings f32[batch, channels]."""


@cache
def texts() -> tuple[list[list[int]], list[list[int]], Array]:
    """Token ids of all questions and of all distinct paragraphs of the development set, and the paragraph of each question."""
    articles = json.loads(assets.squad_dev().read_text(encoding="utf-8"))["data"]
    entries = [entry for article in articles for entry in article["paragraphs"]]
    places: dict[str, int] = {}
    for entry in entries:
        places.setdefault(entry["context"], len(places))
    questions = [(qa["question"].strip(), places[entry["context"]]) for entry in entries for qa in entry["qas"]]
    tokenizer = Tokenizer.from_file(str(assets.minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    first = [encoding.ids for encoding in tokenizer.encode_batch([text for text, _ in questions])]
    second = [encoding.ids for encoding in tokenizer.encode_batch(list(places))]
    return first, second, np.array([place for _, place in questions])


def ranks(embed: Embed) -> Array:
    """Rank, from 1, of each question's paragraph among all by cosine; s64[questions]."""
    questions, paragraphs, expected = texts()
    scores = vectors(embed, questions) @ vectors(embed, paragraphs).T
    own = scores[np.arange(len(expected)), expected]
    return np.asarray((scores > own[:, None]).sum(1) + 1)


def vectors(embed: Embed, sequences: list[list[int]]) -> Array:
    """Embeddings of length 1, f32[sequences, channels], from batches of like lengths."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    parts = []
    for start in range(0, len(order), BATCH):
        rows = [sequences[index] for index in order[start : start + BATCH]]
        ids = np.zeros((len(rows), len(rows[-1])), np.int64)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = values
        parts.append(embed(ids, (np.arange(ids.shape[1]) < np.array([len(row) for row in rows])[:, None]).astype(np.int64)))
    found = np.concatenate(parts)
    result = np.empty_like(found)
    result[order] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return result


def quality(found: Array, dense: Array) -> dict[str, float]:
    """Recall, MRR, and the paired difference of recall@10 to the dense model with half its 95 % interval, in points."""
    difference = 100.0 * ((found <= 10).astype(float) - (dense <= 10))
    return {
        "recall_at_1": float((found <= 1).mean()),
        "recall_at_10": float((found <= 10).mean()),
        "mrr": float((1 / found).mean()),
        "points": float(difference.mean()),
        "interval": float(1.96 * difference.std() / np.sqrt(len(difference))),
    }


def mean_pool(states: Array, mask: Array) -> Array:
    return np.asarray((states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True))


def with_artifact(engine: tilewright.Engine) -> Embed:
    return lambda ids, mask: engine(input_ids=ids, attention_mask=mask)["sentence_embedding"]


def with_onnx(session: OnnxRuntime) -> Embed:
    return lambda ids, mask: mean_pool(session(input_ids=ids, attention_mask=mask)["last_hidden_state"], mask)


def evaluate(models: list[Path], latency: bool) -> dict[str, Any]:
    """Quality of each model's artifact, and if asked its latency, beside those of float32 in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as scratch:
        session = OnnxRuntime(exports.export(assets.minilm(), Path(scratch) / "minilm.onnx"), threads=1)
        dense = ranks(with_onnx(session))
        found = {FLOAT: quality(dense, dense)}
        engines: dict[str, Any] = {FLOAT: session}
        for model in models:
            artifact = tilewright.compile(model, output=Path(scratch) / f"{model.name}.tw").path
            engines[model.name] = tilewright.load(artifact, num_threads=1)
            found[model.name] = quality(ranks(with_artifact(engines[model.name])), dense)
        if latency:
            ids = np.random.default_rng(0).integers(1000, 20000, (1, SEQ_LEN))
            calls = {name: lambda run=run: run(input_ids=ids) for name, run in engines.items()}
            for name, samples in time_in_turns(calls, SECONDS).items():
                found[name]["milliseconds"] = 1000 * float(np.median(samples))
    return {"machine": machine(), "models": found}


def curve(state: Path) -> dict[str, Any]:
    """Quality of the float weights of each snapshot of a training, in bfloat16 where the CPU has instructions for it."""
    import torch

    from benchmarks.compress_minilm import BFLOAT16, load

    dense_model, student = load(assets.minilm()), load(state / "pruned")

    def with_torch(model: Any) -> Embed:
        def embed(ids: Array, mask: Array) -> Array:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                states = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
            return mean_pool(states.float().numpy(), mask)

        return embed

    dense = ranks(with_torch(dense_model))
    points = [{"tokens": 0, "minutes": 0.0, **quality(ranks(with_torch(student)), dense)}]
    for file in sorted((state / "snapshots").glob("*.pt")):
        saved = torch.load(file)
        student.load_state_dict(saved["model"], strict=False)
        progress = saved["st"]
        points.append(
            {"tokens": progress["tokens"], "minutes": progress["seconds"] / 60, **quality(ranks(with_torch(student)), dense)}
        )
    return {"dense": quality(dense, dense), "points": points}


def show(results: dict[str, Any]) -> None:
    grid = table("all questions of SQuAD's development set", "recall@1", "recall@10", "MRR", "recall@10, points", "ms")
    for name, row in results["models"].items():
        shares = (f"{row[key]:.3f}" for key in ("recall_at_1", "recall_at_10", "mrr"))
        points = "" if name == FLOAT else f"{row['points']:+.2f} ± {row['interval']:.2f}"
        grid.add_row(name, *shares, points, f"{row['milliseconds']:.2f}" if "milliseconds" in row else "")
    stdout().print(grid)


def plot(results: dict[str, Any], path: Path) -> None:
    """Recall@10 against milliseconds of each model, and over the tokens of each training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = any("milliseconds" in row for row in results.get("models", {}).values())
    figure, panels = pyplot.subplots(1, 2 if timed else 1, figsize=(11 if timed else 6.5, 4.5), sharey=True, squeeze=False)
    left, right = panels[0, 0], panels[0, -1]
    for name, row in results.get("models", {}).items():
        if "milliseconds" not in row:
            continue
        left.errorbar(row["milliseconds"], 100 * row["recall_at_10"], yerr=row["interval"], fmt="o", capsize=3)
        left.annotate(name, (row["milliseconds"], 100 * row["recall_at_10"]), textcoords="offset points", xytext=(6, 6))
    if timed:
        left.set(xlabel="ms for 1 x 128 tokens, one thread", ylabel="recall@10, %", title="Quality against time")
        left.set_xlim(left=0)
    for name, training in results.get("curves", {}).items():
        tokens, recalls, intervals = (
            [scale * point[key] for point in training["points"]]
            for key, scale in (("tokens", 1e-6), ("recall_at_10", 100.0), ("interval", 1.0))
        )
        right.errorbar(tokens, recalls, yerr=intervals, marker="o", capsize=3, label=name)
        right.axhline(100 * training["dense"]["recall_at_10"], color="grey", linestyle="--")
    right.set(
        xlabel="million tokens of distillation", ylabel="recall@10, %", title="Over training (float weights; dashed: dense)"
    )
    right.legend(loc="lower right")
    for axes in panels[0]:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrieval quality and speed of compressed MiniLM embedders.")
    parser.add_argument("models", nargs="*", type=Path, help="INT8 checkpoints")
    parser.add_argument("--latency", action="store_true", help="also time the models")
    parser.add_argument("--curve", type=Path, help="directory of a training whose snapshots to evaluate instead")
    parser.add_argument("--json", type=Path, help="file of results to add to")
    parser.add_argument("--png", type=Path, help="picture to draw of all results in the file of --json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    if options.curve is not None:
        results.setdefault("curves", {})[options.curve.name] = curve(options.curve)
    if options.models:
        results |= evaluate(options.models, options.latency)
        show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.png is not None:
        plot(results, options.png)


if __name__ == "__main__":
    main()
