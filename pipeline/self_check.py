"""Whether a Hugging Face directory was read as transformers reads it: every layer's values, on random inputs with padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tilewright.codegen.model import EncoderModel
from tilewright.errors import UnsupportedModel
from tilewright.frontend.probe import RAGGED, check_model, make_probe

_REMEDY = "transformers computes something else; please report the model's config.json"


def check_against_transformers(model: EncoderModel, directory: Path) -> None:
    """Raise UnsupportedModel unless the float `model` computes what transformers does with the files in `directory`.

    Compared are the embeddings, each layer and the head's logits. Sentence embeddings are made of the last layer by
    sentence-transformers, which is not run.
    """
    types = model.embeddings.token_type
    lengths = [min(length, model.config.max_positions) for length in RAGGED]
    probe = make_probe(
        np.random.default_rng(0),
        lengths,
        max(lengths),
        model.config.vocab_size,
        1 if types is None else len(types),
        _padding(directory),
    )
    with torch.inference_mode():
        inputs = {
            name: torch.from_numpy(array) for name, array in probe.inputs.items() if types is not None or "type" not in name
        }
        theirs = _load(directory)(**inputs, output_hidden_states=True)
    names = {"question_answering": ("start_logits", "end_logits"), "none": ()}.get(model.head.kind, ("logits",))
    check_model(
        model,
        probe,
        [values.numpy() for values in theirs.hidden_states],
        {name: theirs[name].numpy() for name in names},
        _REMEDY,
    )


def _settings(directory: Path) -> dict[str, object]:
    return dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))


def _padding(directory: Path) -> int:
    padding = _settings(directory).get("pad_token_id")
    return padding if isinstance(padding, int) else 0


def _load(directory: Path) -> torch.nn.Module:
    names = _settings(directory).get("architectures")
    name = names[0] if isinstance(names, list) and names else "AutoModel"
    try:
        loaded = getattr(transformers, str(name)).from_pretrained(directory, attn_implementation="eager").eval()
    except Exception as error:  # transformers has no base class of its own errors
        message = " ".join(str(error).split())[:200]
        raise UnsupportedModel(f"transformers cannot load {directory}: {message}; drop --self-check to go on without") from None
    assert isinstance(loaded, torch.nn.Module)
    return loaded
