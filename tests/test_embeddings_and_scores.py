"""What a sentence embedding is and what a classifier's logits mean: read from the checkpoint, kept in the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tests import oracle, tiny
from tests.test_cli import invoke, ok, ok_json
from tilewright.errors import InvalidModel, TilewrightError, UnsupportedModel
from tilewright.frontend import load
from tilewright.frontend.sentence_transformers import UNSTATED_POOLING
from tilewright.manifest import Head, LevelRecord, Limits, Manifest, Output
from tilewright.pipeline import quantize
from tilewright.results import Tokens, read

OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules.pooling."
FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write_modules(
    directory: Path, pooling: dict[str, Any] | None, *more: str, transformer: str = "", package: str = OLD
) -> None:
    """The files of sentence-transformers beside a checkpoint: Transformer, Pooling with config `pooling`, then `more`."""
    kinds = ["Transformer", *(["Pooling"] if pooling is not None else []), *more]
    modules = [
        {"idx": i, "name": str(i), "path": transformer if i == 0 else f"{i}_{kind}", "type": package + kind}
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (directory / "1_Pooling").mkdir(exist_ok=True)
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def flags(*chosen: str) -> dict[str, Any]:
    return {"word_embedding_dimension": tiny.HIDDEN} | {f"pooling_mode_{name}": name in chosen for name in FLAGS}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("BertModel"), tmp_path_factory.mktemp("plain"))


@pytest.fixture
def directory(plain: Path, tmp_path: Path) -> Path:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


STATED: list[tuple[dict[str, Any], tuple[str, ...], tuple[str, bool]]] = [
    (flags("mean_tokens"), (), ("mean", False)),
    (flags("cls_token"), ("Normalize",), ("cls", True)),
    (flags("max_tokens"), ("Normalize",), ("max", True)),
    (flags(), (), ("mean", False)),  # what sentence-transformers takes where no mode is on
    ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, (), ("cls", False)),
    ({"pooling_mode": ["max"]}, ("Normalize",), ("max", True)),
]


@pytest.mark.parametrize(("pooling", "more", "expected"), STATED)
def test_pooling_is_read(directory: Path, pooling: dict[str, Any], more: tuple[str, ...], expected: tuple[str, bool]) -> None:
    write_modules(directory, pooling, *more, package=NEW if "pooling_mode" in pooling else OLD)
    model = load(directory)
    assert (model.head.pooling, model.head.normalize) == expected
    assert UNSTATED_POOLING not in model.notes


def test_the_encoder_may_lie_in_a_folder(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "0_Transformer").mkdir()
    for file in plain.iterdir():
        (tmp_path / "0_Transformer" / file.name).write_bytes(file.read_bytes())
    write_modules(tmp_path, flags("cls_token"), transformer="0_Transformer")
    model = load(tmp_path)
    assert model.head.pooling == "cls"
    assert model.tokenizer == (plain / "tokenizer.json").read_text()


def test_nothing_stated_is_the_mean_and_noted(plain: Path) -> None:
    model = load(plain)
    assert (model.head.pooling, model.head.normalize) == ("mean", False)
    assert UNSTATED_POOLING in model.notes


def write(name: str, value: Any) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(value if isinstance(value, str) else json.dumps(value))


def modules(*arguments: Any, **named: Any) -> Callable[[Path], object]:
    return lambda directory: write_modules(directory, *arguments, **named)


REFUSED: list[tuple[Callable[[Path], object], type[TilewrightError], str]] = [
    (modules(flags("cls_token", "mean_tokens")), UnsupportedModel, "pools by cls and mean; supported: one of mean, cls, max"),
    (modules(flags("mean_sqrt_len_tokens")), UnsupportedModel, "pools by mean_sqrt_len"),
    (modules(flags("weightedmean_tokens")), UnsupportedModel, "pools by weightedmean"),
    (modules({"pooling_mode": "lasttoken"}), UnsupportedModel, "pools by lasttoken"),
    (modules({"pooling_mode": []}), UnsupportedModel, "pools by nothing"),
    (modules({"pooling_mode": 3}), InvalidModel, "1_Pooling/config.json: pooling_mode is 3"),
    (modules({"pooling_mode_cls_token": "yes"}), InvalidModel, "pooling_mode_cls_token is 'yes'"),
    (modules({"pooling_mode": "cls", "include_prompt": False}), UnsupportedModel, "include_prompt false"),
    (modules(flags("cls_token"), "Dense"), UnsupportedModel, "module Dense of modules.json is not supported"),
    (modules(flags("cls_token"), "Normalize", "Normalize"), UnsupportedModel, "Normalize, Normalize; supported"),
    (modules(None, "Normalize"), UnsupportedModel, "lists Transformer, Normalize"),
    (modules(flags("cls_token"), transformer="../elsewhere"), UnsupportedModel, "outside of the directory"),
    (modules(flags("cls_token"), transformer="a\0b"), UnsupportedModel, "outside of the directory"),
    (modules(flags("cls_token"), transformer="0_Transformer"), InvalidModel, "config.json cannot be read"),
    (write("modules.json", "{"), InvalidModel, "modules.json cannot be read as JSON"),
    (write("modules.json", {}), InvalidModel, "modules.json: {}; Input should be a valid list"),
    (write("modules.json", []), UnsupportedModel, "lists nothing"),
    (write("modules.json", [{"path": 1}]), InvalidModel, "modules.json: 0.path is 1"),
    (write("modules.json", "[" * 100_000), InvalidModel, "nested too deeply"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), REFUSED)
def test_what_is_not_supported_is_named(
    directory: Path, damage: Callable[[Path], object], kind: type[TilewrightError], message: str
) -> None:
    damage(directory)
    with pytest.raises(kind) as caught:
        load(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lower_case_that_the_tokenizer_does_not_make_is_refused(directory: Path) -> None:
    write_modules(directory, flags("cls_token"))
    write("sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": True})(directory)
    with pytest.raises(UnsupportedModel, match="do_lower_case"):
        load(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    write("tokenizer.json", tokenizer | {"normalizer": {"type": "Lowercase"}})(directory)
    assert load(directory).head.pooling == "cls"


def test_a_default_prompt_is_noted(directory: Path) -> None:
    write_modules(directory, flags("cls_token"))
    write("config_sentence_transformers.json", {"prompts": {"query": "q: "}, "default_prompt_name": "query"})(directory)
    assert any("'query'" in note for note in load(directory).notes)


def test_modules_beside_a_classifier_are_refused(tmp_path: Path) -> None:
    tiny.save(tiny.build("BertForSequenceClassification"), tmp_path)
    write_modules(tmp_path, flags("cls_token"))
    with pytest.raises(UnsupportedModel, match="sequence_classification head"):
        load(tmp_path)


@pytest.mark.parametrize(("pooling", "normalize"), [("cls", True), ("max", False), ("mean", True)])
def test_an_embedding_is_pooled_as_stated_from_checkpoint_to_engine(
    directory: Path, pooling: str, normalize: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against the oracle, and against torch's pooling of the engine's own hidden states."""
    write_modules(directory, {"pooling_mode": pooling}, *(["Normalize"] if normalize else []))
    place = tmp_path_factory.mktemp("made")
    model = load(quantize(directory, tiny.texts(20), place / "int8"))
    assert (model.head.pooling, model.head.normalize) == (pooling, normalize)
    engine = tilewright.load(tilewright.compile(place / "int8", "native", place / "model.tw").path, num_threads=1)
    assert engine.manifest.head == Head("embedding", pooling=pooling, normalized=normalize)  # type: ignore[arg-type]
    for ids in tiny.sequences(1, 7, 20, 31):
        outputs, (expected,) = engine(ids[None]), oracle.forward(model, [ids])
        hidden = torch.from_numpy(outputs["last_hidden_state"][0].astype(np.float64))
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[pooling]
        pooled = torch.nn.functional.normalize(pooled, dim=0) if normalize else pooled
        np.testing.assert_allclose(outputs["sentence_embedding"][0], pooled, atol=1e-5)
        np.testing.assert_allclose(outputs["sentence_embedding"][0], expected["sentence_embedding"], atol=0.02)
    steps = engine.manifest.provenance["steps"]
    assert "1_Pooling/config.json" in steps[-1]["input_sha256"]


