"""The recipe: one YAML file that says which model is compressed for which task, on which data, in which steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from tilewright.errors import InvalidInput
from tilewright.pipeline.distillation import DistillationSettings
from tilewright.pipeline.pruning.magnitude import MagnitudeSettings
from tilewright.pipeline.pruning.obs import ObsSettings
from tilewright.pipeline.tasks import TASKS
from tilewright.pipeline.tasks.base import TextSettings, read_data
from tilewright.pipeline.training import TrainingSettings


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(TextSettings):
    """Files of the task's format: `train` to learn and calibrate on, `dev` to measure on after each step.

    A file is a path, or `asset:NAME/FILE` of the pinned data. The limits take so many rows, evenly spread over the file.
    """

    train: str
    dev: str | None = None
    train_limit: PositiveInt | None = None
    dev_limit: PositiveInt | None = None


class Train(TrainingSettings):
    """Train the dense model on labels; it is the teacher of what follows."""

    step: Literal["train"]


class PruneObs(ObsSettings):
    """Prune by second order with refit, on `texts` rows of the training data."""

    step: Literal["prune"]
    score: Literal["obs"]
    texts: PositiveInt = 1000


class PruneMagnitude(MagnitudeSettings):
    """Prune by magnitude while training, on labels or, with `loss`, by distillation."""

    step: Literal["prune"]
    score: Literal["magnitude"]
    training: TrainingSettings = TrainingSettings()
    loss: DistillationSettings | None = None


class Distil(TrainingSettings):
    """Train with frozen masks on the losses of distillation; the task's own where `loss` is not given."""

    step: Literal["distil"]
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = 0.0
    freeze_embeddings: bool = True
    loss: DistillationSettings | None = None


class Quantize(_Settings):
    """Static INT8, calibrated on `texts` rows of the training data.

    max_drop: how much of the task's metric it may cost; where it costs more, the step says so, and fails if `on_miss` is fail.
    """

    step: Literal["quantize"]
    method: Literal["minmax", "percentile"] = "minmax"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.999
    weight_bits: Literal[8, 7] = 8
    texts: PositiveInt = 500
    max_drop: Annotated[float, Field(ge=0)] | None = None
    on_miss: Literal["report", "fail"] = "report"


class Compile(_Settings):
    """Compile the INT8 model to an artifact, and measure what that answers."""

    step: Literal["compile"]
    target: str = "native"
    max_tokens: Annotated[int, Field(ge=16)] = 4096


class Evaluate(_Settings):
    """Measure the model as it is then on other data, or on all of the dev data."""

    step: Literal["evaluate"]
    data: str | None = None
    limit: PositiveInt | None = None


Prune = Annotated[PruneObs | PruneMagnitude, Field(discriminator="score")]
StepSettings = Annotated[Train | Prune | Distil | Quantize | Compile | Evaluate, Field(discriminator="step")]


class Recipe(_Settings):
    """What `tilewright compress` does. `model` is a Hugging Face directory, or `asset:NAME` of the pinned models."""

    description: str = ""
    task: Literal["question_answering", "sequence_classification", "token_classification", "embedding"]
    model: str
    data: Data
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[tuple[StepSettings, ...], Field(min_length=1)]


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `changes` KEY=VALUE such as data.dev_limit=100 or steps.1.sparsity=0.7."""
    return parse_recipe(read_data(path), str(path), changes)


def parse_recipe(text: str, name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in `text`; raises InvalidInput that names the key and what is allowed. Errors call it `name`."""
    value = _yaml(text, name)
    if not isinstance(value, dict):
        raise InvalidInput(f"{name} is no recipe: its keys are {', '.join(Recipe.model_fields)}")
    for change in changes:
        _change(value, change)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise InvalidInput(f"{name}: {_explain(error)}") from None
    _check_order(recipe, name)
    return recipe


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data without what is at its default, save for the discriminators."""
    return recipe.model_dump(mode="json", exclude_unset=True)


def _yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InvalidInput(f"{name} is no YAML: {' '.join(str(error).split())}") from None


def _change(value: dict[str, Any], change: str) -> None:
    key, equals, given = change.partition("=")
    parts = key.split(".")
    place: Any = value
    try:
        if not equals:
            raise KeyError
        for part in parts[:-1]:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(parts[-1]) if isinstance(place, list) else parts[-1]] = _yaml(given, change)
    except (KeyError, IndexError, ValueError, TypeError):
        raise InvalidInput(f"{change} changes nothing of the recipe; give KEY=VALUE such as steps.1.sparsity=0.7") from None


def _check_order(recipe: Recipe, name: str) -> None:
    """Raises InvalidInput for steps that cannot follow each other."""
    seen: set[str] = set()
    for number, settings in enumerate(recipe.steps):
        step = settings.step
        place = f"{name}: steps.{number} ({step})"
        if step in ("train", "prune", "distil", "quantize") and "quantize" in seen:
            raise InvalidInput(f"{place} stands after quantize; only compile and evaluate may")
        if step == "compile" and "quantize" not in seen:
            raise InvalidInput(f"{place} needs INT8 weights; put quantize before it")
        if "compile" in seen and step != "evaluate":
            raise InvalidInput(f"{place} stands after compile; only evaluate may")
        if step == "train" and "prune" in seen:
            raise InvalidInput(f"{place} would fill in what was pruned; use distil, or put it before prune")
        labelled = isinstance(settings, Train) or (isinstance(settings, PruneMagnitude) and settings.loss is None)
        if labelled and not TASKS[recipe.task].trains:
            raise InvalidInput(f"{place}: the task {recipe.task} has no labels to train on; use distil, or give a loss")
        if step == "evaluate" and not (recipe.data.dev or getattr(settings, "data", None)):
            raise InvalidInput(f"{place} has no data; set data.dev, or data of the step")
        seen.add(step)


def _explain(error: ValidationError) -> str:
    """The first error, with the key's path and, for a key that does not exist, those that do."""
    first = error.errors(include_url=False)[0]
    models: list[type[BaseModel]] = [Recipe]
    path: list[str] = []
    for item in first["loc"]:
        tagged = [m for m in models if item in (_tag(m, "step"), _tag(m, "score"))]
        fields = [m.model_fields[item] for m in models if isinstance(item, str) and item in m.model_fields]
        if fields:
            models = [model for field in fields for model in _models((field.annotation, field.metadata))]
        elif tagged and isinstance(item, str):
            models = tagged
            continue  # pydantic names the kind of a step, which is no key of the file
        path.append(str(item))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"the key is unknown; allowed: {', '.join(models[0].model_fields) if models else ''}"
    return f"{'.'.join(path)}: {message}"


def _tag(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields.get(name)
    return get_args(field.annotation)[0] if field else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """All models in an annotation, which may be a union, a tuple or annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = annotation if isinstance(annotation, tuple | list) else get_args(annotation)
    return [model for part in parts for model in _models(part)]
