"""`manifest.json` of an artifact: what the directory holds and what running it needs.

The dataclasses are the schema. Reading is strict: a missing, unknown or mistyped field is an `InvalidArtifact`
that names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tilewright.errors import InvalidArtifact
from tilewright.files import parse_json
from tilewright.program import Program

SCHEMA_VERSION = 4
GROUP = 16  # tokens per group of the compiled module's token axis

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
WORDPIECE = "wordpiece.bin"

MAX_TOKENS = 1 << 20
"""The largest `Limits.max_tokens`: 64 KB of activations each, for hidden size 768, make more than 50 GB of it already."""

INDEX_DTYPES = ("uint8", "uint16", "int32")
_INT32 = 2**31 - 1

InputName = Literal["input_ids", "attention_mask", "token_type_ids"]


@dataclass(frozen=True)
class Output:
    """One output: f32[batch, seq, width] `per` token, f32[batch, width] per sequence; `squeeze` drops a width of 1."""

    name: str
    per: Literal["token", "sequence"]
    width: int
    squeeze: bool = False


@dataclass(frozen=True)
class Head:
    """What the outputs mean; `raw` says nothing.

    problem_type: of sequence classification, by transformers' names: one class of all, any number of them, or values.
    pooling, normalized: of an embedding, how tokens became `sentence_embedding` and whether its L2 norm is 1.
    """

    kind: Literal["embedding", "question_answering", "sequence_classification", "token_classification", "raw"] = "raw"
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    pooling: Literal["mean", "cls", "max"] | None = None
    normalized: bool = False


HEAD_OUTPUTS: dict[str, dict[str, str]] = {
    "embedding": {"sentence_embedding": "sequence"},
    "question_answering": {"start_logits": "token", "end_logits": "token"},
    "sequence_classification": {"logits": "sequence"},
    "token_classification": {"logits": "token"},
    "raw": {},
}
"""The outputs that each kind of head must have, and what each is per."""


@dataclass(frozen=True)
class LayerRecord:
    """How one Linear [N, K] = [out, in] was compiled.

    block: as stored. density: share of weights in stored blocks. kernel: the workload's key. note: why a sparse block
    that was found is stored otherwise.
    """

    name: str
    shape: tuple[int, int]
    block: tuple[int, int] | None
    density: float
    kernel: str
    schedule: str
    note: str = ""


@dataclass(frozen=True)
class TuningRecord:
    """A tuning record that a kernel was compiled by, for one bucket of tokens.

    key: its workload's. gain: times faster than the default when both were measured in turns; low, high: the interval that
    holds it with 95 % confidence. peak: share of the core's peak that the kernel reached, on non-zeros.
    """

    key: str
    tokens: int
    gain: float
    low: float
    high: float
    peak: float


Role = Literal["values", "addresses", "vocab_size", "max_positions", "token_types"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a level's module: the tensor of the weights file that holds it, and what that must be to be safe.

    role: `values` may be any; of a table that ids look up, the limit that its number of rows equals; `addresses` are integers
    that kernels use as places in memory. The compiler writes down what those it packed are like: `lowest` and `highest`, and
    whether they are `ascending`. Kernels stay within their arrays for every array of which this holds.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    role: Role = "values"
    lowest: int = 0
    highest: int = 0
    ascending: bool = False


@dataclass(frozen=True)
class LevelRecord:
    """The module of one ISA level.

    features: what the CPU must have, by LLVM's names (avx2, fma, avx512vnni, amx-int8). library: its file. parameters: the
    kernels' parameters. layers: how Linears were compiled. tuning: by which records, by name of the kernel; those that
    are not in it have default decisions. program: the calls of kernels that run the model. run_tokens: how many tokens one run
    takes for each thread, if it has more than one sequence.
    """

    name: str
    features: tuple[str, ...]
    library: str
    parameters: dict[str, Parameter]
    layers: tuple[LayerRecord, ...] = ()
    tuning: dict[str, tuple[TuningRecord, ...]] = field(default_factory=dict)
    program: Program = field(default_factory=Program)
    run_tokens: int = 256

    def missing(self, available: Collection[str]) -> tuple[str, ...]:
        """The features it needs that `available` lacks."""
        return tuple(feature for feature in self.features if feature not in available)


def library_name(level: str) -> str:
    """File name of a level's module."""
    return f"model.{level}.so"


@dataclass(frozen=True)
class Limits:
    """Bounds on a call. `max_tokens` bounds one run of the module (a multiple of 16); larger batches are split."""

    vocab_size: int
    max_positions: int
    max_tokens: int
    token_types: int = 1


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. `levels` are listed from the least to the best; `files` holds the sha256 of every other file.

    In the file a last field, `checksum`, is the sha256 of all others as canonical JSON (keys sorted, no spaces).
    """

    levels: tuple[LevelRecord, ...]
    inputs: tuple[InputName, ...]
    outputs: tuple[Output, ...]
    limits: Limits
    architecture: str = ""
    head: Head = Head()
    labels: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, "checksum": checksum(fields)}, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Parse and check manifest.json; raises InvalidArtifact."""
        try:
            value = parse_json(text)
            stated = value.pop("checksum", None) if isinstance(value, dict) else None
            found = checksum(value)
        except (ValueError, RecursionError) as error:
            raise InvalidArtifact(f"{MANIFEST} is not valid JSON ({error}); it is truncated or foreign") from None
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise InvalidArtifact(
                f"{MANIFEST} has schema version {version!r}, expected {SCHEMA_VERSION}; compile the model again"
            )
        if stated != found:
            raise InvalidArtifact(
                f"{MANIFEST} was altered: its checksum is {found[:12]}..., it says {str(stated)[:12]}...; "
                "copy or compile it again"
            )
        manifest = _decode(Manifest, value, "")
        if problem := _inconsistency(manifest):
            raise InvalidArtifact(f"{MANIFEST}: {problem}; compile the model again")
        return manifest


