"""Whole tiny models, compiled and run: against the NumPy oracle and themselves in other batches; and compiles that fail."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tilewright
from tests import oracle, tiny
from tests.kernel_harness import EXAMPLES, HOST, level, runs_here
from tilewright.codegen.model import EncoderModel, Linear
from tilewright.compiler import STAGES
from tilewright.errors import ArtifactTargetMismatch, InvalidInput, InvalidModel
from tilewright.frontend import load
from tilewright.pipeline import quantize
from tilewright.schedules.isa import ISAS, resolve

Array = NDArray[np.float32]
Ids = NDArray[np.int64]
NATIVE = resolve("native", HOST).name
LEVELS = list(dict.fromkeys(["portable", "avx2", NATIVE]))
CLASSES = [
    "BertModel",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
]
FINE, SQUARE, COARSE = (4, 1), (4, 4), (16, 4)
Blocks = tuple[tuple[tuple[int, int] | None, ...], ...]
"""Blocks of query, key and value; of output; of up; of down; for each of the two layers."""
SPARSITY: dict[str, Blocks] = {
    "dense": ((None,) * 4,) * 2,
    "fine": ((FINE,) * 4,) * 2,
    "coarse": ((COARSE,) * 4,) * 2,
    "mixed": ((FINE, COARSE, SQUARE, FINE), (COARSE, SQUARE, None, FINE)),
}


class Compiled:
    """Artifacts of this module by model and level, made on first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.models: dict[tuple[str, str], EncoderModel] = {}
        self.artifacts: dict[tuple[str, str, str], Path] = {}

    def model(self, name: str, sparsity: str = "dense") -> EncoderModel:
        """A tiny model of transformers class `name`, pruned as `sparsity` says and quantised."""
        if (name, sparsity) not in self.models:
            place = self.directory / f"{name}-{sparsity}"
            source = prune(load(tiny.save(tiny.build(name), place)), SPARSITY[sparsity])
            self.models[name, sparsity] = load(quantize(source, tiny.texts(40), place / "int8"))
        return self.models[name, sparsity]

    def artifact(self, name: str, sparsity: str, isa: str) -> Path:
        key = name, sparsity, isa
        if key not in self.artifacts:
            output = self.directory / f"{'-'.join(key)}.tw"
            self.artifacts[key] = tilewright.compile(self.model(name, sparsity), isa, output, sparse="always").path
        return self.artifacts[key]

    def engine(self, name: str, sparsity: str, isa: str, threads: int = 1) -> tilewright.Engine:
        return tilewright.load(self.artifact(name, sparsity, isa), num_threads=threads)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("compiled"))


