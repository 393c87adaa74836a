"""The oracle itself: its float half against transformers, its quantised half against plain integer sums."""

import numpy as np
import pytest
import torch

from tests import oracle, tiny
from tilewright.codegen.model import Linear, Quantization
from tilewright.frontend import load

CLASSES = [
    "BertModel",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "DistilBertModel",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
]


def compare_with_transformers(reference: torch.nn.Module, outputs: list[dict], sequences: list, types=None) -> None:
    for i, (ids, ours) in enumerate(zip(sequences, outputs, strict=True)):
        arguments = {"input_ids": torch.from_numpy(ids)[None]}
        if types is not None:
            arguments["token_type_ids"] = torch.from_numpy(types[i])[None]
        with torch.inference_mode():
            theirs = reference(**arguments)
        for name, value in ours.items():
            if name != "sentence_embedding":
                np.testing.assert_allclose(value, theirs[name][0].numpy(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_float_forward_is_that_of_transformers(name: str, tmp_path) -> None:
    reference = tiny.build(name)
    model = load(tiny.save(reference, tmp_path))
    sequences = tiny.sequences(1, 5, 32)
    types = [np.arange(len(ids)) % 2 for ids in sequences] if name.startswith("Bert") else None
    compare_with_transformers(reference, oracle.forward_float(model, sequences, types), sequences, types)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(activation: str, tmp_path) -> None:
    reference = tiny.build("BertModel", hidden_act=activation)
    model = load(tiny.save(reference, tmp_path))
    sequences = tiny.sequences(9)
    compare_with_transformers(reference, oracle.forward_float(model, sequences), sequences)


def test_int8_linear_is_exact() -> None:
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (8, 3072)).astype(np.int8)
    weight[0] = 127
    linear = Linear("w", weight, np.zeros(8, np.float32), np.ones(8, np.float32), Quantization(1.0, 3))
    x = random.integers(-3, 253, (5, 3072)).astype(np.float32)
    x[0] = 252
    expected = x.astype(np.int64) @ weight.T.astype(np.int64)
    assert expected.max() == 252 * 127 * 3072
    np.testing.assert_array_equal(oracle._apply_int8(linear, x), expected.astype(np.float32))


def test_quantisation_rounds_to_even_and_saturates() -> None:
    x = np.array([-1e9, -0.5, 0.5, 1.5, 2.5, 1e9], np.float32)
    np.testing.assert_array_equal(oracle.quantize_u8(x, 1.0, 10), [0, 10, 10, 12, 12, 255])
    np.testing.assert_array_equal(oracle.round_s8(x), [-127, 0, 0, 2, 2, 127])
