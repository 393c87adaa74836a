"""What a run would take, from a few steps measured now: trainings step by step, second-order pruning layer by layer."""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from tilewright.pipeline.models import accepted, load_module
from tilewright.pipeline.modules import encoder_modules
from tilewright.pipeline.pruning import obs
from tilewright.pipeline.pruning.masks import masks_of
from tilewright.pipeline.recipe.run import identity, plan
from tilewright.pipeline.recipe.schema import Distil, PruneMagnitude, PruneObs, Recipe, StepSettings, Train
from tilewright.pipeline.recipe.steps import Watcher, Workspace, calibration_batches, spread
from tilewright.pipeline.training import Job, Progress, TrainingSettings, train

_WARM, _MEASURED = 2, 8
"""Steps of training before the clock starts, and those that it measures."""


@dataclass(frozen=True)
class Estimate:
    """A planned step: what it does, seconds it is estimated to take and peak memory in bytes, None where not measured."""

    name: str
    what: str
    done: bool
    seconds: float | None = None
    memory: int | None = None


class _Enough(Exception):
    """Raised out of pruning when its first layer is done."""


def estimate(recipe: Recipe, root: Path, output: Path, watcher: Watcher) -> list[Estimate]:
    """The plan of `compress`; nothing is written to `output`. Raises what reading the recipe's model and data raises.

    The base model stands in for that of each step, which has its shape. Memory is the peak of the process so far, so it is that
    of the step or of one before it.
    """
    space = Workspace(recipe, root, watcher)
    found = []
    for step in plan(space, output, identity(space)):
        settings = step.settings
        seconds = None
        if not step.done:
            if isinstance(settings, Train | Distil | PruneMagnitude):
                seconds = _training(settings, space)
            elif isinstance(settings, PruneObs):
                seconds = _pruning(settings, space)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if seconds is not None else None
        found.append(Estimate(step.name, _what(settings), step.done, seconds, memory))
    return found


def _training(settings: Train | Distil | PruneMagnitude, space: Workspace) -> float:
    training = settings.training if isinstance(settings, PruneMagnitude) else settings
    loss = settings.loss if isinstance(settings, PruneMagnitude) else None
    if isinstance(settings, Distil):
        loss = settings.loss or space.task.distillation
    model = load_module(space.task, space.base, needs_head=False)
    features = space.features(space.base, space.train)
    steps = training.max_steps or ceil(ceil(len(features) / training.batch_size) * training.epochs)
    measured = min(steps, _WARM + _MEASURED)
    own = TrainingSettings.model_validate(training.model_dump(include=set(TrainingSettings.model_fields)))
    job = Job(
        model,
        features,
        own.model_copy(update={"max_steps": measured, "checkpoint_every": measured + 1}),
        space.recipe.seed,
        teacher=load_module(space.task, space.base, needs_head=False) if loss else None,
        distillation=loss,
        masks=masks_of(encoder_modules(model).linears, (1, 1)) if isinstance(settings, Distil) else None,
    )
    times: list[float] = []

    def report(progress: Progress) -> None:
        times.append(time.perf_counter())
        space.watcher.work("measuring", progress.step, measured)

    with tempfile.TemporaryDirectory(prefix="tilewright-") as scratch:
        train(job, Path(scratch), report)
    first = min(_WARM, len(times) - 1)
    pace = (times[-1] - times[first]) / max(len(times) - 1 - first, 1)
    return steps * pace


def _pruning(settings: PruneObs, space: Workspace) -> float:
    model = load_module(space.task, space.base, needs_head=False)
    batches = list(calibration_batches(space.features(space.base, spread(space.train, settings.texts)), accepted(model)))
    layers = len(encoder_modules(model).layers)
    total = 0

    def stop(done: int, count: int) -> None:
        nonlocal total
        total = count
        if done == ceil(count / layers):
            raise _Enough

    chosen = obs.ObsSettings.model_validate(settings.model_dump(include=set(obs.ObsSettings.model_fields)))
    started = time.perf_counter()
    try:
        obs.prune(model, batches, chosen, stop)
    except _Enough:
        return (time.perf_counter() - started) * layers
    return time.perf_counter() - started


def _what(settings: StepSettings) -> str:
    given = settings.model_dump(mode="json", exclude_unset=True, exclude={"step"})
    return ", ".join(f"{name} {value}" for name, value in given.items())
