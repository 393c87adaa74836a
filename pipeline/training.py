"""Training on Hugging Face's Trainer: a task's loss or the losses of distillation, masks that stay, and exact resuming.

The loop, its devices (CPU, CUDA, several processes under `accelerate launch`), its mixed precision and its checkpoints are the
Trainer's.
A checkpoint holds model, optimizer, schedule, random state and place in the data, so that a training that was interrupted ends
with the very weights of one that was not.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tilewright.errors import InvalidInput, TilewrightError
from tilewright.pipeline.disk import disk_errors
from tilewright.pipeline.distillation import DistillationSettings, Distiller
from tilewright.pipeline.models import accepted, quiet
from tilewright.pipeline.modules import encoder_modules
from tilewright.pipeline.pruning.magnitude import GradualMagnitude, MagnitudeSettings
from tilewright.pipeline.pruning.masks import Masks, apply_masks, block_sparsity, frozen, masks_of
from tilewright.pipeline.tasks.base import Feature, pad


class TrainingStopped(TilewrightError):
    """A training cannot go on: its loss or gradients are not finite, or its checkpoints cannot be written."""


class TrainingSettings(BaseModel):
    """Of a training. `max_steps` overrules epochs; `dropout` the model's own, of which a student that imitates has no need.

    `freeze_embeddings` leaves the embeddings as they are, whose gradients are a good part of a small model's step. `precision`
    is that of products: auto is bfloat16 where the device multiplies it (CUDA, AVX512-BF16); weights and optimizer are float32
    always. Name one where CPUs of several kinds must arrive at the same weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: PositiveFloat = 2.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 3e-5
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    freeze_embeddings: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every: PositiveInt = 500


@dataclass(frozen=True)
class Progress:
    """State of a training after `step` of `total` optimizer steps; `seconds_left` at its pace so far."""

    step: int
    total: int
    loss: float
    sparsity: float
    seconds_left: float


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Job:
    """What is trained on what: `teacher` and `distillation` for the losses of distillation, else labels give the loss.

    masks: kept while training. magnitude: prunes while training instead. seed: of the order of the data and of dropout.
    """

    model: nn.Module
    features: Sequence[Feature]
    settings: TrainingSettings
    seed: int
    teacher: nn.Module | None = None
    distillation: DistillationSettings | None = None
    masks: Masks | None = None
    magnitude: MagnitudeSettings | None = None


def train(job: Job, directory: Path, report: Report = lambda progress: None, stop_after: int | None = None) -> dict[str, float]:
    """Train the model of `job` in place, with checkpoints in `directory`; goes on from the last whole one there.

    stop_after: end after so many steps, as if interrupted then. Returns the mean loss of the last steps, the steps done and the
    seconds that this call took. Raises TrainingStopped; the last checkpoint is kept then.
    """
    settings, model = job.settings, job.model
    transformers.set_seed(job.seed)
    linears = encoder_modules(model).linears
    _prepare(model, settings)
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if _bfloat16(settings) and not torch.cuda.is_available():
            # the fused attention for CPUs falls back on slow products in bfloat16
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if job.masks is not None:
            stack.enter_context(frozen(linears, job.masks))
        distiller = None
        if job.teacher is not None and job.distillation is not None:
            job.teacher.to(_device())
            model.to(_device())
            distiller = stack.enter_context(Distiller(model, job.teacher, job.distillation))
        trainer = _Trainer(
            model=model,
            args=_arguments(settings, job.seed, directory),
            train_dataset=_Rows(job.features, accepted(model)),
            data_collator=pad,
            distiller=distiller,
        )
        watch = _Watch(trainer, job, directory, report, stop_after)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        try:
            with disk_errors():
                trainer.train(resume_from_checkpoint=last_checkpoint(directory))
        except OSError as error:
            raise TrainingStopped(
                f"step {trainer.state.global_step}: {directory} cannot be written ({error.strerror or error}); free some "
                f"space and resume from {kept_checkpoint(directory)}"
            ) from None
    if job.masks is not None:
        apply_masks(linears, job.masks)
    model.to("cpu").eval()
    return {
        "loss": watch.mean_loss(),
        "steps": float(trainer.state.global_step),
        "seconds": time.perf_counter() - started,
    }


def last_checkpoint(directory: Path) -> str | None:
    """The last whole checkpoint in `directory`; one that was being written when the process died is removed."""
    found: dict[int, Path] = {}
    for path in directory.glob("checkpoint-*"):
        try:
            # the Trainer writes this file last
            found[int(json.loads((path / "trainer_state.json").read_text())["global_step"])] = path
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return str(found[max(found)]) if found else None


def kept_checkpoint(directory: Path) -> str:
    """The name of the last checkpoint, for messages."""
    found = last_checkpoint(directory)
    return Path(found).name if found else "the start, there is no checkpoint yet"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bfloat16(settings: TrainingSettings) -> bool:
    if settings.precision == "auto":
        return torch.cuda.is_available() or bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return settings.precision == "bfloat16"


