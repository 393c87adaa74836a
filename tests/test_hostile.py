"""Hostile configs, tokenizers and arguments: each must end in one line that says what is wrong, or in the same answer."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewright
from tests import oracle, tiny
from tests.fuzz_files import MUTATED, judge_checkpoint, judge_manifest
from tests.kernel_harness import EXAMPLES
from tests.test_cli import refused as cli_refused
from tilewright.errors import InvalidArtifact, InvalidInput, InvalidModel, TilewrightError
from tilewright.frontend import load
from tilewright.pipeline import quantize


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("BertForTokenClassification"), tmp_path_factory.mktemp("bert"))


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    for file in pristine.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": 3}, "architectures is 3"),
    ({"architectures": "BertModel"}, "architectures is 'BertModel'"),
    ({"architectures": [None]}, "architectures.0 is None"),
    ({"model_type": ["bert"]}, "model_type is"),
    ({"quantization_config": "int8"}, "quantization_config is 'int8'"),
    ({"quantization_config": []}, "quantization_config is []"),
    ({"layer_norm_eps": None}, "layer_norm_eps is None"),
    ({"layer_norm_eps": -1e-12}, "layer_norm_eps is -1e-12"),
    ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
    ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
    ({"layer_norm_eps": float("nan")}, "NaN is no JSON number"),
    ({"layer_norm_eps": float("inf")}, "Infinity is no JSON number"),
    ({"id2label": ["A", "B", "C"]}, "id2label is ['A', 'B', 'C']"),
    ({"id2label": {"0": 1, "1": "B", "2": "C"}}, "id2label.0 is 1"),
    ({"id2label": {"zero": "A", "1": "B", "2": "C"}}, "expected labels numbered from 0"),
    ({"id2label": {"0": "A", "1": "B", "3": "C"}}, "expected labels numbered from 0"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    ({"vocab_size": 1e3}, "vocab_size is 1000.0"),
    ({"pad_token_id": "0"}, "pad_token_id is '0'"),
]


@pytest.mark.parametrize(("settings", "message"), CONFIGS)
def test_configs_are_refused_by_field(directory: Path, settings: dict[str, Any], message: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(InvalidModel) as caught:
        load(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert message.split()[0] in cli_refused(2, "inspect", directory)


FILES: list[tuple[str, bytes | None, str]] = [
    ("tokenizer.json", b"{}", "is not a tokenizer"),
    ("tokenizer.json", b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": 5}}', "is not a tokenizer"),
    ("tokenizer.json", b"[" * 100_000, "nested too deeply"),
    ("config.json", b'{"a":' * 100_000, "nested too deeply"),
    ("config.json", b"1" * 10_000, "cannot be read as JSON"),
    ("config.json", b"\xff\xfe", "cannot be read as JSON"),
    ("config.json", None, "not a regular file"),
    ("tokenizer.json", None, "not a regular file"),
    ("model.safetensors", None, "not a regular file"),
    ("model.safetensors", b"\xff" * 64, "is not a complete safetensors file"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_damaged_files_are_refused_at_once(directory: Path, name: str, content: bytes | None, message: str) -> None:
    """None: a FIFO, which nobody will ever write to."""
    (directory / name).unlink()
    if content is None:
        os.mkfifo(directory / name)
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(TilewrightError) as caught:
        load(directory)
    if not (name == "config.json" and content is None):  # which is then no model's directory at all
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


CALLS: list[tuple[Callable[[tilewright.Engine], object], str]] = [
    (lambda e: e.benchmark(batch=-1), "batch is -1"),
    (lambda e: e.benchmark(seq_len=0), "seq_len is 0"),
    (lambda e: e.benchmark(iterations=0), "iterations is 0"),
    (lambda e: e.benchmark(batch=1.5), "batch is 1.5"),  # type: ignore[arg-type]
    (lambda e: e.benchmark(duration=float("inf")), "duration is inf"),
    (lambda e: e.profile({"input_ids": [[1]]}, iterations=0), "iterations is 0"),
    (lambda e: e.profile({"ids": [[1]]}), "inputs hold 'ids'"),
    (lambda e: e.tokenize([None]), "the texts cannot be encoded"),  # type: ignore[list-item]
    (lambda e: e.tokenize([1, 2]), "the texts cannot be encoded"),  # type: ignore[list-item]
    (lambda e: e.tokenize(["\ud800"]), "the texts cannot be encoded"),
    (lambda e: e.tokenize(["a", ("b", "c", "d")]), "the texts cannot be encoded"),  # type: ignore[list-item]
    (pickle.dumps, "an engine cannot be pickled"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_calls_are_refused(engine: tilewright.Engine, call: Callable[[tilewright.Engine], object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        call(engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 10**9])
def test_numbers_of_threads_are_refused(toy_artifact: Path, threads: Any) -> None:
    with pytest.raises(InvalidInput, match=f"num_threads is {threads!r}; expected an integer"):
        tilewright.load(toy_artifact, threads)


def test_names_that_cannot_be_are_refused(tmp_path: Path, pristine: Path) -> None:
    with pytest.raises(InvalidArtifact):
        tilewright.load("a\0b")
    with pytest.raises(InvalidModel):
        load("a\0b")
    with pytest.raises(InvalidInput, match="NUL"):
        tilewright.compile(pristine, "avx2", str(tmp_path / "a\0b"))
    with pytest.raises(InvalidInput, match="max_tokens"):
        tilewright.compile(pristine, "avx2", tmp_path / "x.tw", max_tokens=2**40)


def test_pytorch_weights_are_read_as_weights_only(
    pristine: Path, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = load(pristine)
    (directory / "model.safetensors").unlink()
    state = tiny.build("BertForTokenClassification").state_dict()
    torch.save(state, directory / "pytorch_model.bin")
    out = tmp_path_factory.mktemp("out")
    made, reference = (
        load(quantize(source, tiny.texts(8), out / name)) for source, name in ((directory, "a"), (expected, "b"))
    )
    ids = tiny.sequences(9)
    np.testing.assert_array_equal(oracle.forward(made, ids)[0]["logits"], oracle.forward(reference, ids)[0]["logits"])
    for damage in (
        lambda f: torch.save({"code": os.getcwd}, f),
        lambda f: f.write_bytes(b"x" * 50),
        lambda f: torch.save([1], f),
    ):
        damage(directory / "pytorch_model.bin")
        with pytest.raises(InvalidModel, match=r"pytorch_model\.bin does not hold") as caught:
            quantize(directory, tiny.texts(2), out / "c")
        assert "\n" not in str(caught.value)


@EXAMPLES
@given(seed=st.integers(0, 2**63))
@pytest.mark.parametrize("name", MUTATED)
def test_mutated_checkpoints_give_the_same_answer_or_one_line(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, name: str, seed: int
) -> None:
    assert judge_checkpoint(pristine, name, tmp_path_factory.getbasetemp() / "mutated", Random(seed)) in ("answered", "refused")


@EXAMPLES
@given(seed=st.integers(0, 2**63))
def test_mutated_manifests_give_the_same_answer_or_one_line(
    toy_artifact: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    assert judge_manifest(toy_artifact, tmp_path_factory.getbasetemp() / "mutated.tw", Random(seed)) in ("answered", "refused")
