"""Float models for training, and models that answer: a transformers module, a compiled artifact, or ONNX Runtime.

What answers is a `Predict`: it takes the features of a task and returns outputs by name, however the model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from tilewright.codegen.model import Head
from tilewright.errors import InvalidInput, InvalidModel
from tilewright.frontend import load
from tilewright.pipeline.tasks.base import Feature, Outputs, Predict, Task, pad

Progress = Callable[[int, int], None]
"""Called with the number of sequences done and their total."""

BATCH = 32

SPANS = ("start_logits", "end_logits")
ANSWERS = (*SPANS, "logits", "sentence_embedding")
"""Outputs that tasks read. SPANS are f32[batch, tokens]; logits of three axes are per token, too."""


def load_module(task: Task, path: Path, *, needs_head: bool = True) -> nn.Module:
    """The float checkpoint in the directory `path` as the task's transformers model, in eval mode.

    Raises InvalidModel for a directory that transformers cannot read, or whose head is not the task's: its weights would be
    random. Before training they may be.
    """
    load(path)  # its errors are of one line and name what would work
    try:
        with quiet():
            model, info = getattr(transformers, task.model).from_pretrained(
                path, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidModel(f"{path} cannot be read by transformers: {' '.join(str(error).split())[:200]}") from None
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name or task.name == "sequence_classification")
    if missing and needs_head:
        raise InvalidModel(
            f"{path} has no {task.name} head ({missing[0]} is missing); give a model that was trained for the task"
        )
    return model.eval()  # type: ignore[no-any-return]  # transformers is not annotated there


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context transformers shows neither progress nor warnings; ours are shown instead."""
    logging: Any = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def accepted(model: nn.Module) -> frozenset[str]:
    """Names of the inputs that a model takes; DistilBERT has no token types."""
    return frozenset(inspect.signature(model.forward).parameters)


def module_predict(model: nn.Module, head: Head, progress: Progress = lambda done, total: None) -> Predict:
    """Answers of a transformers `model`; `head` says how the embedding of one without a head is pooled."""
    names = accepted(model)
    device = next(model.parameters()).device

    def run(batch: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
        with torch.inference_mode():
            outputs = model(**{name: value.to(device) for name, value in batch.items() if name in names})
        found = {name: value.float().cpu() for name, value in outputs.items() if isinstance(value, Tensor)}
        if head.kind == "none":
            found["sentence_embedding"] = pool(found["last_hidden_state"], batch["attention_mask"], head)
        return {name: value.numpy() for name, value in found.items()}

    return _in_batches(run, progress)


def pool(states: Tensor, mask: Tensor, head: Head) -> Tensor:
    """Embedding f32[batch, channels] of states f32[batch, tokens, channels] as `head` says."""
    weights = mask[..., None].float()
    if head.pooling == "cls":
        rows = states[:, 0]
    elif head.pooling == "max":
        rows = states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    else:
        rows = (states * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(rows, dim=-1) if head.normalize else rows


def engine_predict(engine: Any, inputs: Sequence[str], progress: Progress = lambda done, total: None) -> Predict:
    """Answers of an `Engine`, or of `OnnxRuntime`, which takes `inputs`."""

    def run(batch: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
        return dict(engine(**{name: batch[name].numpy() for name in inputs}))

    return _in_batches(run, progress)


def _in_batches(run: Callable[[Mapping[str, Tensor]], Mapping[str, NDArray[np.float32]]], progress: Progress) -> Predict:
    """Batches of like lengths, so that little is padded; outputs come back in order and without padding."""

    def predict(features: Sequence[Feature]) -> list[Outputs]:
        if not features:
            raise InvalidInput("there is nothing to answer; give a file with some rows")
        inputs = [{name: row[name] for name in ("input_ids", "token_type_ids")} for row in features]
        order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]["input_ids"]))
        results: list[Outputs] = [{}] * len(inputs)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            batch = pad([inputs[index] for index in part])
            outputs = {name: value for name, value in run(batch).items() if name in ANSWERS}
            for row, index in enumerate(part):
                count = len(inputs[index]["input_ids"])
                # copies, so that the padded batch can be freed
                results[index] = {
                    name: np.array(value[row, :count] if name in SPANS or value.ndim == 3 else value[row])
                    for name, value in outputs.items()
                }
            progress(start + len(part), len(order))
        return results

    return predict
