"""Runs a recipe: every step in a directory keyed by the hash of all that it depends on, so that none is done twice.

DIR/run.json                    the recipe and the hashes of model and data
DIR/steps/01-prune-HASH/        step.json, and the model that the step made
DIR/steps/.02-distil-HASH/      a step that was interrupted, with its checkpoints
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright.artifact import sha256
from tilewright.errors import InvalidInput
from tilewright.frontend import load
from tilewright.manifest import MANIFEST
from tilewright.pipeline.provenance import file_hashes
from tilewright.pipeline.recipe.schema import Recipe, StepSettings, dump_recipe
from tilewright.pipeline.recipe.steps import ARTIFACT, STEPS, Outcome, State, Watcher, Workspace

RUN, STEP = "run.json", "step.json"


@dataclass(frozen=True)
class StepRecord:
    """One finished step: where it lies, what it left, and what it took. `sparsity` is the share of zero weights after it."""

    name: str
    key: str
    directory: str
    output: str | None
    metrics: Mapping[str, float]
    sparsity: float | None
    notes: tuple[str, ...]
    details: Mapping[str, Any]
    seconds: float
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    output_sha256: Mapping[str, str]


@dataclass(frozen=True)
class Planned:
    """A step to come, or done: its settings, and the directory that it has in a run."""

    name: str
    settings: StepSettings
    key: str
    directory: Path

    @property
    def partial(self) -> Path:
        """Where it works until it is done."""
        return self.directory.with_name(f".{self.directory.name}")

    @property
    def done(self) -> bool:
        """Whether the run has it."""
        return (self.directory / STEP).is_file()


def identity(space: Workspace) -> dict[str, Any]:
    """What a run depends on: recipe, and sha256 of the model's and the data's files."""
    data = space.recipe.data
    files = [data.train, data.dev, *(getattr(step, "data", None) for step in space.recipe.steps)]
    named = {name: space.locate(name) for name in files if name}
    for name, path in named.items():
        if not path.is_file():
            raise InvalidInput(f"data {name} does not exist at {path}; correct the recipe, or put the file there")
    return {
        "recipe": dump_recipe(space.recipe),
        "model_sha256": file_hashes(space.base),
        "data_sha256": {name: sha256(path) for name, path in named.items()},
    }


def plan(space: Workspace, output: Path, depends: Mapping[str, Any]) -> list[Planned]:
    """The steps of the recipe with their directories below `output`."""
    recipe = space.recipe
    data = recipe.data.model_dump(mode="json")
    files = {name: depends["data_sha256"].get(data[name]) for name in ("train", "dev")}
    key = _hash({"task": recipe.task, "seed": recipe.seed, "data": data | files, "model": depends["model_sha256"]})
    planned = []
    for number, settings in enumerate(recipe.steps):
        own = settings.model_dump(mode="json")
        key = _hash({"before": key, "settings": own, "data": depends["data_sha256"].get(own.get("data"))})
        directory = output / "steps" / f"{number:02}-{settings.step}-{key[:12]}"
        planned.append(Planned(settings.step, settings, key, directory))
    return planned


def compress(
    recipe: Recipe, root: Path, output: Path, *, resume: bool = False, watcher: Watcher | None = None
) -> list[StepRecord]:
    """Run `recipe`, whose paths are relative to `root`, in the directory `output`; returns what each step left.

    Steps that `output` has already are not repeated. An interrupted one goes on where it was with `resume`, for which recipe,
    model and data must be as they were. Raises InvalidInput where they are not, and what the steps raise.
    """
    space = Workspace(recipe, root, watcher or Watcher())
    depends = identity(space)
    _check_resume(output, depends, resume)
    steps = plan(space, output, depends)
    for step in steps:
        if step.partial.exists() and not resume:
            raise InvalidInput(f"{step.partial} is a step that was interrupted; go on with --resume, or remove it")
    try:
        (output / "steps").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"output {output} cannot be written: {error.strerror}; choose another place") from None
    _write(output / RUN, depends)
    state = State(space.base, space.base)
    records = []
    for step in steps:
        record = _read(step) if step.done else _run(step, state, space)
        records.append(record)
        state = _advance(state, step, record)
    return records


def _run(step: Planned, state: State, space: Workspace) -> StepRecord:
    step.partial.mkdir(exist_ok=True)
    started = time.perf_counter()
    outcome: Outcome = STEPS[step.name](step.settings, state, space, step.partial)
    made = step.partial / outcome.output if outcome.output else None
    record = StepRecord(
        name=step.name,
        key=step.key,
        directory=step.directory.name,
        output=outcome.output,
        metrics=outcome.metrics,
        sparsity=sparsity(made) if made and outcome.output != ARTIFACT else None,
        notes=outcome.notes,
        details=outcome.details,
        seconds=time.perf_counter() - started,
        hardware={"machine": platform.machine(), "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()},
        versions={name: version(name) for name in ("tilewright", "torch", "transformers", "accelerate", "numpy")},
        output_sha256=_hashes(made) if made else {},
    )
    _write(step.partial / STEP, asdict(record))
    if step.directory.exists():  # without a step.json: nothing that a run left
        shutil.rmtree(step.directory)
    step.partial.rename(step.directory)
    return record


def _advance(state: State, step: Planned, record: StepRecord) -> State:
    metrics = record.metrics or state.metrics
    if record.output is None:  # an evaluation, of perhaps other data; before all others it tells what the dense model can do
        return state if state.metrics else replace(state, metrics=metrics)
    model = step.directory / record.output
    return replace(state, model=model, dense=model if step.name == "train" else state.dense, metrics=metrics)


def sparsity(model: Path) -> float:
    """Share of the weights of the encoder's linears that are zero."""
    linears = load(model).linears()
    return float(sum(int((linear.weight == 0).sum()) for linear in linears) / sum(np.size(linear.weight) for linear in linears))


def _check_resume(output: Path, depends: Mapping[str, Any], resume: bool) -> None:
    if not resume:
        return
    try:
        before = json.loads((output / RUN).read_text("utf-8"))
    except (OSError, ValueError):
        raise InvalidInput(f"{output} holds no run to resume; leave out --resume, or give the directory of one") from None
    changed = list(_differences(before, depends))
    if changed:
        raise InvalidInput(
            f"{output} was begun with another recipe or other data: {'; '.join(changed[:3])}; restore them, "
            "or leave out --resume to do anew what depends on them"
        )


def _differences(before: Any, now: Any, path: str = "") -> Any:
    """Where two values differ, each as one phrase."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (a, b) in enumerate(zip(before, now, strict=True)):
            yield from _differences(a, b, f"{path}.{index}")
    elif before != now:
        short = (json.dumps(value)[:40] for value in (before, now))
        yield "{} was {}, is {}".format(path, *short)


def _hashes(made: Path) -> dict[str, str]:
    """sha256 of an artifact's files, or of a checkpoint's."""
    if (made / MANIFEST).is_file():
        return {file.name: sha256(file) for file in sorted(made.iterdir())}
    return file_hashes(made)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or not there."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    scratch.replace(path)


def _read(step: Planned) -> StepRecord:
    value = json.loads((step.directory / STEP).read_text("utf-8"))
    return StepRecord(**(value | {"notes": tuple(value["notes"])}))
