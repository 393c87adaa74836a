"""Sizes that no kernel divides: padded with zeros when compiled, with the answers of the model as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright
from tests import oracle, tiny
from tests.emulator import MODEL_OF_LEVEL, Encoder, emulate
from tests.kernel_harness import EXAMPLES, level
from tests.test_end_to_end import LEVELS, Blocks, cosine, joined, padded, prune, run
from tilewright.codegen.lower import lower
from tilewright.codegen.model import EncoderModel, Linear
from tilewright.codegen.pad import HEAD_UNIT, UNIT, Axis, is_padded, pad
from tilewright.errors import UnsupportedModel
from tilewright.frontend import load
from tilewright.pipeline import quantize
from tilewright.schedules.choice import plan
from tilewright.schedules.isa import ISAS

DENSE: Blocks = ((None,) * 4,)
FINE: Blocks = (((4, 1),) * 4,)
MIXED: Blocks = (((8, 1), (4, 4), (4, 1), (1, 4)),)
MODELS: dict[str, tuple[str, int, int, int, Blocks]] = {
    "bert": ("BertModel", 200, 10, 88, MIXED),
    "odd": ("BertForSequenceClassification", 130, 13, 30, DENSE),
    "small": ("DistilBertForSequenceClassification", 24, 4, 97, DENSE * 2),
    "answers": ("DistilBertForQuestionAnswering", 100, 5, 250, DENSE),
    "inner": ("BertForTokenClassification", 64, 4, 40, FINE),
    "one": ("BertModel", 1, 1, 1, DENSE),
}
"""Transformers class, hidden size, heads, intermediate size, blocks of each layer."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> object:
    """MODELS by name, made on first use."""
    directory = tmp_path_factory.mktemp("padded")

    @cache
    def made(name: str) -> EncoderModel:
        kind, hidden, heads, inner, blocks = MODELS[name]
        bert = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
        names = ("dim", "n_heads", "hidden_dim", "n_layers") if kind.startswith("Distil") else bert
        sizes = dict(zip(names, (hidden, heads, inner, len(blocks)), strict=True))
        source = load(tiny.save(tiny.build(kind, **sizes), directory / name))
        return load(quantize(prune(source, blocks), tiny.texts(40), directory / f"{name}-int8"))

    return made


def check(model: EncoderModel, ours: list[dict[str, np.ndarray]], sequences: list[np.ndarray]) -> None:
    """Equal shapes, and values of most sequences to rounding: of a value on a tie, its u8 may be a step apart."""
    theirs = oracle.forward(model, sequences)
    assert ours[0].keys() == theirs[0].keys()
    for name in theirs[0]:
        pairs = [(one[name], other[name]) for one, other in zip(ours, theirs, strict=True)]
        assert all(one.shape == other.shape for one, other in pairs)
        same = [np.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in pairs]
        assert np.mean(same) >= 0.75
        assert cosine(joined(ours, name), joined(theirs, name)) >= 0.9999


@pytest.mark.parametrize(
    ("isa", "name"),
    [
        *(level(isa, "bert") for isa in LEVELS),
        *(level(LEVELS[i % len(LEVELS)], name) for i, name in enumerate(MODELS) if name != "bert"),
    ],
)
def test_a_padded_model_answers_as_the_model_does(models: object, isa: str, name: str, tmp_path: Path) -> None:
    model = models(name)
    artifact = tilewright.compile(model, isa, tmp_path / "padded.tw", sparse="always")
    (note,) = (note for note in artifact.manifest.provenance["steps"][-1]["notes"] if "padded" in note)
    assert f"intermediate size {model.config.intermediate_size} to {pad(model).linears()[4].weight.shape[0]}" in note
    engine = tilewright.load(artifact.path, num_threads=1)
    sequences = tiny.sequences(1, 2, 15, 16, 17, 31, 32, *range(3, 30, 3), seed=3)
    check(model, run(engine, sequences), sequences)
    if name == "bert":
        width = {output.name: output.width for output in engine.manifest.outputs}
        assert width == {"last_hidden_state": 200, "sentence_embedding": 200}


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_that_divide_a_head_stay(models: object, isa: str) -> None:
    """Those of eight outputs straddle heads of 20 channels and become blocks of four; whole they would store most zeros."""
    model = pad(models("bert"))
    found = [(linear.block, float(np.mean(linear.weight != 0))) for linear in model.linears()]
    assert [block for block, _ in found] == [*[(4, 1)] * 3, (4, 4), (4, 1), (1, 4)]
    assert max(density for _, density in found) < 0.25
    assert is_padded(model)
    assert pad(model) is model
    made = lower(model, plan(model, ISAS[isa], sparse="always"))
    if not ISAS[isa].tiles:  # which compute some as dense
        assert max(kernel.density for kernel in made.kernels) < 0.25


@pytest.mark.skipif(find_spec("bochscpu") is None, reason="bochscpu-python is not installed")
def test_tiles_of_a_padded_model(models: object, tmp_path: Path) -> None:
    model, sequences = models("small"), tiny.sequences(17, 4)
    artifact = tilewright.compile(model, "amx", tmp_path / "padded.tw")
    found = emulate(MODEL_OF_LEVEL["amx"], Encoder(artifact.path, padded(sequences))).outputs
    check(model, [{name: array[row] for name, array in found.items()} for row in range(2)], sequences)


def test_a_model_of_other_sizes_is_left_as_it_is(tmp_path: Path) -> None:
    model = load(tiny.save(tiny.build("BertModel"), tmp_path))
    assert pad(model) is model


def test_lowering_asks_for_a_padded_model(models: object) -> None:
    model = models("inner")
    with pytest.raises(UnsupportedModel, match=r"no kernel divides hidden size 64, head size 16 or intermediate size 40; plan"):
        lower(model, plan(pad(model), ISAS["avx2"]))


@settings(EXAMPLES, max_examples=60)
@given(runs=st.integers(1, 20), used=st.integers(1, 40), unit=st.sampled_from([HEAD_UNIT, UNIT]))
def test_an_axis_is_as_narrow_as_kernels_allow(runs: int, used: int, unit: int) -> None:
    axis = Axis.of(runs, used, unit)
    fits = [width for width in range(used, axis.stored + 1) if width % unit == 0 and runs * width % UNIT == 0]
    assert fits == [axis.stored]
    values = np.arange(1, runs * used + 1)
    assert np.array_equal(axis.pad(values).reshape(runs, -1)[:, :used].ravel(), values)
    assert not axis.pad(values).reshape(runs, -1)[:, used:].any()


@settings(EXAMPLES, max_examples=40)
@given(
    outputs=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    inputs=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_padded_linear_maps_zeros_to_zeros(outputs: tuple[int, int], inputs: tuple[int, int], seed: int) -> None:
    random = np.random.default_rng(seed)
    out, into = Axis.of(*outputs, HEAD_UNIT), Axis.of(*inputs, HEAD_UNIT)
    n, k = out.runs * out.used, into.runs * into.used
    linear = Linear("linear", random.normal(size=(n, k)).astype(np.float32), random.normal(size=n).astype(np.float32))
    x = random.normal(size=(3, k)).astype(np.float32)
    wide = replace(linear, weight=out.pad(into.pad(linear.weight, 1)), bias=out.pad(linear.bias))
    found = oracle.apply_float(wide, into.pad(x, 1))
    np.testing.assert_allclose(found, out.pad(oracle.apply_float(linear, x), 1), rtol=1e-5, atol=1e-5)
