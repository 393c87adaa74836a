"""The real DistilBERT and MiniLM, compiled and run on real sentences: against the oracle, ONNX Runtime and the float models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import tilewright
from benchmarks import assets
from tests import oracle
from tests.kernel_harness import level
from tests.test_end_to_end import LEVELS, Array, Ids, cosine, run
from tilewright.baseline import OnnxRuntime
from tilewright.codegen.model import EncoderModel
from tilewright.frontend import load
from tilewright.pipeline import quantize

REAL_LEVELS = [level(isa) for isa in LEVELS if isa != "portable"]
SENTENCES = 200


@cache
def sentences() -> list[str]:
    return assets.squad_sentences(SENTENCES)


@pytest.fixture(scope="module")
def tagger() -> EncoderModel:
    return load(assets.distilbert_qdq())


def engine_of(model: EncoderModel, isa: str, directory: Path) -> tilewright.Engine:
    return tilewright.load(tilewright.compile(model, isa, directory / "model.tw").path, num_threads=2)


def token_ids(engine: tilewright.Engine, texts: Sequence[str]) -> list[Ids]:
    encoded = engine.tokenize(texts, truncate=True)
    return [ids[mask == 1] for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)]


class TaggerReference:
    """Logits of each sentence from the oracle, the dequantised float model and ONNX Runtime."""

    def __init__(self, model: EncoderModel, sequences: Sequence[Ids]) -> None:
        self.sequences = sequences
        self.exact = [result["logits"] for result in oracle.forward(model, sequences)]
        self.real = [result["logits"] for result in oracle.forward_float(model, sequences)]
        run_graph = OnnxRuntime(assets.distilbert_qdq(), threads=1, unfused=True)
        self.runtime = [run_graph(ids[None])["logits"][0] for ids in sequences]


@pytest.fixture(scope="module")
def references() -> dict[str, TaggerReference]:
    return {}


@pytest.mark.parametrize("isa", REAL_LEVELS)
def test_distilbert(isa: str, tagger: EncoderModel, references: dict[str, TaggerReference], tmp_path: Path) -> None:
    engine = engine_of(tagger, isa, tmp_path)
    if not references:
        references["tagger"] = TaggerReference(tagger, token_ids(engine, sentences()))
    reference = references["tagger"]
    ours = [result["logits"] for result in run(engine, reference.sequences)]

    # a u8 that falls on the other side of a rounding boundary moves its sentence: all sentences together, and a floor
    each = [cosine(a, b) for a, b in zip(ours, reference.exact, strict=True)]
    assert cosine(np.concatenate(ours), np.concatenate(reference.exact)) >= 0.9999
    assert np.mean(each) >= 0.9999
    assert min(each) >= 0.999

    same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, reference.runtime, strict=True)])
    assert same.mean() >= 0.98
    to_real, runtime_to_real = (
        np.mean([cosine(a, b) for a, b in zip(logits, reference.real, strict=True)]) for logits in (ours, reference.runtime)
    )
    assert to_real >= runtime_to_real


@pytest.fixture(scope="module")
def minilm() -> EncoderModel:
    return load(assets.minilm())


@pytest.fixture(scope="module")
def minilm_int8(minilm: EncoderModel, tmp_path_factory: pytest.TempPathFactory) -> EncoderModel:
    """Calibrated on other sentences than those it is judged by."""
    texts = [text for text in assets.squad_sentences(264) if text not in set(sentences())][:64]
    return load(quantize(minilm, texts, tmp_path_factory.mktemp("minilm") / "int8"))


@pytest.fixture(scope="module")
def float_embeddings(minilm: EncoderModel) -> dict[str, Array]:
    """Embedding of each text by its text, float; filled by `embed_float`."""
    return {}


def embed_float(model: EncoderModel, engine: tilewright.Engine, texts: Sequence[str], known: dict[str, Array]) -> Array:
    new = [text for text in dict.fromkeys(texts) if text not in known]
    for start in range(0, len(new), 400):  # NumPy's intermediate arrays stay small
        part = new[start : start + 400]
        results = oracle.forward_float(model, token_ids(engine, part))
        known.update(zip(part, (result["sentence_embedding"] for result in results), strict=True))
    return np.stack([known[text] for text in texts])


@pytest.mark.parametrize("isa", REAL_LEVELS)
def test_minilm(
    isa: str, minilm: EncoderModel, minilm_int8: EncoderModel, float_embeddings: dict[str, Array], tmp_path: Path
) -> None:
    engine = engine_of(minilm_int8, isa, tmp_path)
    texts = sentences()
    ours = engine(**engine.tokenize(texts, truncate=True))["sentence_embedding"]
    real = embed_float(minilm, engine, texts, float_embeddings)
    assert np.mean([cosine(a, b) for a, b in zip(ours, real, strict=True)]) >= 0.99

    questions = assets.squad_questions(200)
    flat = [text for question in questions for text in (question.question, *question.sentences)]
    distinct = list(dict.fromkeys(flat))
    int8 = dict(zip(distinct, engine(**engine.tokenize(distinct, truncate=True))["sentence_embedding"], strict=True))
    embed_float(minilm, engine, distinct, float_embeddings)
    assert share_found(questions, int8) >= share_found(questions, float_embeddings) - 0.02


def share_found(questions: Sequence[assets.SquadQuestion], embeddings: dict[str, Array]) -> float:
    """Share of questions whose answer lies in the sentence nearest to them."""
    found = [
        np.argmax([cosine(embeddings[question.question], embeddings[text]) for text in question.sentences]) == question.answer
        for question in questions
    ]
    return float(np.mean(found))