def prune(model: EncoderModel, blocks: Blocks) -> EncoderModel:
    """Zero four of five of these blocks, at random."""
    random = np.random.default_rng(0)

    def pruned(linear: Linear, block: tuple[int, int] | None) -> Linear:
        if block is None:
            return linear
        n, k = linear.weight.shape
        mask = np.kron(random.random((n // block[0], k // block[1])) < 0.2, np.ones(block)).astype(np.float32)
        return replace(linear, weight=linear.weight * mask)

    layers = []
    for layer, (qkv, output, up, down) in zip(model.layers, blocks, strict=True):
        own = layer.attention
        attention = replace(
            own,
            query=pruned(own.query, qkv),
            key=pruned(own.key, qkv),
            value=pruned(own.value, qkv),
            output=pruned(own.output, output),
        )
        layers.append(replace(layer, attention=attention, up=pruned(layer.up, up), down=pruned(layer.down, down)))
    return replace(model, layers=tuple(layers))


def padded(sequences: Sequence[Ids], types: Sequence[Ids] | None = None, width: int | None = None) -> dict[str, Ids]:
    """Arguments of an engine, padded on the right with an id that would be refused if it were read."""
    shape = len(sequences), width or max(map(len, sequences))
    arrays = {"input_ids": np.full(shape, -1), "attention_mask": np.zeros(shape, np.int64)}
    if types is not None:
        arrays["token_type_ids"] = np.full(shape, -1)
    for row, ids in enumerate(sequences):
        arrays["input_ids"][row, : len(ids)] = ids
        arrays["attention_mask"][row, : len(ids)] = 1
        if types is not None:
            arrays["token_type_ids"][row, : len(ids)] = types[row]
    return arrays


def split(outputs: dict[str, Array], sequences: Sequence[Ids], per_token: Callable[[str], bool]) -> list[dict[str, Array]]:
    """Outputs of each sequence without its padding, which must be zero."""
    for name, array in outputs.items():
        for row, ids in enumerate(sequences):
            assert not per_token(name) or not array[row, len(ids) :].any()
    return [
        {name: array[row, : len(ids)] if per_token(name) else array[row] for name, array in outputs.items()}
        for row, ids in enumerate(sequences)
    ]


def run(engine: tilewright.Engine, sequences: Sequence[Ids], types: Sequence[Ids] | None = None) -> list[dict[str, Array]]:
    per = {output.name: output.per for output in engine.manifest.outputs}
    return split(engine(**padded(sequences, types)), sequences, lambda name: per[name] == "token")


def cosine(first: Array, second: Array) -> float:
    a, b = (array.ravel().astype(np.float64) for array in (first, second))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def joined(results: Sequence[dict[str, Array]], name: str) -> Array:
    return np.concatenate([result[name].ravel() for result in results])


def check_against_oracle(engine: tilewright.Engine, model: EncoderModel) -> None:
    sequences = tiny.sequences(1, 2, 15, 16, 17, 31, 32, *range(3, 30, 3), seed=3)
    types = [np.arange(len(ids)) % 2 for ids in sequences] if model.embeddings.token_type is not None else None
    ours, theirs = run(engine, sequences, types), oracle.forward(model, sequences, types)
    assert ours[0].keys() == theirs[0].keys()
    for name in ours[0]:
        assert cosine(joined(ours, name), joined(theirs, name)) >= 0.9999
        if "logits" in name:
            axis = -1 if name == "logits" else 0
            same = [a[name].argmax(axis) == b[name].argmax(axis) for a, b in zip(ours, theirs, strict=True)]
            assert np.concatenate([np.ravel(one) for one in same]).mean() >= 0.98


@pytest.mark.parametrize(("isa", "name"), [level(LEVELS[i % len(LEVELS)], name) for i, name in enumerate(CLASSES)])
def test_every_head(compiled: Compiled, isa: str, name: str) -> None:
    check_against_oracle(compiled.engine(name, "dense", isa), compiled.model(name))


@pytest.mark.parametrize(
    ("isa", "sparsity"),
    [*(level(isa, "mixed") for isa in LEVELS), level(LEVELS[-1], "fine"), level(LEVELS[1], "coarse")],
)
def test_sparse_models(compiled: Compiled, isa: str, sparsity: str) -> None:
    name = "BertModel" if sparsity == "mixed" else "DistilBertForTokenClassification"
    model, engine = compiled.model(name, sparsity), compiled.engine(name, sparsity, isa)
    wanted = [block for blocks in SPARSITY[sparsity] for block in blocks]
    assert all(layer.density < 0.5 for block, layer in zip(wanted, engine.level.layers, strict=True) if block and layer.block)
    if isa in ("avx2", "avx512"):  # which multiply bytes only as columns
        wanted = [(1, 4) if block == (1, 4) else (4, 1) for block in wanted]
    if not ISAS[isa].tiles:  # which compute most blocks as dense
        assert [layer.block for layer in engine.level.layers] == wanted
    assert engine.level.name == isa
    check_against_oracle(engine, model)


@pytest.mark.parametrize("isa", [level(isa) for isa in LEVELS])
@settings(EXAMPLES, max_examples=40)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=9), wider=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_a_sequence_is_the_same_alone_and_in_any_batch(
    compiled: Compiled, isa: str, lengths: list[int], wider: int, seed: int
) -> None:
    """Bit for bit, whatever its neighbours, their order and the width of the padding."""
    engine = compiled.engine("BertModel", "mixed", isa)
    random = np.random.default_rng(seed)
    sequences = tiny.sequences(*lengths, seed=seed)
    types = [random.integers(0, 2, length) for length in lengths]
    arguments = padded(sequences, types, max(lengths) + wider)
    together = engine(**arguments)
    order = random.permutation(len(lengths))
    shuffled = engine(**{name: array[order] for name, array in arguments.items()})
    for name, array in together.items():
        np.testing.assert_array_equal(shuffled[name], array[order])
    for row in {0, len(lengths) - 1}:
        alone = engine(sequences[row][None], token_type_ids=types[row][None])
        np.testing.assert_array_equal(alone["last_hidden_state"][0], together["last_hidden_state"][row, : lengths[row]])
        np.testing.assert_array_equal(alone["sentence_embedding"][0], together["sentence_embedding"][row])


@pytest.mark.parametrize("isa", [level(isa) for isa in LEVELS])
def test_threads_do_not_change_results(compiled: Compiled, isa: str) -> None:
    sequences = tiny.sequences(*range(1, 33), *range(1, 33))
    one, two, three = (compiled.engine("BertModel", "mixed", isa, threads)(**padded(sequences)) for threads in (1, 2, 3))
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array)
        np.testing.assert_array_equal(three[name], array)


def test_batches_larger_than_the_module_takes_are_split(compiled: Compiled, tmp_path: Path) -> None:
    stages: list[str] = []
    model = compiled.model("BertModel", "mixed")
    small = tilewright.compile(model, NATIVE, tmp_path / "small.tw", max_tokens=48, progress=stages.append)
    assert tuple(stages) == STAGES
    sequences = tiny.sequences(*range(1, 33))
    whole = compiled.engine("BertModel", "mixed", NATIVE)(**padded(sequences))
    for name, array in tilewright.load(small.path, num_threads=1)(**padded(sequences)).items():
        np.testing.assert_array_equal(array, whole[name])


def test_the_program_is_the_kernels_of_the_model_and_no_more_memory_than_they_need(compiled: Compiled) -> None:
    engine = compiled.engine("BertModel", "dense", "portable")
    program, parameters = engine.level.program, set(engine.level.parameters)
    layer = ["qkv", "attention", "output", "up", "down"]
    kernels = [call.kernel.partition("_")[0] for call in program.calls]
    assert kernels == ["embedding", *layer * tiny.LAYERS, "mean"]
    assert {each for call in program.calls for each in call.arguments if isinstance(each, str)} == parameters | {
        "input_ids", "position_ids", "token_type_ids", "offsets"
    }  # fmt: skip
    storages = {value.storage for value in program.values}
    assert len(storages) < len(program.values)  # values that are not needed at the same time share one
    with engine._runtime.timed(lambda kernel, seconds: kernels.remove(kernel.partition("_")[0])):
        engine(np.ones((1, 5), np.int64))
    assert kernels == []


def test_token_types_matter(compiled: Compiled) -> None:
    engine = compiled.engine("BertModel", "mixed", LEVELS[-1])
    (ids,) = tiny.sequences(20)
    first, second, absent = (
        engine(ids[None], token_type_ids=types)["last_hidden_state"]
        for types in (np.zeros((1, 20), int), np.ones((1, 20), int), None)
    )
    np.testing.assert_array_equal(first, absent)
    assert not np.allclose(first, second)


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_interrupting_a_compile_leaves_nothing(compiled: Compiled, stage: str, tmp_path: Path) -> None:
    def interrupt(reached: str) -> None:
        if reached == stage:
            raise KeyboardInterrupt

    model = compiled.model("BertModel", "mixed")
    with pytest.raises(KeyboardInterrupt):
        tilewright.compile(model, "avx2", tmp_path / "out.tw", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_compile_keeps_what_was_there(compiled: Compiled, tmp_path: Path) -> None:
    """Interrupted at the last moment: when the new one is about to be written."""
    model, output = compiled.model("BertModel", "mixed"), tmp_path / "out.tw"
    shutil.copytree(compiled.artifact("BertModel", "mixed", "portable"), output)
    before = {file.name: file.read_bytes() for file in output.iterdir()}

    def interrupt(stage: str) -> None:
        if stage == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tilewright.compile(model, "avx2", output, progress=interrupt)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert list(tmp_path.iterdir()) == [output]


def unwritable(directory: Path) -> dict[str, Path]:
    (directory / "file").write_text("in the way")
    (directory / "other").mkdir()
    return {
        "in a missing directory": directory / "missing" / "out.tw",
        "below a file": directory / "file" / "out.tw",
        "a file": directory / "file",
        "a directory that is no artifact": directory / "other",
    }


def test_an_unwritable_output_is_refused_before_any_work(tmp_path: Path) -> None:
    """Before the model is even looked for: this one does not exist."""
    for what, output in unwritable(tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        stages: list[str] = []
        with pytest.raises(InvalidInput, match=r"^cannot write ") as caught:
            tilewright.compile(tmp_path / "no-such-model", "avx2", output, progress=stages.append)
        assert stages == [], what
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    stages: list[str] = []
    try:
        with pytest.raises(InvalidInput, match="is not writable"):
            tilewright.compile(tmp_path / "no-such-model", "avx2", tmp_path / "out.tw", progress=stages.append)
    finally:
        tmp_path.chmod(0o700)
    assert stages == []


def test_models_that_cannot_be_compiled_leave_nothing(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    float_model = tiny.save(tiny.build("DistilBertModel"), tmp_path / "float")
    for model, message in ((tmp_path / "absent", "does not exist"), (float_model, "cannot compile a float model")):
        with pytest.raises(InvalidModel, match=message):
            tilewright.compile(model, "avx2", outputs / "out.tw")
    with pytest.raises(InvalidInput, match="unknown target 'z80'"):
        tilewright.compile(float_model, "z80", outputs / "out.tw")
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize("isa", [isa for isa in ISAS if not runs_here(isa)])
def test_an_artifact_for_a_cpu_we_are_not_on_is_refused(compiled: Compiled, isa: str, tmp_path: Path) -> None:
    artifact = tilewright.compile(compiled.model("BertModel", "mixed"), isa, tmp_path / "out.tw", sparse="always")
    missing = [feature for feature in ISAS[isa].features if feature not in HOST]
    with pytest.raises(ArtifactTargetMismatch, match=f"this CPU lacks .*{missing[0]}.*, which {isa} needs"):
        tilewright.load(artifact.path)


def test_a_checkpoint_by_path(compiled: Compiled, tmp_path: Path) -> None:
    """The same artifact as from the model in memory, with where it came from."""
    source = prune(load(tiny.save(tiny.build("BertModel"), tmp_path / "float")), SPARSITY["mixed"])
    checkpoint = quantize(source, tiny.texts(40), tmp_path / "int8")
    artifact = tilewright.compile(checkpoint, "portable", tmp_path / "out.tw")
    steps = artifact.manifest.provenance["steps"]
    assert [step["step"] for step in steps] == ["quantize", "compile"]
    recorded = json.loads((checkpoint / "provenance.json").read_text())["steps"][0]["output_sha256"]
    assert steps[1]["input_sha256"]["model.safetensors"] == recorded["model.safetensors"]
    engine = tilewright.load(artifact.path, num_threads=1)
    arguments = engine.tokenize(tiny.texts(5))
    other = compiled.engine("BertModel", "mixed", "portable")
    for name, array in engine(**arguments).items():
        np.testing.assert_array_equal(other(**arguments)[name], array)