def _prepare(model: nn.Module, settings: TrainingSettings) -> None:
    if settings.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.dropout
    if settings.freeze_embeddings:
        encoder_modules(model).embeddings.requires_grad_(False)


def _arguments(settings: TrainingSettings, seed: int, directory: Path) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,  # a number below 1 is a share
        weight_decay=settings.weight_decay,
        seed=seed,
        use_cpu=not cuda,
        bf16=_bfloat16(settings),
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
    )


class _Rows(torch.utils.data.Dataset[Feature]):
    """Features without the inputs that the model does not take."""

    def __init__(self, features: Sequence[Feature], names: frozenset[str]) -> None:
        self.features, self.names = features, names

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Feature:
        return {name: value for name, value in self.features[index].items() if name in self.names}


class LikeLengths(Sampler[int]):
    """Indices in an order that is random, but in which each batch has rows of like lengths, so that little is padded.

    Rows are shuffled, sorted by length within pools of 50 batches, and the batches shuffled. The order depends on seed and
    epoch alone, which resuming relies on.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = 50 * self.batch_size
        order = [i for start in range(0, len(order), pool) for i in sorted(order[start : start + pool], key=self._length)]
        whole = len(order) // self.batch_size
        batches = [*torch.randperm(whole, generator=generator).tolist(), whole]  # what is less than a batch stays last
        for batch in batches:
            yield from order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _length(self, index: int) -> int:
        return self.lengths[index]


class _Trainer(Trainer):
    """The Trainer with the losses of a distiller, and a loss that must be finite."""

    def __init__(self, *, distiller: Distiller | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.distiller = distiller
        self.losses: list[Tensor] = []
        # the losses here are means over a batch already, which the Trainer need not divide by a count of tokens
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        lengths = [len(feature["input_ids"]) for feature in rows.features]
        return LikeLengths(lengths, self.args.per_device_train_batch_size, self.args.seed)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch; raises TrainingStopped where it is not finite."""
        outputs = model(**inputs)
        if self.distiller is not None:
            loss = self.distiller(outputs, inputs)[0]
        else:
            if outputs.get("loss") is None:
                raise InvalidInput("the rows have no labels, which give the loss; give rows with labels, or distil")
            loss = outputs["loss"]
        if not torch.isfinite(loss):
            self.stop("loss", float(loss.detach()))
        self.losses.append(loss.detach())
        return loss

    def stop(self, what: str, value: float) -> None:
        """End the training without writing another checkpoint."""
        directory = Path(str(self.args.output_dir))
        raise TrainingStopped(
            f"step {self.state.global_step + 1} of {self.state.max_steps}: {what} is {value}; the weights before it are in "
            f"{directory / kept_checkpoint(directory)}; lower learning_rate, or look at the data"
        )


class _Watch(TrainerCallback):
    """Checks gradients, keeps masks, prunes where it is due, and reports."""

    def __init__(self, trainer: _Trainer, job: Job, directory: Path, report: Report, stop_after: int | None) -> None:
        self.trainer, self.job, self.directory, self.report, self.stop_after = trainer, job, directory, report, stop_after
        self.linears = encoder_modules(job.model).linears
        self.pruner: GradualMagnitude | None = None
        self.first = 0
        self.started = 0.0
        self.recent: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights are those of the checkpoint by now, if there is one."""
        self.first, self.started = state.global_step, time.perf_counter()
        if self.job.magnitude is not None:
            self.pruner = GradualMagnitude(self.job.model, self.job.magnitude, state.max_steps)
            if state.global_step:
                self.pruner.masks |= masks_of(self.pruner.linears, self.job.magnitude.block)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A gradient that is not finite would spoil all weights, and with them the next checkpoint."""
        norms = [p.grad.sum() for p in self.job.model.parameters() if p.grad is not None]
        total = torch.stack(norms).sum() if norms else torch.zeros(())
        if not torch.isfinite(total):
            self.trainer.stop("a gradient", float(total))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, before a checkpoint is written."""
        if self.pruner is not None:
            self.pruner.step(state.global_step)
        elif self.job.masks is not None:
            apply_masks(self.linears, self.job.masks)
        self.recent = [*self.recent[-99:], *(float(loss) for loss in self.trainer.losses)]
        self.trainer.losses.clear()
        pace = (time.perf_counter() - self.started) / (state.global_step - self.first)
        left = pace * (state.max_steps - state.global_step)
        self.report(Progress(state.global_step, state.max_steps, self.mean_loss(), self.sparsity(), left))
        if self.stop_after is not None and state.global_step >= self.stop_after:
            control.should_training_stop = True

    def mean_loss(self) -> float:
        """Of the last 100 batches."""
        return sum(self.recent) / len(self.recent) if self.recent else 0.0

    def sparsity(self) -> float:
        """Share of pruned weights."""
        masks: Mapping[str, Tensor] | None = self.pruner.masks if self.pruner else self.job.masks
        return block_sparsity(masks) if masks else 0.0
