"""Directories whose weights are PyTorch's pickles, read by weights-only loading, which runs no code of theirs."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tilewright.codegen.model import EncoderModel
from tilewright.errors import InvalidModel
from tilewright.files import open_regular
from tilewright.frontend.huggingface import load_directory
from tilewright.frontend.tensors import Checkpoint, plain_name

WEIGHTS = "pytorch_model.bin"


def is_torch_directory(path: Path) -> bool:
    """Whether `path` holds a Hugging Face model with no weights but PyTorch's."""
    return (path / "config.json").exists() and (path / WEIGHTS).exists() and not any(path.glob("*.safetensors"))


def load_torch_directory(path: Path) -> EncoderModel:
    """Read a Hugging Face directory whose weights are in pytorch_model.bin; raises as `frontend.load` does."""
    return load_directory(path, _read)


def _read(directory: Path, prefix: str) -> Checkpoint:
    file = directory / WEIGHTS
    try:
        with open_regular(file) as opened:
            state = torch.load(opened, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidModel(f"{file} does not hold weights only ({reason}); save the model as safetensors") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InvalidModel(f"{file} does not hold a state dict of tensors; save the model as safetensors")
    tensors: dict[str, Any] = {}
    for stored, tensor in state.items():
        if (name := plain_name(str(stored), prefix)) in tensors:
            raise InvalidModel(f"tensor {stored} occurs twice in {file}; save the model as safetensors")
        dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
        tensors[name] = (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
    return Checkpoint(tensors)
