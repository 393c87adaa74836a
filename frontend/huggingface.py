"""Hugging Face directories: config.json, *.safetensors and tokenizer.json, float or quantised, to `EncoderModel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from tilewright.codegen.model import (
    Attention,
    Embeddings,
    EncoderConfig,
    EncoderModel,
    Head,
    Layer,
    LayerNorm,
    Linear,
    ProblemType,
)
from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.files import read_text
from tilewright.frontend.compressed import check_quantization, embedding_table, float_linear, int8_linear, positive
from tilewright.frontend.config import read_json
from tilewright.frontend.families import FAMILIES
from tilewright.frontend.family import ACTIVATIONS, Family, HeadNames
from tilewright.frontend.sentence_transformers import MODULES, UNSTATED_POOLING, Embedding, read_embedding
from tilewright.frontend.settings import epsilon, positive_integer, read_settings
from tilewright.frontend.tensors import Checkpoint, read_safetensors
from tilewright.tokenizer import read_tokenizer

ReadLinear = Callable[[Checkpoint, str, int, int, list[str]], Linear]

# settings that change the arithmetic: key -> the only value (besides absence) that is supported
_FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


def load_directory(path: Path, read: Callable[[Path, str], Checkpoint] | None = None) -> EncoderModel:
    """Read a Hugging Face directory; `read` gives the tensors of a directory, without a prefix, where they are no safetensors.

    Raises UnsupportedModel for an architecture, setting or quantisation that is not supported, and InvalidModel for a
    damaged file or a tensor that is missing, unexpected, of the wrong shape, or not finite.
    """
    embedding = read_embedding(path)
    path = embedding.transformer if embedding else path
    settings = read_settings(path / "config.json")
    family, head = _family_and_head(settings)
    if embedding is not None and head.kind != "none":
        raise UnsupportedModel(f"{MODULES} describes sentence embeddings, config.json a {head.kind} head; remove one of them")
    config = _config(settings, family, classifier="classification" in head.kind)
    checkpoint = (read or _read_safetensors)(path, family.prefix)
    quantization = settings.get("quantization_config")
    if quantization is not None:
        check_quantization(quantization)
    reader = _Reader(config, settings, family, checkpoint, quantization is not None)
    model = reader.model(head, embedding, _tokenizer(path))
    reader.checkpoint.finish()
    return model


def _read_safetensors(path: Path, prefix: str) -> Checkpoint:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InvalidModel(f"{path} holds no *.safetensors file; save the model with safe_serialization=True")
    return read_safetensors(files, prefix)


def read_config(file: Path) -> tuple[EncoderConfig, int]:
    """Sizes and number of layers from a config.json alone; raises as `load_directory` does, weights are not looked for."""
    settings = read_settings(file)
    family, _ = _family_and_head(settings)
    return _config(settings, family, classifier=False), positive_integer(settings, family.settings.num_layers)


class _Reader:
    """Takes the parts of one encoder from a checkpoint, in the order in which data passes through them."""

    def __init__(
        self, config: EncoderConfig, settings: dict[str, Any], family: Family, checkpoint: Checkpoint, quantized: bool
    ) -> None:
        self.config = config
        self.settings = settings
        self.family = family
        self.checkpoint = checkpoint
        self.quantized = quantized
        self.notes: list[str] = []
        self.eps = epsilon(settings, family.settings.layer_norm_eps)

    def model(self, head: HeadNames, embedding: Embedding | None, tokenizer: str | None) -> EncoderModel:
        embeddings = self.embeddings()
        count = positive_integer(self.settings, self.family.settings.num_layers)
        layers = tuple(self.layer(self.family.layer.format(i)) for i in range(count))
        parts = (embeddings, layers, self.head(head, embedding))
        ignored = self.checkpoint.ignore((*self.family.unused, *head.unused))
        if ignored:
            self.notes.append(f"unused tensors: {', '.join(ignored)}")
        return EncoderModel(self.config, *parts, tokenizer, tuple(self.notes))

    def embeddings(self) -> Embeddings:
        family, config, floats = self.family, self.config, self.checkpoint.floats
        hidden, first = config.hidden_size, family.first_position
        types = None
        if family.token_type and family.settings.token_types:
            count = positive_integer(self.settings, family.settings.token_types)
            types = floats(f"{family.token_type}.weight", count, hidden)
        return Embeddings(
            word=embedding_table(self.checkpoint, family.word, config.vocab_size, hidden),
            position=floats(f"{family.position}.weight", config.max_positions + first, hidden)[first:],
            token_type=types,
            norm=self.norm(family.embeddings_norm),
        )

    def layer(self, prefix: str) -> Layer:
        family, hidden, wide = self.family, self.config.hidden_size, self.config.intermediate_size
        query, key, value, output = (
            self.linear(prefix + name, hidden, hidden) for name in (family.query, family.key, family.value, family.output)
        )
        if not query.input == key.input == value.input:
            raise InvalidModel(f"{prefix}{family.attention}: query, key and value must share one input scale and zero point")
        scales = [
            positive(self.checkpoint, f"{prefix}{family.attention}.{operand}_scale") if self.quantized else None
            for operand in "qkv"
        ]
        return Layer(
            attention=Attention(query, key, value, output, *scales),
            attention_norm=self.norm(prefix + family.attention_norm),
            up=self.linear(prefix + family.up, wide, hidden),
            down=self.linear(prefix + family.down, hidden, wide),
            output_norm=self.norm(prefix + family.output_norm),
        )

    def head(self, names: HeadNames, embedding: Embedding | None) -> Head:
        hidden = self.config.hidden_size
        outputs = {"none": None, "question_answering": 2}.get(names.kind, len(self.config.labels))
        if names.projection is None or outputs is None:
            if embedding is None:
                self.notes.append(UNSTATED_POOLING)
                return Head(names.kind)
            self.notes.extend(embedding.notes)
            return Head(names.kind, pooling=embedding.pooling, normalize=embedding.normalize)
        pre = float_linear(self.checkpoint, names.pre, hidden, hidden, self.notes) if names.pre else None
        projection = float_linear(self.checkpoint, names.projection, outputs, hidden, self.notes)
        problem = problem_type(self.settings, outputs) if names.kind == "sequence_classification" else None
        return Head(names.kind, projection, pre, names.pre_activation, problem_type=problem)

    def linear(self, name: str, n: int, k: int) -> Linear:
        read: ReadLinear = int8_linear if self.quantized else float_linear
        return read(self.checkpoint, name, n, k, self.notes)

    def norm(self, name: str) -> LayerNorm:
        hidden, floats = self.config.hidden_size, self.checkpoint.floats
        return LayerNorm(floats(f"{name}.weight", hidden), floats(f"{name}.bias", hidden), self.eps)


def _family_and_head(settings: dict[str, Any]) -> tuple[Family, HeadNames]:
    name = str(settings.get("model_type"))
    if name not in FAMILIES:
        raise UnsupportedModel(f"architecture {name} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    architectures = settings.get("architectures") or list(family.heads)[:1]
    if architectures[0] not in family.heads:
        raise UnsupportedModel(f"model class {architectures[0]} is not supported; supported: {', '.join(family.heads)}")
    for key, supported in _FIXED.items():
        if settings.get(key, supported) != supported:
            raise UnsupportedModel(f"{key} is {settings[key]} in config.json; supported: {supported}")
    return family, family.heads[architectures[0]]


def problem_type(settings: Mapping[str, Any], labels: int) -> ProblemType | None:
    """What config.json says of the meaning of `labels` logits of a sequence; raises for what is not supported."""
    stated = settings.get("problem_type")
    if stated is not None and stated not in get_args(ProblemType):
        raise UnsupportedModel(f"problem_type is {stated!r} in config.json; supported: {', '.join(get_args(ProblemType))}")
    if stated == "single_label_classification" and labels == 1:
        raise InvalidModel("config.json: problem_type single_label_classification has a single label to choose from")
    return stated


def _config(settings: dict[str, Any], family: Family, classifier: bool) -> EncoderConfig:
    keys = family.settings
    activation = str(settings.get(keys.activation))
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {activation} is not supported; supported: {', '.join(ACTIVATIONS)}")
    hidden, heads = positive_integer(settings, keys.hidden_size), positive_integer(settings, keys.num_heads)
    if hidden % heads:
        raise InvalidModel(f"config.json: {keys.hidden_size} {hidden} is not a multiple of {keys.num_heads} {heads}")
    # transformers leaves id2label out of config.json when the labels are its own default two
    labels = (settings.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}) if classifier else {}
    return EncoderConfig(
        architecture=family.model_type,
        hidden_size=hidden,
        num_heads=heads,
        intermediate_size=positive_integer(settings, keys.intermediate_size),
        vocab_size=positive_integer(settings, "vocab_size"),
        max_positions=_positions(settings, family),
        activation=ACTIVATIONS[activation],
        labels=tuple(str(labels[key]) for key in sorted(labels, key=int)),
    )


def _positions(settings: dict[str, Any], family: Family) -> int:
    """Tokens that the model takes."""
    first, rows = family.first_position, positive_integer(settings, "max_position_embeddings")
    if first and settings.get("pad_token_id", first - 1) != first - 1:
        raise UnsupportedModel(f"pad_token_id is {settings['pad_token_id']} in config.json; supported: {first - 1}")
    if rows <= first:
        raise InvalidModel(f"config.json: max_position_embeddings is {rows}, of which {first} are not for tokens")
    return rows - first


def _tokenizer(path: Path) -> str | None:
    file = path / "tokenizer.json"
    if not file.exists():
        return None
    read_json(file, dict)
    text = read_text(file)
    try:
        read_tokenizer(text)
    except ValueError as error:
        raise InvalidModel(f"{file} is not a tokenizer ({error}); copy the whole directory of the model") from None
    return text
