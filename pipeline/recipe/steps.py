"""What each step of a recipe does: a table from the kind of a step to the function that runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from tilewright import assets
from tilewright.compiler import compile
from tilewright.errors import InvalidInput, InvalidModel, TilewrightError
from tilewright.frontend import load
from tilewright.frontend.sentence_transformers import write_embedding
from tilewright.pipeline.disk import disk_errors
from tilewright.pipeline.evaluation import Evaluation, answering, evaluate, remembering
from tilewright.pipeline.models import accepted, load_module, quiet
from tilewright.pipeline.modules import encoder_modules
from tilewright.pipeline.provenance import append_step, extend
from tilewright.pipeline.pruning import obs
from tilewright.pipeline.pruning.magnitude import MagnitudeSettings
from tilewright.pipeline.pruning.masks import block_sparsity, masks_of
from tilewright.pipeline.quantize import quantize
from tilewright.pipeline.recipe import schema
from tilewright.pipeline.recipe.schema import Recipe, StepSettings, dump_recipe
from tilewright.pipeline.tasks import TASKS
from tilewright.pipeline.tasks.base import Context, Feature, Predict, Record, Task, check_tokenizer, load_tokenizer, pad
from tilewright.pipeline.training import Job, Progress, TrainingSettings, train

T = TypeVar("T")

MODEL = "model"
ARTIFACT = "model.tw"
CHECKPOINTS = "checkpoints"
_INPUTS = ("input_ids", "token_type_ids")
_BATCH = 16
_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


class DropExceeded(TilewrightError):
    """Quantising cost more of the metric than the recipe allows."""


@dataclass(frozen=True)
class State:
    """Where the run stands: the model as it is, the dense model that teaches, and the last metrics measured."""

    model: Path
    dense: Path
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a step left: the model in its directory, if it made one, its metrics, and remarks."""

    output: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Watcher:
    """Shown what a step is doing; does nothing by itself."""

    def training(self, progress: Progress) -> None:
        """After each optimizer step."""

    def work(self, what: str, done: int, total: int) -> None:
        """After each part of other work."""


class Workspace:
    """What the steps of one run share: the recipe, its task and data, read once, and who watches."""

    def __init__(self, recipe: Recipe, root: Path, watcher: Watcher) -> None:
        self.recipe, self.root, self.watcher = recipe, root, watcher
        self.task: Task = TASKS[recipe.task]
        self._references: dict[Path, Predict] = {}

    @cached_property
    def base(self) -> Path:
        """The model that the recipe starts from."""
        path = self.locate(self.recipe.model)
        if not path.exists():
            raise InvalidModel(f"model {path} does not exist; give a Hugging Face directory, or asset:NAME of a pinned model")
        return path

    @cached_property
    def train(self) -> list[Record]:
        """Rows to learn and calibrate on."""
        return self.read(self.recipe.data.train, self.recipe.data.train_limit)

    @cached_property
    def dev(self) -> list[Record]:
        """Rows to measure on; none where the recipe names no file."""
        return self.read(self.recipe.data.dev, self.recipe.data.dev_limit) if self.recipe.data.dev else []

    def read(self, name: str, limit: int | None) -> list[Record]:
        """Rows of the file `name`, or `limit` of them."""
        return spread(self.task.read(self.locate(name)), limit)

    def locate(self, name: str) -> Path:
        """The path of a file or directory that a recipe names, relative to the recipe's own; assets are fetched."""
        if not name.startswith("asset:"):
            return self.root / name
        asset, _, member = name.removeprefix("asset:").partition("/")
        if asset not in assets.ASSETS:
            raise InvalidInput(f"asset {asset} is unknown; known: {', '.join(assets.ASSETS)}")
        return assets.fetch(asset) / member

    def context(self, model: Path) -> Context:
        """What making features for `model` needs."""
        loaded = load(model)
        if self.recipe.data.max_length > loaded.config.max_positions:
            raise InvalidInput(
                f"data.max_length is {self.recipe.data.max_length}, the model has {loaded.config.max_positions} positions; "
                "lower it"
            )
        return Context(load_tokenizer(model), self.recipe.data, loaded.config.labels)

    def features(self, model: Path, records: Sequence[Record]) -> list[Feature]:
        """Features of `records`, checked against the model's vocabulary."""
        rows = self.task.features(records, self.context(model))
        check_tokenizer(rows, load(model).config.vocab_size)
        return rows

    def measure(self, model: Path, dense: Path, records: Sequence[Record] | None = None) -> Evaluation:
        """Metrics of `model` on `records`, by default those of data.dev, also against the answers of the `dense` model."""
        return evaluate(
            self.task,
            model,
            self.dev if records is None else records,
            self.recipe.data,
            reference=self._reference(dense) if self.task.compares else None,
            progress=lambda done, total: self.watcher.work("evaluate", done, total),
        )

    def _reference(self, dense: Path) -> Predict:
        if dense not in self._references:
            self._references[dense] = remembering(answering(self.task, dense, self.recipe.data).predict)
        return self._references[dense]

    def metrics(self, model: Path, dense: Path) -> dict[str, float]:
        """Metrics on data.dev, or none where there is no such file."""
        return self.measure(model, dense).metrics if self.dev else {}


