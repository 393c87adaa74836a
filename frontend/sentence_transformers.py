"""Directories of sentence-transformers: which modules follow the encoder, and so what its sentence embedding is.

`modules.json` lists the modules in order: a Transformer, a Pooling with a config.json of its own, and perhaps a Normalize.
Old files have a boolean for each way of pooling (`pooling_mode_cls_token`), new ones `pooling_mode`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

from tilewright.codegen.model import EncoderModel, Head, Pooling
from tilewright.errors import UnsupportedModel
from tilewright.frontend.config import read_json, validated

MODULES = "modules.json"
UNSTATED_POOLING = "the checkpoint does not say how to pool: sentence_embedding is the mean over the tokens, not normalised"
"""Note on a model without a head of which nothing says what its sentence embedding is."""

SETTINGS = ("sentence_bert_config.json", "sentence_distilbert_config.json")
SUPPORTED = "Transformer, Pooling, Normalize"
_STATED = ["Transformer", "Pooling"]
_WRITTEN: dict[Pooling, str] = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}


@dataclass(frozen=True)
class Embedding:
    """What a directory of sentence-transformers says about its sentence embeddings. transformer: where its encoder lies."""

    transformer: Path
    pooling: Pooling
    normalize: bool
    notes: tuple[str, ...] = ()


class _Module(BaseModel):
    model_config = ConfigDict(strict=True)
    path: str
    type: str

    @property
    def kind(self) -> str:
        """The class without its package, which has moved between versions."""
        return self.type.rpartition(".")[2]


class _Pooling(BaseModel):
    model_config = ConfigDict(strict=True)
    pooling_mode: list[str] = ["mean"]
    include_prompt: bool = True

    @model_validator(mode="before")
    @classmethod
    def _one_form(cls, value: Any) -> Any:
        """Bring the three ways of naming the modes to one: booleans, a name, a list of names."""
        if not isinstance(value, dict):
            return value
        if isinstance(mode := value.get("pooling_mode"), str):
            return {**value, "pooling_mode": [mode]}
        flags = {key: flag for key, flag in value.items() if key.startswith("pooling_mode_")}
        for key, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{key} is {flag!r}, expected true or false")
        named = [
            key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
            for key, flag in flags.items()
            if flag
        ]
        return {"pooling_mode": named or ["mean"], **value} if flags else value


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True)
    do_lower_case: bool | None = False


class _Prompts(BaseModel):
    model_config = ConfigDict(strict=True)
    default_prompt_name: str | None = None


def read_embedding(directory: Path) -> Embedding | None:
    """What the sentence-transformers directory `directory` says; None if it is none (it has no modules.json).

    Raises InvalidModel for damaged files, and UnsupportedModel, which names it, for a module or a way of pooling that is not
    supported.
    """
    if not (directory / MODULES).exists():
        return None
    modules = validated(TypeAdapter(list[_Module]), read_json(directory / MODULES), MODULES)
    kinds = [module.kind for module in modules]
    for kind in kinds:
        if kind not in SUPPORTED.split(", "):
            raise UnsupportedModel(f"module {kind} of {MODULES} is not supported; supported: {SUPPORTED}")
    if kinds not in (_STATED, [*_STATED, "Normalize"]):
        raise UnsupportedModel(f"{MODULES} lists {', '.join(kinds) or 'nothing'}; supported: {SUPPORTED} in this order")
    transformer = _below(directory, modules[0])
    _check_lower_case(directory, transformer)
    return Embedding(transformer, _pooling(_below(directory, modules[1])), "Normalize" in kinds, _prompt_notes(directory))


def _below(directory: Path, module: _Module) -> Path:
    place = directory / module.path
    if "\0" in module.path or not place.resolve().is_relative_to(directory.resolve()):
        raise UnsupportedModel(f"{MODULES}: module {module.kind} lies at {module.path!r}, outside of the directory")
    return place


def _pooling(place: Path) -> Pooling:
    name = f"{place.name}/config.json"
    settings = validated(TypeAdapter(_Pooling), read_json(place / "config.json"), name)
    if not settings.include_prompt:
        raise UnsupportedModel(f"{name} leaves prompts out of the pooling (include_prompt false), which is not supported")
    (mode, *more) = settings.pooling_mode or ["nothing"]
    for pooling in get_args(Pooling):
        if not more and mode == pooling:
            return pooling  # type: ignore[no-any-return]  # one of Pooling's own names
    asked = " and ".join(settings.pooling_mode) or "nothing"
    raise UnsupportedModel(f"{name} pools by {asked}; supported: one of {', '.join(get_args(Pooling))}")


def _check_lower_case(directory: Path, transformer: Path) -> None:
    """Lower case that sentence-transformers makes itself would be missing before our tokenizer."""
    for place in {directory, transformer}:
        for name in SETTINGS:
            if not (place / name).exists():
                continue
            settings = validated(TypeAdapter(_Settings), read_json(place / name), name)
            if settings.do_lower_case and not _lowercases(transformer / "tokenizer.json"):
                raise UnsupportedModel(
                    f"{name} asks for lower case (do_lower_case), which tokenizer.json does not make; set its normalizer's "
                    "lowercase and then do_lower_case to false"
                )


def _lowercases(tokenizer: Path) -> bool:
    if not tokenizer.exists():
        return True  # token ids are all that the model can be given
    normalizer = read_json(tokenizer, dict).get("normalizer")
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    return any(isinstance(part, dict) and (part.get("type") == "Lowercase" or part.get("lowercase") is True) for part in parts)


def _prompt_notes(directory: Path) -> tuple[str, ...]:
    file = directory / "config_sentence_transformers.json"
    if not file.exists():
        return ()
    name = validated(TypeAdapter(_Prompts), read_json(file), file.name).default_prompt_name
    return () if name is None else (f"the default prompt {name!r} of {file.name} is not put before texts; do so yourself",)


def write_embedding(model: EncoderModel, directory: Path) -> None:
    """Write the modules.json and what it names beside a checkpoint without a head, unless all is as where nothing is stated."""
    head = model.head
    if head.kind != "none" or (head.pooling, head.normalize) == (Head.pooling, Head.normalize):
        return
    kinds = [*_STATED, *(["Normalize"] if head.normalize else [])]
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    modules = [
        {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for index, (place, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    for place in paths[1:]:
        (directory / place).mkdir()
    pooling = {"word_embedding_dimension": model.config.hidden_size} | {
        f"pooling_mode_{name}": name == _WRITTEN[head.pooling] for name in _WRITTEN.values()
    }
    (directory / paths[1] / "config.json").write_text(json.dumps(pooling, indent=2) + "\n", "utf-8")
    (directory / MODULES).write_text(json.dumps(modules, indent=2) + "\n", "utf-8")
