"""Packed checkpoints: the same weights from fewer bytes, and damaged ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.test_pruning import batches
from tilewright.codegen.block_sparse import BLOCKS
from tilewright.errors import InvalidInput, InvalidModel
from tilewright.frontend import load
from tilewright.frontend.packed import pack_weight, packed_weight
from tilewright.frontend.tensors import Checkpoint
from tilewright.pipeline import quantize
from tilewright.pipeline.pack import pack
from tilewright.pipeline.provenance import file_hashes
from tilewright.pipeline.pruning import obs

KEY = "encoder.layer.1.intermediate.dense"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pack")
    model = tiny.build("BertModel")
    obs.prune(model, batches(), obs.ObsSettings(sparsity=0.75))
    return quantize(tiny.save(model, place / "float"), tiny.texts(40), place / "int8")


@pytest.fixture(scope="module")
def packed(quantized: Path) -> Path:
    return pack(quantized, quantized.parent / "packed")


@given(st.sampled_from(list(BLOCKS)), st.integers(1, 5), st.integers(1, 11), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_weights_survive(block: tuple[int, int], rows: int, columns: int, density: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.integers(-127, 128, (rows * block[0], columns * block[1])).astype(np.int8)
    weight *= np.kron(random.random((rows, columns)) < density, np.ones(block, bool))
    blocks, bits = pack_weight(weight, block)
    checkpoint = Checkpoint({"x.weight_blocks": blocks, "x.weight_bitmask": bits})
    np.testing.assert_array_equal(packed_weight(checkpoint, "x", *weight.shape), weight)
    checkpoint.finish()


def test_a_packed_checkpoint_is_the_same_model(quantized: Path, packed: Path) -> None:
    before, after = load(quantized), load(packed)
    assert after.quantized and after.config == before.config and after.tokenizer == before.tokenizer
    for ours, theirs in zip(after.linears(), before.linears(), strict=True):
        assert ours.block == theirs.block == (4, 1) and ours.input == theirs.input
        assert theirs.scale is not None
        np.testing.assert_array_equal(ours.weight, theirs.weight)
        np.testing.assert_array_equal(ours.scale, theirs.scale)
    step = np.abs(before.embeddings.word).max(1, keepdims=True) / 127
    assert (np.abs(after.embeddings.word - before.embeddings.word) <= 0.501 * step).all()
    sizes = [(path / "model.safetensors").stat().st_size for path in (packed, quantized)]
    assert sizes[0] < 0.75 * sizes[1]


def test_packing_again_changes_nothing(packed: Path, tmp_path: Path) -> None:
    again = pack(packed, tmp_path / "again")
    assert load_file(again / "model.safetensors").keys() == load_file(packed / "model.safetensors").keys()
    np.testing.assert_array_equal(load(again).embeddings.word, load(packed).embeddings.word)


def test_provenance_is_appended(quantized: Path, packed: Path) -> None:
    steps = json.loads((packed / "provenance.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["quantize", "pack"]
    assert steps[0]["output_sha256"] == steps[1]["input_sha256"] == file_hashes(quantized)
    assert steps[1]["output_sha256"] == file_hashes(packed)


def _cut(tensors: dict[str, Any]) -> None:
    tensors[f"{KEY}.weight_blocks"] = tensors[f"{KEY}.weight_blocks"][1:]


def _flip(tensors: dict[str, Any]) -> None:
    tensors[f"{KEY}.weight_bitmask"] = tensors[f"{KEY}.weight_bitmask"] ^ np.uint8(1)


def _longer(tensors: dict[str, Any]) -> None:
    tensors[f"{KEY}.weight_bitmask"] = np.append(tensors[f"{KEY}.weight_bitmask"], np.uint8(0))


def _reshape(tensors: dict[str, Any]) -> None:
    tensors[f"{KEY}.weight_blocks"] = tensors[f"{KEY}.weight_blocks"][:126].reshape(-1, 3, 1)


def _empty(tensors: dict[str, Any]) -> None:
    tensors[f"{KEY}.weight_blocks"] = np.zeros((4, 0, 1), np.int8)


def _missing(tensors: dict[str, Any]) -> None:
    del tensors[f"{KEY}.weight_bitmask"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "does not mark the 127 blocks"),
        (_flip, "does not mark"),
        (_longer, "does not mark"),
        (_reshape, r"\[3, 1\], which do not divide the weight of 64 x 32"),
        (_empty, "do not divide"),
        (_missing, "weight_bitmask is missing"),
    ],
)
def test_damage_is_refused(packed: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    tensors = load_file(packed / "model.safetensors")
    damage(tensors)
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InvalidModel, match=message):
        load(tmp_path)


def test_what_is_refused(quantized: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="exists"):
        pack(quantized, packed)
    with pytest.raises(InvalidInput, match="not quantised"):
        pack(quantized.parent / "float", tmp_path / "out")
    assert not any(tmp_path.iterdir())
