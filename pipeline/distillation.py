"""Losses that teach a compressed encoder to imitate the dense one: hidden states, embeddings and logits.

A `Distiller` watches student and teacher by forward hooks on their LayerNorms, so any transformers model of a supported
architecture works, with any head, under autocast and wrapped for data parallel training:

    with Distiller(student, teacher, settings) as distiller:
        outputs = student(**inputs)
        loss, parts = distiller(outputs, inputs)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from tilewright.errors import InvalidInput
from tilewright.pipeline.modules import encoder_modules

Weight = Annotated[float, Field(ge=0)]

LOGITS = ("logits", "start_logits", "end_logits")
"""Outputs of transformers' heads; those of question answering are over tokens, the others over classes."""


class DistillationSettings(BaseModel):
    """Weights of the parts of the loss.

    `attention` and `feed_forward` are the relative errors of the hidden states after each of the two parts of a layer,
    averaged over layers; `embedding` is that of the mean over tokens, as `embedding_loss`; `logits` is T^2 times the KL
    divergence at `temperature` T; `task` is the loss on labels, which the model itself returns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Weight = 0.5
    feed_forward: Weight = 0.5
    embedding: Weight = 0.0
    embedding_loss: Literal["cosine", "mse"] = "cosine"
    logits: Weight = 0.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    task: Weight = 0.0

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any((self.attention, self.feed_forward, self.embedding, self.logits, self.task)):
            raise ValueError("at least one weight must be above 0")
        return self


class Distiller:
    """Compares a student with a teacher of the same shape, layer by layer; a context within which hooks are installed."""

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: DistillationSettings) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.settings = settings
        self._student, self._reference = _Watch(student), _Watch(teacher)
        if len(self._student.norms) != len(self._reference.norms):
            layers = (len(watch.norms) // 2 for watch in (self._student, self._reference))
            raise InvalidInput("the student has {} layers, the teacher {}; give models of the same shape".format(*layers))

    def __enter__(self) -> Self:
        self._student.start()
        self._reference.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._student.stop()
        self._reference.stop()

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and its parts, detached and unweighted, for the student's last `outputs` on `inputs`."""
        settings = self.settings
        given = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            expected = self.teacher(**given)
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        ours, theirs = self._student.states, self._reference.states
        parts: dict[str, Tensor] = {}
        if settings.attention:
            parts["attention"] = hidden_states_loss(ours[0::2], theirs[0::2], mask)
        if settings.feed_forward:
            parts["feed_forward"] = hidden_states_loss(ours[1::2], theirs[1::2], mask)
        if settings.embedding:
            student, teacher = (mean_pool(states[-1], mask) for states in (ours, theirs))
            parts["embedding"] = embedding_loss(student, teacher, settings.embedding_loss)
        if settings.logits:
            parts["logits"] = _logits_loss(outputs, expected, mask, settings.temperature)
        if settings.task:
            parts["task"] = outputs["loss"]
        loss = torch.stack([getattr(settings, name) * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}


def hidden_states_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Squared error in parts of the teacher's variance over tokens, averaged over states f32[batch, tokens, channels].

    mask bool[batch, tokens] is true at tokens. Dividing by the variance gives layers of any scale equal weight.
    """
    return torch.stack([_relative_error(a, b, mask) for a, b in zip(student, teacher, strict=True)]).mean()


def embedding_loss(student: Tensor, teacher: Tensor, kind: Literal["cosine", "mse"]) -> Tensor:
    """1 - cosine of embeddings f32[batch, channels], or their mean squared error."""
    if kind == "mse":
        return functional.mse_loss(student, teacher)
    return (1 - functional.cosine_similarity(student, teacher)).mean()


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T), softmax(student / T)) over logits f32[rows, classes] (Hinton et al., arXiv 1503.02531)."""
    a, b = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    return functional.kl_div(a, b, reduction="batchmean", log_target=True) * temperature**2


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each sequence, f32[batch, channels]: the sentence embedding of BERT-like embedders."""
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1)


def _relative_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    ours, theirs = student[mask].float(), teacher[mask].float()
    return (ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum()


def _logits_loss(outputs: Any, expected: Any, mask: Tensor, temperature: float) -> Tensor:
    names = [name for name in LOGITS if name in outputs]
    if not names:
        raise InvalidInput("the model has no logits to distil; set the weight of logits to 0, or choose another task")
    losses = []
    for name in names:
        student, teacher = outputs[name], expected[name]
        if name != "logits":  # one distribution over the tokens of each sequence; padding has no share in it
            student, teacher = (logits.float().masked_fill(~mask, -1e4) for logits in (student, teacher))
        elif student.dim() == 3:  # one distribution over the classes for each token
            student, teacher = student[mask], teacher[mask]
        losses.append(logits_loss(student, teacher, temperature))
    return torch.stack(losses).mean()


class _Watch:
    """Keeps the outputs of a model's LayerNorms, two a layer, of its last run."""

    def __init__(self, model: nn.Module) -> None:
        layers = encoder_modules(model).layers
        self.norms = [norm for layer in layers for norm in (layer.attention_norm, layer.output_norm)]
        self.states: list[Tensor] = []
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        self.states = [torch.empty(0)] * len(self.norms)
        self.hooks = [norm.register_forward_hook(self._keep(index)) for index, norm in enumerate(self.norms)]

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.states = []

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.states[index] = output

        return hook
