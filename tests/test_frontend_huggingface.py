import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import oracle, tiny
from tilewright.errors import InvalidModel, TilewrightError, UnsupportedModel
from tilewright.frontend import load, report

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("DistilBertForTokenClassification"), tmp_path_factory.mktemp("distilbert"))


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in pristine.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_tensors(directory: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **settings: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


def refused(path: Path, kind: type[TilewrightError], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_sizes_labels_and_tokenizer(directory: Path) -> None:
    model = load(directory)
    config = model.config
    assert (config.architecture, config.hidden_size, config.num_heads) == ("distilbert", tiny.HIDDEN, tiny.HEADS)
    assert (config.intermediate_size, config.vocab_size, config.max_positions) == (
        tiny.WIDE,
        tiny.VOCAB,
        tiny.POSITIONS,
    )
    assert config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert config.activation == "gelu"
    assert not model.quantized
    assert model.tokenizer == (directory / "tokenizer.json").read_text()
    assert len(model.layers) == tiny.LAYERS


def test_unused_tensors_are_reported(tmp_path: Path) -> None:
    model = load(tiny.save(tiny.build("BertModel"), tmp_path))
    assert "unused tensors: pooler.dense.bias, pooler.dense.weight" in model.notes


@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForMaskedLM"])
def test_a_language_model_becomes_its_encoder(name: str, tmp_path: Path) -> None:
    assert load(tiny.save(tiny.build(name), tmp_path)).head.kind == "none"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(dtype: str, tmp_path: Path) -> None:
    reference = tiny.build("BertModel")
    full = load(tiny.save(reference, tmp_path / "full"))
    import torch

    half = load(tiny.save(reference.to(getattr(torch, dtype)), tmp_path / "half"))
    assert half.embeddings.word.dtype == np.float32
    np.testing.assert_allclose(half.layers[1].up.weight, full.layers[1].up.weight, rtol=2**-8)


def test_names_of_old_layer_norms(directory: Path) -> None:
    def rename(tensors: Tensors) -> None:
        name = "distilbert.embeddings.LayerNorm."
        tensors[name + "gamma"], tensors[name + "beta"] = tensors.pop(name + "weight"), tensors.pop(name + "bias")

    expected = load(directory).embeddings.norm.weight
    edit_tensors(directory, rename)
    np.testing.assert_array_equal(load(directory).embeddings.norm.weight, expected)


def test_shards_are_read_together(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, directory / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, directory / "model-00002-of-00002.safetensors")
    assert len(load(directory).layers) == tiny.LAYERS
    save_file({names[0]: tensors[names[0]]}, directory / "extra.safetensors")
    refused(directory, InvalidModel, "occurs twice")


def test_sparse_blocks_are_found_and_reported(directory: Path) -> None:
    def prune(tensors: Tensors) -> None:
        weight = tensors["distilbert.transformer.layer.0.ffn.lin1.weight"]
        keep = np.random.default_rng(0).random((tiny.WIDE // 4, tiny.HIDDEN)) < 0.2
        weight *= np.kron(keep, np.ones((4, 1), np.float32))

    edit_tensors(directory, prune)
    model = load(directory)
    assert model.layers[0].up.block == (4, 1)
    assert model.layers[0].down.block is None
    rows = {row.name: row for row in report(model).linears}
    assert len(rows) == 6 * tiny.LAYERS
    pruned = rows["transformer.layer.0.ffn.lin1"]
    assert pruned.shape == (tiny.WIDE, tiny.HIDDEN)
    assert pruned.block == (4, 1)
    assert pruned.block_density[4, 1] == pytest.approx(0.2, abs=0.05)
    assert pruned.density == pruned.block_density[4, 1]


LIN = "distilbert.transformer.layer.1.ffn.lin1.weight"


def poison(tensors: Tensors) -> None:
    tensors[LIN][3, 4] = np.nan


DAMAGE: list[tuple[Callable[[Tensors], object], tuple[str, ...]]] = [
    (lambda t: t.pop(LIN), ("transformer.layer.1.ffn.lin1.weight is missing",)),
    (lambda t: t.update(extra=np.zeros(1, np.float32)), ("unexpected tensors extra",)),
    (lambda t: t.update({LIN.replace("1", "2", 1): t[LIN]}), ("unexpected tensors transformer.layer.2.ffn",)),
    (lambda t: t.update({LIN: t[LIN].T.copy()}), ("has shape [32, 64]", "[64, 32]")),
    (lambda t: t.update({LIN: t[LIN].astype(np.int8)}), ("is int8, expected floating point",)),
    (lambda t: t.update({LIN: t[LIN].astype(np.uint16)}), ("has type U16",)),
    (poison, ("transformer.layer.1.ffn.lin1.weight holds 1 NaN",)),
]


@pytest.mark.parametrize(("edit", "parts"), DAMAGE)
def test_damaged_tensors_are_named(directory: Path, edit: Callable, parts: tuple[str, ...]) -> None:
    edit_tensors(directory, edit)
    refused(directory, InvalidModel, *parts)


@pytest.mark.parametrize("size", [0, 5, 200, 20000])
def test_truncated_safetensors(directory: Path, size: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(directory, InvalidModel, "model.safetensors is not a complete safetensors file")


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_json(directory: Path, name: str, content: str) -> None:
    (directory / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(directory, InvalidModel, name)


SETTINGS = [
    ({"model_type": "gpt2"}, UnsupportedModel, ("architecture gpt2", "supported: bert, distilbert")),
    ({"architectures": ["DistilBertForMultipleChoice"]}, UnsupportedModel, ("DistilBertForQuestionAnswering",)),
    ({"activation": "silu"}, UnsupportedModel, ("activation silu", "gelu")),
    ({"position_embedding_type": "relative_key"}, UnsupportedModel, ("relative_key", "absolute")),
    ({"n_heads": 5}, InvalidModel, ("dim 32 is not a multiple of n_heads 5",)),
    ({"n_layers": 0}, InvalidModel, ("n_layers is 0",)),
    ({"dim": "32"}, InvalidModel, ("dim is '32'",)),
    ({"n_layers": 1}, InvalidModel, ("unexpected tensors transformer.layer.1",)),
    ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel, ("gptq", "int-quantized")),
    ({"id2label": {"0": "A"}}, InvalidModel, ("classifier.weight",)),
]


@pytest.mark.parametrize(("settings", "kind", "parts"), SETTINGS)
def test_settings_are_checked(directory: Path, settings: dict, kind: type, parts: tuple[str, ...]) -> None:
    edit_config(directory, **settings)
    refused(directory, kind, *parts)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    refused(tmp_path / "absent", InvalidModel, "does not exist")
    refused(tmp_path, UnsupportedModel, "is not a model", "Hugging Face", ".onnx")
    (tmp_path / "a.onnx").touch()
    (tmp_path / "b.onnx").touch()
    refused(tmp_path, UnsupportedModel, "2 ONNX files", "a.onnx, b.onnx")


def test_the_base_class_is_assumed_without_architectures(tmp_path: Path) -> None:
    tiny.save(tiny.build("DistilBertModel"), tmp_path)
    edit_config(tmp_path, architectures=None)
    model = load(tmp_path)
    outputs = oracle.forward_float(model, tiny.sequences(4))[0]
    assert outputs["last_hidden_state"].shape == (4, tiny.HIDDEN)
    assert outputs["sentence_embedding"].shape == (tiny.HIDDEN,)
