"""A whole encoder on emulated CPUs: every integer that passes between its kernels is that of the AVX2 level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest

import tilewright
from tests import tiny
from tests.emulator import MODEL_OF_LEVEL, Encoder, Trace, emulate
from tests.kernel_harness import GROUP, Array, from_groups, read_as, runs_here
from tilewright.codegen.model import EncoderModel
from tilewright.frontend import load
from tilewright.pipeline import quantize
from tilewright.schedules.isa import ISAS

pytestmark = [
    pytest.mark.skipif(find_spec("bochscpu") is None, reason="bochscpu-python is not installed"),
    pytest.mark.skipif(not runs_here("avx2"), reason="this CPU has no avx2, the level compared with"),
]
IDS, MASK = np.zeros((4, 32), np.int64), np.zeros((4, 32), np.int64)
for row, ids in enumerate(tiny.sequences(32, 5, 18, 21)):  # five groups of tokens: a whole tile of four, and one
    IDS[row, : len(ids)], MASK[row, : len(ids)] = ids, 1
BLOCKS = {"ffn.lin1.weight": (4, 1), "out_lin.weight": (16, 4)}
COARSE = {**dict.fromkeys(("q_lin", "k_lin", "v_lin", "ffn.lin2.weight"), (16, 4)), "ffn.lin1.weight": (32, 4)}
"""Blocks in which tiles are used wherever BLOCKS has dense weights."""
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trace]:
    """The trace of a call at an ISA level, avx2 natively, others emulated; of a model with BLOCKS, or with COARSE ones."""
    directory = tmp_path_factory.mktemp("encoder")

    @cache
    def model(coarse: bool) -> EncoderModel:
        source = tiny.build("DistilBertForTokenClassification", dim=64, hidden_dim=128)
        sparsify(source, COARSE if coarse else BLOCKS)
        floats = tiny.save(source, directory / f"float{coarse:d}")
        return load(quantize(load(floats), tiny.texts(40), directory / f"quantized{coarse:d}"))

    @cache
    def run(isa: str, coarse: bool = False) -> Trace:
        artifact = tilewright.compile(model(coarse), isa, directory / f"{isa}{coarse:d}.tw", sparse="always")
        stored = {layer.block for layer in artifact.manifest.levels[0].layers}
        wanted = {None, *(COARSE if coarse else BLOCKS).values()}
        assert stored == ({(4, 1)} if isa in ("avx2", "avx512") else wanted)  # which multiply bytes only as columns
        inputs = {name: array[:2] for name, array in INPUTS.items()} if coarse else INPUTS  # three groups of tokens, or four
        task = Encoder(artifact.path, inputs)
        return task.run(None) if isa == "avx2" else emulate(MODEL_OF_LEVEL[isa], task)

    return run


def sparsify(model: object, blocks: Mapping[str, tuple[int, int]] = BLOCKS) -> None:
    """Zero most blocks of the linears named in `blocks`; the rest stays dense."""
    random = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        for part, (bn, bk) in blocks.items():
            if part in name and parameter.ndim == 2:
                n, k = parameter.shape
                mask = np.kron(random.random((n // bn, k // bk)) < 0.3, np.ones((bn, bk)))
                parameter.data *= parameter.new_tensor(mask)


def from_layout(x: Array, together: int) -> Array:
    """Tokens by channels; the layout follows from the shape, because no test has 16 channels."""
    return from_groups(x, "packed" if x.ndim == 4 else "rows" if x.shape[1] == GROUP else "columns", together)


def activations(name: str, arrays: Sequence[Array], isa: str) -> list[Array]:
    """The integer activations of a kernel call as plain integers [tokens, channels], however the level stores them."""
    key = {"qkv": 2, "attention": 1}.get(name.split("_")[0])
    columns, offset = read_as(isa, "columns"), ISAS[isa].attention.key_offset
    return [
        from_layout(array, columns.together if array.dtype == columns.dtype else 1).astype(np.int32)
        - (offset if place == key else 0)
        for place, array in enumerate(arrays)
        if array.dtype.kind != "f" and array.ndim > 2
    ]


@pytest.mark.parametrize(
    ("isa", "coarse"), [("avxvnni", False), ("avx512", False), ("avx512vnni", False), ("amx", False), ("amx", True)]
)
def test_integers_between_kernels_are_those_of_avx2(trace: Callable[..., Trace], isa: str, coarse: bool) -> None:
    expected, found = trace("avx2", coarse), trace(isa, coarse)
    assert [name for name, _ in found.kernels] == [name for name, _ in expected.kernels]
    compared = 0
    for (name, theirs), (_, ours) in zip(expected.kernels, found.kernels, strict=True):
        wanted, got = activations(name, theirs, "avx2"), activations(name, ours, isa)
        for want, have in zip(wanted, got, strict=True):
            np.testing.assert_array_equal(have, want, err_msg=name)
            compared += want.size
    assert compared > 2 * tiny.LAYERS * 64 * (48 if coarse else 64)
    for name, value in expected.outputs.items():
        np.testing.assert_allclose(found.outputs[name], value, rtol=1e-5, atol=1e-5)


def test_the_encoder_has_every_kind_of_kernel(trace: Callable[..., Trace]) -> None:
    names = {name.split("_")[0] for name, _ in trace("avx2").kernels}
    assert names >= {"embedding", "qkv", "attention", "output", "up", "down", "head"}