def spread(rows: list[T], count: int | None) -> list[T]:
    """`count` of the `rows`, evenly spread; all where there are not more."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def run_train(settings: schema.Train, state: State, space: Workspace, directory: Path) -> Outcome:
    """Train the dense model on labels."""
    model = load_module(space.task, state.model, needs_head=False)
    job = Job(model, space.features(state.model, space.train), _training(settings), space.recipe.seed)
    result = train(job, directory / CHECKPOINTS, space.watcher.training)
    return _finish("train", model, settings, state, space, directory, result)


def run_prune(settings: schema.PruneObs | schema.PruneMagnitude, state: State, space: Workspace, directory: Path) -> Outcome:
    """Prune, by second order at once or by magnitude while training."""
    model = load_module(space.task, state.model)
    if isinstance(settings, schema.PruneObs):
        chosen = obs.ObsSettings.model_validate(settings.model_dump(include=set(obs.ObsSettings.model_fields)))
        batches = calibration_batches(space.features(state.model, spread(space.train, settings.texts)), accepted(model))
        masks = obs.prune(model, batches, chosen, lambda done, total: space.watcher.work("prune", done, total))
        return _finish("prune", model, settings, state, space, directory, {"block_sparsity": block_sparsity(masks)})
    magnitude = MagnitudeSettings.model_validate(settings.model_dump(include=set(MagnitudeSettings.model_fields)))
    job = Job(
        model,
        space.features(state.model, space.train),
        settings.training,
        space.recipe.seed,
        teacher=load_module(space.task, state.dense) if settings.loss else None,
        distillation=settings.loss,
        magnitude=magnitude,
    )
    result = train(job, directory / CHECKPOINTS, space.watcher.training)
    return _finish("prune", model, settings, state, space, directory, result)


def run_distil(settings: schema.Distil, state: State, space: Workspace, directory: Path) -> Outcome:
    """Train the pruned model to imitate the dense one, its zeros frozen."""
    model = load_module(space.task, state.model)
    job = Job(
        model,
        space.features(state.model, space.train),
        _training(settings),
        space.recipe.seed,
        teacher=load_module(space.task, state.dense),
        distillation=settings.loss or space.task.distillation,
        masks=masks_of(encoder_modules(model).linears, (1, 1)),
    )
    result = train(job, directory / CHECKPOINTS, space.watcher.training)
    return _finish("distil", model, settings, state, space, directory, result)


def run_quantize(settings: schema.Quantize, state: State, space: Workspace, directory: Path) -> Outcome:
    """Quantise to INT8; where `max_drop` is set, measure what it costs."""
    output = directory / MODEL
    shutil.rmtree(output, ignore_errors=True)
    quantize(
        state.model,
        space.task.texts(spread(space.train, settings.texts))[: settings.texts],
        output,
        settings.method,
        settings.percentile,
        space.recipe.data.max_length,
        lambda done, total: space.watcher.work("calibrate", done, total),
        settings.weight_bits,
    )
    metrics, notes = {}, []
    if settings.max_drop is not None:
        metrics = space.metrics(output, state.dense)
        name = space.task.metric if space.task.metric in state.metrics else next(iter(metrics), "")
        if name not in metrics or name not in state.metrics:
            raise InvalidInput("max_drop needs a metric before and after; set data.dev")
        drop = state.metrics[name] - metrics[name]
        if drop > settings.max_drop:
            text = (
                f"INT8 costs {drop:.4g} of {name} ({state.metrics[name]:.4g} to {metrics[name]:.4g}), "
                f"max_drop is {settings.max_drop:g}; try another method, more texts, or distil longer"
            )
            if settings.on_miss == "fail":
                raise DropExceeded(text)
            notes.append(text)
    extend(output, dump_recipe(space.recipe), seed=space.recipe.seed, metrics=dict(metrics))
    return Outcome(MODEL, metrics, tuple(notes))


def run_compile(settings: schema.Compile, state: State, space: Workspace, directory: Path) -> Outcome:
    """Compile, and measure the artifact."""
    output = directory / ARTIFACT
    space.watcher.work("compile", 0, 1)
    compile(state.model, settings.target, output, max_tokens=settings.max_tokens)
    return Outcome(ARTIFACT, space.metrics(output, state.dense))


def run_evaluate(settings: schema.Evaluate, state: State, space: Workspace, directory: Path) -> Outcome:
    """Measure the model as it is."""
    name = settings.data or space.recipe.data.dev
    assert name is not None  # the schema sees to it
    records = space.read(name, settings.limit)
    found = space.measure(state.model, state.dense, records)
    return Outcome(None, found.metrics, details={"records": found.records, "per_second": found.per_second})


Run = Callable[[Any, State, Workspace, Path], Outcome]

STEPS: Mapping[str, Run] = {
    "train": run_train,
    "prune": run_prune,
    "distil": run_distil,
    "quantize": run_quantize,
    "evaluate": run_evaluate,
    "compile": run_compile,
}


def calibration_batches(features: Sequence[Feature], names: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """Batches of like lengths, of the inputs alone that a model takes."""
    inputs = ({name: row[name] for name in _INPUTS if name in names} for row in features)
    rows = sorted(inputs, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), _BATCH):
        yield pad(rows[start : start + _BATCH])


def _training(settings: schema.Train | schema.Distil) -> TrainingSettings:
    return TrainingSettings.model_validate(settings.model_dump(include=set(TrainingSettings.model_fields)))


def _finish(
    name: str,
    model: nn.Module,
    settings: StepSettings,
    state: State,
    space: Workspace,
    directory: Path,
    details: Mapping[str, float],
) -> Outcome:
    """Save `model` with what lies beside it, measure it and write down how it came to be."""
    output = directory / MODEL
    shutil.rmtree(output, ignore_errors=True)
    with quiet(), disk_errors():
        cast(Any, model).save_pretrained(output)
    for file in _COPIED:
        if (state.model / file).is_file():
            shutil.copyfile(state.model / file, output / file)
    write_embedding(load(state.model), output)
    append_step(name, settings.model_dump(mode="json", exclude={"step"}), state.model, output)
    metrics = space.metrics(output, output if name == "train" else state.dense)
    extend(output, dump_recipe(space.recipe), seed=space.recipe.seed, metrics=dict(metrics))
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    return Outcome(MODEL, metrics, details=details)