PROBLEMS = [
    ({"num_labels": 3}, "single_label_classification"),
    ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi_label_classification"),
    ({"num_labels": 3, "problem_type": "regression"}, "regression"),
    ({"num_labels": 1}, "regression"),
    ({"num_labels": 1, "problem_type": "multi_label_classification"}, "multi_label_classification"),
]


def classifier(path: Path, num_labels: int, **settings: Any) -> Path:
    """A tiny sequence classifier with names of its own for its labels."""
    names = {i: f"L{i}" for i in range(num_labels)}
    model = tiny.build("BertForSequenceClassification", id2label=names, **settings)
    return tiny.save(model, path)


@pytest.mark.parametrize(("settings", "problem"), PROBLEMS)
def test_problem_type_is_read_and_kept(settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    source = load(classifier(tmp_path / "float", **settings))
    assert source.head.problem == problem
    assert load(quantize(source, tiny.texts(8), tmp_path / "int8")).head.problem == problem


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"problem_type": "ranking"}, UnsupportedModel, "problem_type is 'ranking'"),
        ({"problem_type": 3}, UnsupportedModel, "problem_type is 3"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, InvalidModel, "a single label to choose from"),
    ],
)
def test_problem_types_that_mean_nothing_here_are_refused(
    settings: dict[str, Any], kind: type[TilewrightError], message: str, tmp_path: Path
) -> None:
    classifier(tmp_path, settings.get("num_labels", 3))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(kind, match=message):
        load(tmp_path)