def checksum(fields: Any) -> str:
    """Hex sha256 of a manifest's fields, whatever their order and spacing."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _inconsistency(manifest: Manifest) -> str | None:
    """Why the fields, each well typed, cannot go together."""
    limits, files = manifest.limits, manifest.files
    if "input_ids" not in manifest.inputs:
        return "`inputs` must list input_ids"
    if not 0 < len({output.name for output in manifest.outputs}) == len(manifest.outputs):
        return "`outputs` must be distinct and not empty"
    if any(output.width < 1 or (output.squeeze and output.width > 1) for output in manifest.outputs):
        return "an output's `width` must be positive, and 1 to `squeeze`"
    per = {output.name: output.per for output in manifest.outputs}
    if any(per.get(name) != kind for name, kind in HEAD_OUTPUTS[manifest.head.kind].items()):
        return f"a {manifest.head.kind} head has the outputs {', '.join(HEAD_OUTPUTS[manifest.head.kind])}"
    if (manifest.head.problem_type is None) == (manifest.head.kind == "sequence_classification"):
        return "`head.problem_type` must be given for sequence classification, and for nothing else"
    if (manifest.head.pooling is None) == (manifest.head.kind == "embedding"):
        return "`head.pooling` must be given for an embedding, and for nothing else"
    if min(dataclasses.astuple(limits)) < 1:
        return "`limits` must be positive"
    if limits.max_tokens > MAX_TOKENS or max(dataclasses.astuple(limits)) > _INT32:
        return f"`max_tokens` must be at most {MAX_TOKENS}, the other limits below 2**31"
    if limits.max_tokens % GROUP or limits.max_tokens < limits.max_positions:
        return f"`max_tokens` must be a multiple of {GROUP} that holds a sequence of `max_positions`"
    if not 0 < len({level.name for level in manifest.levels}) == len(manifest.levels):
        return "`levels` must be distinct and not empty"
    if any(not 1 <= level.run_tokens <= MAX_TOKENS for level in manifest.levels):
        return f"`run_tokens` must be 1 to {MAX_TOKENS}"
    for name in (WEIGHTS, *(level.library for level in manifest.levels)):
        if name not in files:
            return f"`files` must list {name}"
    if any(Path(name).name != name or not name or name == MANIFEST or "\0" in name for name in files):
        return "`files` must be plain names, none of them the manifest's own"
    return _bad_parameter(manifest) or _bad_provenance(manifest.provenance)


def _bad_parameter(manifest: Manifest) -> str | None:
    for level in manifest.levels:
        for name, parameter in level.parameters.items():
            where = f"parameter {name!r} of {level.name}"
            if any(extent < 0 for extent in parameter.shape):
                return f"{where} has the shape {list(parameter.shape)}"
            if parameter.role == "addresses" and not (len(parameter.shape) and parameter.dtype in INDEX_DTYPES):
                return f"{where} holds addresses, which must be {' or '.join(INDEX_DTYPES)}"
            limit = getattr(manifest.limits, parameter.role, None)
            if limit is not None and parameter.shape[:1] != (limit,):
                return f"{where} has the shape {list(parameter.shape)}, `limits.{parameter.role}` is {limit}"
    return None


def _bad_provenance(provenance: dict[str, Any]) -> str | None:
    steps = provenance.get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return "`provenance.steps` must be a list of objects"
    for step in steps:
        notes = step.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            return "`notes` of `provenance.steps` must be lists of texts"
    return None


T = TypeVar("T")
_hints = cache(get_type_hints)


def _decode(cls: type[T], value: Any, path: str) -> T:
    """Build the dataclass `cls` from parsed JSON; every field is checked against its annotation."""
    if not isinstance(value, dict):
        raise _mismatch(path, "an object", value)
    hints, fields = _hints(cls), {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    for name in value.keys() - fields.keys():
        raise InvalidArtifact(f"{MANIFEST}: unknown field {path + name!r}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise InvalidArtifact(f"{MANIFEST}: field {path + name!r} is missing")
    return cls(**{name: _convert(hints[name], item, path + name) for name, item in value.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _convert_any(args, value, path)
    if origin is Literal:
        if value not in args:
            raise _mismatch(path, "one of " + ", ".join(args), value)
        return value
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not ... and len(value) != len(args)):
            raise _mismatch(path, "a list" if args[-1] is ... else f"a list of {len(args)}", value)
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(path, "an object", value)
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _decode(cast(type[Any], hint), value, path + ".")
    # a bool is an int to Python, and an int will do for a float
    if not isinstance(value, (int, float) if hint is float else hint) or isinstance(value, bool) != (hint is bool):
        raise _mismatch(path, hint.__name__, value)
    return value


def _convert_any(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    """`value` as the first of `hints` that it is; what is wrong with it as the last of them, if it is none."""
    if value is None and NoneType in hints:
        return None
    *others, last = (hint for hint in hints if hint is not NoneType)
    for hint in others:
        try:
            return _convert(hint, value, path)
        except InvalidArtifact:
            continue
    return _convert(last, value, path)


def _mismatch(path: str, expected: str, value: Any) -> InvalidArtifact:
    found = json.dumps(value)
    found = found if len(found) <= 40 else found[:37] + "..."
    return InvalidArtifact(f"{MANIFEST}: field {path.rstrip('.')!r} must be {expected}, found {found}")
