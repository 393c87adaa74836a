"""The real DistilBERT (INT8 QDQ) and MiniLM (float), on real sentences: what we compute against independent engines."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks import assets
from tests import oracle
from tilewright.baseline import OnnxRuntime
from tilewright.codegen.model import EncoderModel, Linear
from tilewright.frontend import load
from tilewright.pipeline import quantize

SENTENCES = assets.squad_sentences(16)
Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def tagger() -> EncoderModel:
    return load(assets.distilbert_qdq())


@pytest.fixture(scope="module")
def minilm() -> EncoderModel:
    return load(assets.minilm())


def encode(model: EncoderModel) -> list[NDArray[np.int64]]:
    assert model.tokenizer is not None
    tokenizer = Tokenizer.from_str(model.tokenizer)
    tokenizer.no_padding()
    return [np.array(encoding.ids) for encoding in tokenizer.encode_batch(SENTENCES)]


def outputs(run: Callable, model: EncoderModel, name: str) -> list[Array]:
    return [result[name] for result in run(model, encode(model))]


def cosine(first: list[Array], second: list[Array]) -> float:
    """Mean over sentences."""
    pairs = zip(map(np.ravel, first), map(np.ravel, second), strict=True)
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))


def test_tagger_is_read_whole(tagger: EncoderModel) -> None:
    config = tagger.config
    assert (config.hidden_size, config.num_heads, config.intermediate_size) == (768, 12, 3072)
    assert (config.vocab_size, config.max_positions, config.activation) == (28996, 512, "gelu")
    assert len(tagger.layers) == 6
    assert tagger.quantized
    assert tagger.head.projection is not None
    assert tagger.head.projection.weight.shape == (213, 768)
    dropped = {note.split(" on ")[0] for note in tagger.notes}
    # of 100 pairs, 30 stay: 12 inputs of Linears that are no LayerNorm output, and 18 attention operands
    assert dropped == {"dropped 49 Q/DQ pairs", "dropped 13 Q/DQ pairs", "dropped 6 Q/DQ pairs", "dropped 2 Q/DQ pairs"}


def test_tagger_dequantised_is_a_distilbert(tagger: EncoderModel) -> None:
    """The weights in transformers' own DistilBERT give the oracle's float outputs."""
    reference = transformers.DistilBertForTokenClassification(
        transformers.DistilBertConfig(vocab_size=28996, num_labels=213, attn_implementation="eager")
    ).eval()
    body = reference.distilbert
    tables = tagger.embeddings
    norms = [(body.embeddings.LayerNorm, tables.norm)]
    assert tagger.head.projection is not None
    linears = [(reference.classifier, tagger.head.projection)]
    for theirs, ours in zip(body.transformer.layer, tagger.layers, strict=True):
        attention = theirs.attention
        modules = (
            attention.q_lin,
            attention.k_lin,
            attention.v_lin,
            attention.out_lin,
            theirs.ffn.lin1,
            theirs.ffn.lin2,
        )
        own = ours.attention
        linears += zip(modules, (own.query, own.key, own.value, own.output, ours.up, ours.down), strict=True)
        norms += [(theirs.sa_layer_norm, ours.attention_norm), (theirs.output_layer_norm, ours.output_norm)]
    with torch.no_grad():
        body.embeddings.word_embeddings.weight.copy_(torch.tensor(tables.word))
        body.embeddings.position_embeddings.weight.copy_(torch.tensor(tables.position))
        for module, part in linears:
            module.weight.copy_(torch.tensor(real_weight(part)))
            module.bias.copy_(torch.tensor(part.bias))
        for module, norm in norms:
            module.weight.copy_(torch.tensor(norm.weight))
            module.bias.copy_(torch.tensor(norm.bias))
        for ids in encode(tagger)[:4]:
            expected = reference(torch.from_numpy(ids)[None]).logits[0].numpy()
            found = oracle.forward_float(tagger, [ids])[0]["logits"]
            np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def real_weight(linear: Linear) -> Array:
    weight = linear.weight.astype(np.float32)
    return weight if linear.scale is None else weight * linear.scale[:, None]


def test_tagger_agrees_with_onnxruntime_and_is_nearer_to_float(tagger: EncoderModel) -> None:
    run_graph = OnnxRuntime(assets.distilbert_qdq(), threads=1, unfused=True)
    theirs = [run_graph(ids[None])["logits"][0] for ids in encode(tagger)]
    ours, real = (outputs(run, tagger, "logits") for run in (oracle.forward, oracle.forward_float))
    same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs, strict=True)])
    assert same.mean() >= 0.98
    assert cosine(ours, real) >= max(cosine(theirs, real), 0.998)


def test_minilm_float_is_that_of_transformers(minilm: EncoderModel) -> None:
    reference = transformers.AutoModel.from_pretrained(assets.minilm()).eval()
    for ids in encode(minilm)[:4]:
        with torch.inference_mode():
            expected = reference(torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()
        found = oracle.forward_float(minilm, [ids])[0]["last_hidden_state"]
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_minilm_quantised_keeps_its_embeddings(minilm: EncoderModel, method: str, tmp_path: Path) -> None:
    calibration = [text for text in assets.squad_sentences(48) if text not in SENTENCES]
    model = load(quantize(minilm, calibration, tmp_path / "int8", method))
    real = outputs(oracle.forward_float, minilm, "sentence_embedding")
    assert cosine(outputs(oracle.forward, model, "sentence_embedding"), real) >= 0.99