def result_of(problem: str, logits: list[float]) -> dict[str, Any]:
    manifest = Manifest(
        (LevelRecord("portable", (), "model.portable.so", {}),),
        ("input_ids",),
        (Output("logits", "sequence", len(logits)),),
        Limits(10, 16, 16),
        head=Head("sequence_classification", problem_type=problem),  # type: ignore[arg-type]
        labels=tuple(f"L{i}" for i in range(len(logits))),
    )
    outputs = {"logits": np.array([logits], np.float32)}
    (result,) = read(manifest, outputs, [Tokens(np.arange(2), [1, 2])])
    return result


def test_results_follow_the_problem_type() -> None:
    logits = [2.0, -1.0, 0.5]
    exact = torch.tensor(logits, dtype=torch.float64)
    single, several, values = (
        result_of(problem, logits) for problem in ("single_label_classification", "multi_label_classification", "regression")
    )
    assert single["label"] == "L0"
    np.testing.assert_allclose(list(single["probabilities"].values()), exact.softmax(0), rtol=1e-6)
    assert several["labels"] == ["L0", "L2"]
    np.testing.assert_allclose(list(several["probabilities"].values()), exact.sigmoid(), rtol=1e-6)
    assert values["scores"] == {"L0": 2.0, "L1": -1.0, "L2": 0.5}
    assert result_of("regression", [1.5])["score"] == 1.5
    assert result_of("multi_label_classification", [-200.0])["probabilities"]["L0"] == pytest.approx(0, abs=1e-80)


def test_the_command_line_prints_what_the_head_means(tmp_path: Path) -> None:
    shown = {}
    for name, settings in (("scores", {"num_labels": 1}), ("tags", PROBLEMS[1][0])):
        quantized = quantize(classifier(tmp_path / name, **settings), tiny.texts(8), tmp_path / f"{name}-int8")
        ok("compile", quantized, "-o", tmp_path / f"{name}.tw")
        assert settings.get("problem_type", "regression") in ok("inspect", quantized)
        shown[name] = ok_json("run", tmp_path / f"{name}.tw", "--text", "w1 w2")
        text = ok("run", tmp_path / f"{name}.tw", "--text", "w1 w2")
        (result,) = shown[name]["results"]
        if name == "scores":
            assert f"{result['score']:.4f}" in text
            assert "LABEL" not in text
        else:
            assert all(label in text for label in result["labels"])
            assert set(result["probabilities"]) == {"L0", "L1", "L2"}
    assert shown["scores"]["problem_type"] == "regression"
    assert ok_json("inspect", tmp_path / "tags.tw")["head"]["problem_type"] == "multi_label_classification"
    assert invoke("run", tmp_path / "tags.tw", "--text", "w3").exit_code == 0
