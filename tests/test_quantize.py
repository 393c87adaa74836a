import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests import oracle, tiny
from tilewright.codegen.model import Linear, Quantization
from tilewright.errors import InvalidInput, InvalidModel, TilewrightError, UnsupportedModel
from tilewright.frontend import load
from tilewright.pipeline import quantize
from tilewright.pipeline.calibration import asymmetric, calibrate, symmetric
from tilewright.pipeline.quantize import quantize_linear
from tilewright.pipeline.self_check import check_against_transformers

TEXTS = tiny.texts(40)
CLASSES = [
    "BertModel",
    "BertForSequenceClassification",
    "DistilBertForQuestionAnswering",
    "DistilBertForTokenClassification",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("DistilBertForTokenClassification"), tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(checkpoint, TEXTS, tmp_path_factory.mktemp("quantized") / "model")


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    source = load(tiny.save(tiny.build(name), tmp_path / "float"))
    model = load(quantize(source, TEXTS, tmp_path / "out"))
    assert model.quantized
    assert model.config == source.config
    assert model.tokenizer == source.tokenizer
    assert model.head.kind == source.head.kind
    assert model.head.pre_activation == source.head.pre_activation
    sequences = tiny.sequences(1, 7, 20, 31)
    for ours, exact in zip(oracle.forward(model, sequences), oracle.forward_float(source, sequences), strict=True):
        for output, value in exact.items():
            assert np.abs(ours[output] - value).mean() < 0.1 * np.abs(value).mean()


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DistilBertForTokenClassification"])
def test_outputs_without_names_are_numbered(name: str, tmp_path: Path) -> None:
    source = load(tiny.save(tiny.build(name, num_labels=5), tmp_path / "float"))
    unnamed = replace(source, config=replace(source.config, labels=()))
    model = load(quantize(unnamed, TEXTS, tmp_path / "out"))
    assert model.head.projection is not None
    assert len(model.head.projection.bias) == 5
    assert model.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")


def test_every_value_is_in_range_and_zero_is_exact(checkpoint: Path) -> None:
    model = load(checkpoint)
    ranges = calibrate(model, TEXTS, "minmax", 100, 128, lambda done, total: None)
    assert len(ranges) == 7 * tiny.LAYERS
    for low, high in ranges.values():
        quantization = asymmetric((low, high))
        q = oracle.quantize_u8(np.array([low, 0.0, high], np.float32), quantization.scale, quantization.zero_point)
        assert q[1] == quantization.zero_point
        real = (q - quantization.zero_point) * quantization.scale
        np.testing.assert_allclose(real, [low, 0.0, high], atol=quantization.scale)
        assert symmetric((low, high)) * 127 == pytest.approx(max(-low, high), rel=1e-6)


def test_ranges_are_those_of_each_text_alone(checkpoint: Path) -> None:
    """Batching and padding must not be seen: the range over a batch is the union of the ranges of its texts."""
    model = load(checkpoint)
    together = calibrate(model, TEXTS, "minmax", 100, 16, lambda done, total: None)
    alone = [calibrate(model, [text], "minmax", 100, 16, lambda done, total: None) for text in TEXTS]
    for name, (low, high) in together.items():
        assert low == pytest.approx(min(ranges[name][0] for ranges in alone), rel=1e-4)
        assert high == pytest.approx(max(ranges[name][1] for ranges in alone), rel=1e-4)


def test_percentile_cuts_the_tails(checkpoint: Path) -> None:
    model = load(checkpoint)
    whole, most, all_of_it = (
        calibrate(model, TEXTS, method, percentile, 128, lambda done, total: None)
        for method, percentile in (("minmax", 100), ("percentile", 99), ("percentile", 100))
    )
    for name, (low, high) in whole.items():
        assert low <= most[name][0] < most[name][1] <= high
        np.testing.assert_allclose(all_of_it[name], (low, high), atol=(high - low) / 2000)
    assert most["0.up.input"][1] < whole["0.up.input"][1]


def test_degenerate_ranges_and_channels() -> None:
    assert asymmetric((0.0, 0.0)) == Quantization(1.0, 0)
    assert asymmetric((2.0, 4.0)).zero_point == 0
    assert asymmetric((-4.0, -2.0)).zero_point == 255
    assert symmetric((0.0, 0.0)) == 1.0
    weight = np.array([[0.0, 0.0], [-2.0, 1.0], [1e-30, 0.0]], np.float32)
    linear = quantize_linear(Linear("w", weight, np.zeros(3, np.float32)), Quantization(1.0, 0))
    assert linear.scale is not None
    assert linear.scale[0] == 1.0
    assert linear.weight.tolist() == [[0, 0], [-127, 64], [127, 0]]


def test_provenance_and_format(quantized: Path, checkpoint: Path) -> None:
    import hashlib

    step = json.loads((quantized / "provenance.json").read_text())["steps"][0]
    assert step["step"] == "quantize"
    assert step["settings"]["method"] == "minmax"
    assert step["settings"]["texts"] == len(TEXTS)
    for side, path in (("input_sha256", checkpoint), ("output_sha256", quantized)):
        assert step[side]["model.safetensors"] == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    config = json.loads((quantized / "config.json").read_text())
    assert config["architectures"] == ["DistilBertForTokenClassification"]
    assert config["quantization_config"]["format"] == "int-quantized"
    tensors = load_file(quantized / "model.safetensors")
    name = "distilbert.transformer.layer.0.attention"
    assert tensors[f"{name}.q_lin.weight"].dtype == np.int8
    assert tensors[f"{name}.q_lin.weight_scale"].shape == (tiny.HIDDEN, 1)
    assert tensors[f"{name}.q_lin.input_zero_point"].dtype == np.int8
    assert tensors[f"{name}.q_scale"].shape == (1,)


def test_pruned_blocks_survive(checkpoint: Path, tmp_path: Path) -> None:
    source = load(checkpoint)
    layer = source.layers[0]
    keep = np.random.default_rng(0).random((tiny.WIDE // 4, tiny.HIDDEN)) < 0.2
    up = replace(layer.up, weight=layer.up.weight * np.kron(keep, np.ones((4, 1), np.float32)))
    pruned = replace(source, layers=(replace(layer, up=up), *source.layers[1:]))
    model = load(quantize(pruned, TEXTS, tmp_path / "out"))
    assert model.layers[0].up.block == (4, 1)
    assert model.layers[0].down.block is None


def test_weights_of_7_bits(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    float_model, model = load(checkpoint), load(quantize(checkpoint, TEXTS, tmp_path / "out", weight_bits=7))
    for linear, real in zip(model.linears(), float_model.linears(), strict=True):
        assert np.abs(linear.weight.astype(int)).max(axis=1).tolist() == [63] * len(linear.weight)
        assert linear.scale is not None
        assert (np.abs(linear.weight * linear.scale[:, None] - real.weight) <= 0.5001 * linear.scale[:, None]).all()
    settings = json.loads((tmp_path / "out" / "provenance.json").read_text())["steps"][0]["settings"]
    assert settings["weight_bits"] == 7
    assert json.loads((quantized / "provenance.json").read_text())["steps"][0]["settings"]["weight_bits"] == 8


def test_progress_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize(checkpoint, TEXTS, tmp_path / "out", "percentile", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 6) for i in range(6)]


def refused(call: Callable[[], object], kind: type[TilewrightError], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_arguments_are_checked(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(lambda: quantize(checkpoint, [], out), InvalidInput, "no calibration text")
    refused(lambda: quantize(checkpoint, [" ", "\n"], out), InvalidInput, "no calibration text")
    refused(lambda: quantize(checkpoint, TEXTS, out, "entropy"), InvalidInput, "entropy", "minmax, percentile")
    refused(lambda: quantize(checkpoint, TEXTS, out, percentile=0.9999), InvalidInput, "percentile is 0.9999")
    refused(lambda: quantize(checkpoint, TEXTS, out, max_length=0), InvalidInput, "max_length is 0")
    refused(lambda: quantize(checkpoint, TEXTS, out, weight_bits=4), InvalidInput, "weight_bits is 4", "8, 7")
    refused(lambda: quantize(quantized, TEXTS, out), InvalidInput, "quantised already")
    refused(lambda: quantize(checkpoint, TEXTS, quantized), InvalidInput, "exists")
    refused(lambda: quantize(tmp_path / "absent", TEXTS, out), InvalidModel, "does not exist")
    bare = replace(load(checkpoint), tokenizer=None)
    refused(lambda: quantize(bare, TEXTS, out), InvalidInput, "no tokenizer.json")
    (tmp_path / "file").touch()
    refused(lambda: quantize(checkpoint, TEXTS, tmp_path / "file" / "out"), InvalidInput, "cannot be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = load(checkpoint)
    small = replace(source, config=replace(source.config, vocab_size=10))
    refused(lambda: quantize(small, TEXTS, tmp_path / "out"), InvalidInput, "use its own tokenizer")


def test_a_head_the_format_cannot_express_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = load(checkpoint)
    other = replace(source, head=replace(source.head, pre=source.head.projection, pre_activation="tanh"))
    refused(lambda: quantize(other, TEXTS, tmp_path / "out"), UnsupportedModel, "token_classification head")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, TEXTS, tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.iterdir())


UP = "distilbert.transformer.layer.1.ffn.lin1"
ATTENTION = "distilbert.transformer.layer.0.attention"
Tensors = dict[str, np.ndarray]
DAMAGE: list[tuple[Callable[[Tensors], object], tuple[str, ...]]] = [
    (lambda t: t.pop(f"{UP}.weight_scale"), (f"{UP[11:]}.weight_scale is missing",)),
    (lambda t: t.pop(f"{ATTENTION}.v_scale"), ("attention.v_scale is missing",)),
    (lambda t: t[f"{UP}.weight_scale"].fill(np.nan), ("weight_scale holds 64 NaN",)),
    (lambda t: t[f"{UP}.weight_scale"].fill(0), ("not positive",)),
    (lambda t: t[f"{UP}.input_scale"].fill(-1), ("input_scale is -1.0",)),
    (lambda t: t.update({f"{UP}.input_scale": np.ones(2, np.float32)}), ("expected one value",)),
    (lambda t: t.update({f"{UP}.weight_scale": np.ones((64, 2), np.float32)}), ("per-channel scales only",)),
    (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].astype(np.float32)}), ("expected int8",)),
    (lambda t: t.update({f"{UP}.input_zero_point": np.array([200], np.int32)}), ("-128..127",)),
    (lambda t: t[f"{ATTENTION}.k_lin.input_scale"].fill(1), ("must share one input scale",)),
]


@pytest.mark.parametrize(("edit", "parts"), DAMAGE)
def test_damaged_checkpoints(quantized: Path, tmp_path: Path, edit: Callable, parts: tuple[str, ...]) -> None:
    tensors = load_file(quantized / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((quantized / "config.json").read_bytes())
    refused(lambda: load(tmp_path), InvalidModel, *parts)


def test_weights_of_minus_128_are_saturated_and_noted(quantized: Path, tmp_path: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    tensors[f"{UP}.weight"][0, :3] = -128
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((quantized / "config.json").read_bytes())
    model = load(tmp_path)
    assert model.notes == ("saturated 3 weights of -128 to -127 in transformer.layer.1.ffn.lin1",)
    assert model.layers[1].up.weight[0, :3].tolist() == [-127] * 3


ROBERTA = ["Model", "ForQuestionAnswering", "ForTokenClassification", "ForSequenceClassification", "ForMaskedLM"]


@pytest.mark.parametrize("name", [f"Roberta{head}" for head in ROBERTA] + ["XLMRobertaForSequenceClassification"])
def test_roberta_counts_positions_behind_padding(name: str, tmp_path: Path) -> None:
    directory = tiny.save(tiny.build(name), tmp_path / "model")
    model = load(directory)
    assert model.config.max_positions == tiny.POSITIONS
    if "MaskedLM" not in name:  # whose outputs are over words
        check_against_transformers(model, directory)
    again = load(quantize(directory, TEXTS, tmp_path / "int8"))
    assert again.config == model.config
    np.testing.assert_array_equal(again.embeddings.position, model.embeddings.position)


def test_roberta_of_another_padding_is_refused(tmp_path: Path) -> None:
    directory = tiny.save(tiny.build("RobertaModel"), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": 3}))
    with pytest.raises(UnsupportedModel, match="pad_token_id is 3"):
        load(directory)


@pytest.mark.parametrize("name", ["BertModel", "DistilBertForSequenceClassification", "DistilBertForQuestionAnswering"])
def test_self_check_against_transformers(name: str, tmp_path: Path) -> None:
    """It passes what was read right and finds a model that is something else."""
    directory = tiny.save(tiny.build(name), tmp_path / "model")
    check_against_transformers(load(directory), directory)
    model = load(directory)
    layer = model.layers[1]
    other = replace(layer, down=replace(layer.down, bias=layer.down.bias * np.float32(1.1)))
    with pytest.raises(UnsupportedModel, match="layer 1 differs"):
        check_against_transformers(replace(model, layers=(model.layers[0], other)), directory)


def test_sparsity_is_written_beside_the_weights(tmp_path: Path) -> None:
    source = tiny.build("BertModel")
    first = source.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        first.weight.view(-1, 4, tiny.HIDDEN)[:, :, ::4] = 0
    path = quantize(tiny.save(source, tmp_path / "float"), TEXTS, tmp_path / "int8")
    found = json.loads((path / "sparsity.json").read_text())
    assert len(found) == 6 * tiny.LAYERS
    sparse = found.pop("encoder.layer.0.intermediate.dense")
    assert sparse["density"] == pytest.approx(0.75, abs=0.02)
    assert all(linear["block"] is None and linear["density"] > 0.9 for linear in found.values())


def test_a_graph_without_token_types_may_have_the_head_of_bert(tmp_path: Path) -> None:
    """It is read as a DistilBERT, whose own head has another activation: the checkpoint is a BERT's with one token type."""
    exported = tiny.export(
        tiny.build("BertForSequenceClassification", num_hidden_layers=1), tmp_path / "model.onnx", ["logits"]
    )
    source = replace(load(exported), tokenizer=load(tiny.save(tiny.build("BertModel"), tmp_path / "other")).tokenizer)
    assert source.config.architecture == "distilbert"
    written = load(quantize(source, TEXTS, tmp_path / "int8"))
    assert written.config.architecture == "bert"
    assert written.embeddings.token_type is not None
    assert not written.embeddings.token_type.any()
    ids = tiny.sequences(9, 4)
    for found, expected in zip(oracle.forward_float(written, ids), oracle.forward_float(source, ids), strict=True):
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0.05, atol=0.05)
