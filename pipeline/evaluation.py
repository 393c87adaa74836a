"""How well a model answers: a compiled artifact itself, an INT8 checkpoint through one, or a float checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright.artifact import read_manifest
from tilewright.baseline import OnnxRuntime
from tilewright.compiler import compile
from tilewright.engine import Engine, load
from tilewright.errors import InvalidInput
from tilewright.frontend import load as load_checkpoint
from tilewright.manifest import MANIFEST
from tilewright.pipeline.models import Progress, engine_predict, load_module, module_predict
from tilewright.pipeline.tasks.base import Context, Feature, Outputs, Predict, Record, Task, TextSettings, load_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model's answers, the number of records, and seconds spent in the model."""

    metrics: dict[str, float]
    records: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Records answered in a second."""
        return self.records / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Answering:
    """A model that answers, and what making features for it needs."""

    predict: Predict
    context: Context


def answering(
    task: Task, path: Path, settings: TextSettings, threads: int | None = None, progress: Progress = lambda done, total: None
) -> Answering:
    """The model at `path`, ready to answer.

    Raises InvalidInput for a model with another head than the task's, and what loading and compiling raise.
    """
    if (path / MANIFEST).is_file():
        return _artifact(task, path, path, settings, threads, progress)
    model = load_checkpoint(path)
    if model.quantized:
        with tempfile.TemporaryDirectory(prefix="tilewright-") as scratch:
            # what is loaded stays mapped when its files are gone
            artifact = compile(model, "native", Path(scratch) / "model.tw").path
            return _artifact(task, artifact, path, settings, threads, progress)
    module = load_module(task, path)
    labels = model.config.labels
    return Answering(module_predict(module, model.head, progress), Context(load_tokenizer(path), settings, labels))


def _artifact(
    task: Task, artifact: Path, named: Path, settings: TextSettings, threads: int | None, progress: Progress
) -> Answering:
    manifest = read_manifest(artifact)
    if manifest.head.kind != task.name:
        raise InvalidInput(f"{named} is for {manifest.head.kind}, not for {task.name}; give the task that it was made for")
    engine: Engine = load(artifact, threads)
    context = Context(load_tokenizer(artifact), _within(settings, manifest.limits.max_positions), manifest.labels)
    return Answering(engine_predict(engine, manifest.inputs, progress), context)


def _within(settings: TextSettings, positions: int) -> TextSettings:
    if settings.max_length > positions:
        raise InvalidInput(f"max_length is {settings.max_length}, the model has {positions} positions; lower it")
    return settings


def evaluate(
    task: Task,
    path: Path,
    records: Sequence[Record],
    settings: TextSettings,
    *,
    reference: Predict | None = None,
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Metrics of the model at `path` on `records`, against their labels or the answers of `reference`."""
    model = answering(task, path, settings, threads, progress)
    return _measure(task, model, records, reference)


def remembering(predict: Predict) -> Predict:
    """`predict` that answers each sequence once, for a reference that is asked the same after every step."""
    known: dict[tuple[tuple[int, ...], ...], Outputs] = {}

    def answer(features: Sequence[Feature]) -> list[Outputs]:
        keys = [(tuple(row["input_ids"]), tuple(row["token_type_ids"])) for row in features]
        new = {key: row for key, row in zip(keys, features, strict=True) if key not in known}
        if new:
            known.update(zip(new, predict(list(new.values())), strict=True))
        return [known[key] for key in keys]

    return answer


def evaluate_baseline(
    task: Task, onnx: Path, like: Path, records: Sequence[Record], settings: TextSettings, threads: int
) -> Evaluation:
    """Metrics of the ONNX file in ONNX Runtime, with tokenizer and labels of the model `like`."""
    runtime = OnnxRuntime(onnx, threads)
    labels = read_manifest(like).labels if (like / MANIFEST).is_file() else load_checkpoint(like).config.labels
    names = ("input_ids", "attention_mask", "token_type_ids")
    predict = engine_predict(runtime, names)
    return _measure(task, Answering(predict, Context(load_tokenizer(like), settings, labels)), records, None)


def _measure(task: Task, model: Answering, records: Sequence[Record], reference: Predict | None) -> Evaluation:
    seconds = 0.0

    def timed(features: Sequence[Feature]) -> Sequence[Outputs]:
        nonlocal seconds
        start = time.perf_counter()
        outputs = model.predict(features)
        seconds += time.perf_counter() - start
        return outputs

    metrics = task.evaluate(timed, records, model.context, reference)
    return Evaluation(metrics, len(records), seconds)
