import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests import tiny
from tilewright.codegen.model import Head
from tilewright.errors import InvalidInput, InvalidModel
from tilewright.pipeline.models import load_module, module_predict
from tilewright.pipeline.tasks import TASKS, embedding, find_task, question_answering, token_classification
from tilewright.pipeline.tasks.base import Context, Feature, TextSettings, check_tokenizer, load_tokenizer, pad
from tilewright.pipeline.tasks.squad import Answer, Question, read_squad


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny.save(tiny.build("BertModel"), tmp_path_factory.mktemp("model")))


def context(tokenizer: Tokenizer, labels: tuple[str, ...] = ()) -> Context:
    return Context(tokenizer, TextSettings(max_length=16, stride=4), labels)


def squad_file(path: Path, **changes: Any) -> Path:
    entry = {"id": "q1", "question": "w1 w2 ", "answers": [{"text": "w7 w8", "answer_start": 6}]} | changes
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "w5 w6 w7 w8", "qas": [entry]}]}]}))
    return path


def question(words: int, start: int, end: int) -> Question:
    text = " ".join(tiny.WORDS[10 + i] for i in range(words))
    first = len(" ".join(text.split(" ")[:start])) + (start > 0)
    answer = " ".join(text.split(" ")[start : end + 1])
    return Question("q", "w1 w2", text, (Answer(answer, first),), 0)


# The official script's rules and what they give, worked out by hand: lower case, no punctuation, no articles, best of all
# answers, F1 over words with repetition.
OFFICIAL = [
    ("The Denver Broncos!", ["Denver Broncos"], 100.0, 100.0),
    ("Broncos", ["Denver Broncos", "Panthers"], 200 / 3, 0.0),
    ("a an the", ["the"], 100.0, 100.0),
    ("gold gold", ["gold"], 200 / 3, 0.0),
    ("Santa Clara, California", ["Levi's Stadium", "santa clara california."], 100.0, 100.0),
    ("nothing", ["something else"], 0.0, 0.0),
]


@pytest.mark.parametrize(("given", "expected", "f1", "exact"), OFFICIAL)
def test_squad_metric_has_the_official_values(given: str, expected: list[str], f1: float, exact: float) -> None:
    record = Question("q", "", "", tuple(Answer(text, 0) for text in expected), 0)
    found = question_answering.metric([given], [record])
    assert found["f1"] == pytest.approx(f1) and found["exact_match"] == pytest.approx(exact)


def test_squad_metric_averages_over_questions() -> None:
    records = [Question("q", "", "", tuple(Answer(text, 0) for text in expected), 0) for _, expected, _, _ in OFFICIAL]
    found = question_answering.metric([given for given, *_ in OFFICIAL], records)
    assert found["f1"] == pytest.approx(sum(row[2] for row in OFFICIAL) / len(OFFICIAL))
    assert found["exact_match"] == pytest.approx(50.0)


def test_squad_file(tmp_path: Path) -> None:
    (found,) = read_squad(squad_file(tmp_path / "a.json"))
    assert found == Question("q1", "w1 w2", "w5 w6 w7 w8", (Answer("w7 w8", 6),), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": []}, "q1 has no answers"),
        ({"answers": [{"text": "w7", "answer_start": 5}]}, "'w7' is not at 5"),
        ({"answers": [{"text": "w7", "answer_start": -5}]}, "is not at -5"),
        ({"answers": [{"text": "w7"}]}, "answer_start: Field required"),
        ({"question": 3}, "question: Input should be a valid string"),
    ],
)
def test_bad_squad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_squad(squad_file(tmp_path / "a.json", **changes))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"data": []}'])
def test_files_that_are_no_squad(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"a\.json"):
        read_squad(tmp_path / "a.json")


@given(words=st.integers(1, 39), data=st.data())
def test_every_answer_is_labelled_in_a_window_that_holds_it(tokenizer: Tokenizer, words: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, words - 1))
    end = data.draw(st.integers(start, min(start + 3, words - 1)))
    settings = context(tokenizer)
    record = question(words, start, end)
    rows = question_answering.features([record], settings)
    expected = [10 + i + 1 for i in range(start, end + 1)]  # ids of the answer's words
    spans = [(row["start_positions"], row["end_positions"], row["input_ids"]) for row in rows]
    held = [ids[first : last + 1] for first, last, ids in spans if (first, last) != (0, 0)]
    assert held and all(ids == expected for ids in held)  # windows share 4 tokens, and answers have at most 4
    covered = {token for _, _, ids in spans for token in ids[2:]}
    assert covered == set(range(11, 11 + words))
    assert all(len(ids) <= settings.settings.max_length for *_, ids in spans)


def oracle_answer(scores: Sequence[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]], words: list[str]) -> str:
    """The best span by trying all; scores has the first word of each window and its logits by word."""
    best = max(
        (float(start[i] + end[j]), -k, first + i, first + j)
        for k, (first, start, end) in enumerate(scores)
        for i in range(len(start))
        for j in range(i, min(i + question_answering.MAX_ANSWER, len(end)))
    )
    return " ".join(words[best[2] : best[3] + 1])


@pytest.mark.parametrize("seed", range(20))
def test_best_answer_over_all_windows(tokenizer: Tokenizer, seed: int) -> None:
    random = np.random.default_rng(seed)
    record = question(words=36, start=0, end=0)
    encodings = list(question_answering.windows(record, context(tokenizer)))
    assert len(encodings) > 2
    outputs, scores = [], []
    for encoding in encodings:
        logits = {name: random.normal(size=len(encoding.ids)).astype(np.float32) for name in ("start_logits", "end_logits")}
        for values in logits.values():
            values[:2] += 100  # the question's tokens can be no answer
        outputs.append((encoding, logits))
        scores.append((encoding.ids[2] - 11, logits["start_logits"][2:], logits["end_logits"][2:]))
    assert question_answering.best_answer(outputs, record.context) == oracle_answer(scores, record.context.split(" "))


def test_question_that_leaves_no_room(tokenizer: Tokenizer) -> None:
    record = Question("q9", " ".join(["w1"] * 13), "w3 w4", (Answer("w3", 0),), 0)
    with pytest.raises(InvalidInput, match="max_length 16 leaves 3 tokens to the context of question q9"):
        question_answering.features([record], context(tokenizer))


def test_ranks_against_sorting() -> None:
    random = np.random.default_rng(0)
    questions, paragraphs = (random.normal(size=(n, 8)).astype(np.float32) for n in (50, 20))
    expected = random.integers(0, 20, 50)
    order = np.argsort(-(questions @ paragraphs.T), axis=1)
    brute = [list(row).index(own) + 1 for row, own in zip(order, expected, strict=True)]
    assert embedding.ranks(questions, paragraphs, expected).tolist() == brute


def test_equal_paragraphs_do_not_count_as_found() -> None:
    same = np.ones((3, 1), np.float32)
    assert embedding.ranks(same, same, np.arange(3)).tolist() == [3, 3, 3]


def test_retrieval_metrics(tokenizer: Tokenizer) -> None:
    records = [Question(str(i), f"w{i}", f"w{i + 20} w{i + 20}", (Answer("", 0),), i) for i in range(15)]
    settings = context(tokenizer)

    def predict(features: Sequence[Feature]) -> list[dict[str, np.ndarray[Any, np.dtype[np.float32]]]]:
        numbers = [(row["input_ids"][0] - 1) % 20 for row in features]  # question i and paragraph i alike
        return [{"sentence_embedding": np.eye(20, dtype=np.float32)[n] * 3} for n in numbers]

    found = embedding.evaluate(predict, records, settings)
    assert found == {"recall_at_10": 1.0, "recall_at_1": 1.0, "mrr": 1.0}
    assert embedding.evaluate(predict, records, settings, predict)["cosine"] == pytest.approx(1)


def test_texts_of_embeddings_come_once() -> None:
    records = [Question("1", "w1", "w2", (), 0), Question("2", "w3", "w2", (), 0)]
    assert embedding.texts(records) == ["w2", "w1", "w3"]


def test_words_are_labelled_at_their_first_token() -> None:
    pieces = {"[UNK]": 0, "a": 1, "##b": 2, "c": 3}
    tokenizer = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
                "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                          "max_input_chars_per_word": 9, "vocab": pieces},
            }
        )
    )  # fmt: skip
    row = token_classification.Row(tokens=("ab", "c", "abb"), tags=("X", 0, "Y"))
    found = token_classification.features([row], Context(tokenizer, TextSettings(), ("O", "X", "Y")))
    assert found == [{"input_ids": [1, 2, 3, 1, 2, 2], "token_type_ids": [0] * 6, "labels": [1, -100, 0, 2, -100, -100]}]


def test_token_scores() -> None:
    found, expected = np.array([0, 1, 2, 0, 0, 1]), np.array([0, 1, 1, 2, 0, -100])
    scores = token_classification.scores(found, expected)
    # 5 tokens count, 3 agree; class 0 is outside: 1 hit of 2 found and 3 expected (tie of 0 and 1 goes to the first seen)
    assert scores == {"agreement": pytest.approx(3 / 5), "f1": pytest.approx(2 / 5)}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("token_classification", {"tokens": ["a"], "tags": []}, "line 1: the row: .*1 tokens have 0 tags"),
        ("token_classification", {"tokens": ["a"]}, "line 1: tags: Field required"),
        ("sequence_classification", {"text": "a", "labels": 1}, "line 1: labels: Extra inputs"),
        ("sequence_classification", {"text": 1}, "line 1: text"),
    ],
)
def test_bad_rows(tmp_path: Path, task: str, row: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InvalidInput, match=message):
        TASKS[task].read(tmp_path / "a.jsonl")


def test_label_of_another_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1", "label": "good"}\n')
    records = TASKS["sequence_classification"].read(tmp_path / "a.jsonl")
    with pytest.raises(InvalidInput, match="label 'good' is not one of the model's: no, yes"):
        TASKS["sequence_classification"].features(records, context(tokenizer, labels=("no", "yes")))


def test_missing_file_and_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_squad(tmp_path / "none.json")
    with pytest.raises(InvalidInput, match="task squat is unknown; choose one of question_answering"):
        find_task("squat")
    assert find_task("squad") is TASKS["question_answering"]


def test_padding_masks_and_ignores() -> None:
    batch = pad([{"input_ids": [5], "labels": [1]}, {"input_ids": [6, 7], "labels": [0, 2]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 0], [6, 7]], "attention_mask": [[1, 0], [1, 1]], "labels": [[1, -100], [0, 2]],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["BertForTokenClassification", "DistilBertForQuestionAnswering", "BertModel"])
def test_answers_do_not_depend_on_the_batch(name: str) -> None:
    model = tiny.build(name)
    features = [{"input_ids": ids.tolist(), "token_type_ids": [0] * len(ids)} for ids in tiny.sequences(3, 9, 1, 20)]
    predict = module_predict(model, Head("none") if name == "BertModel" else Head("token_classification"))
    together = predict(features)
    for feature, found in zip(features, together, strict=True):
        with torch.inference_mode():
            alone = model(torch.tensor([feature["input_ids"]]))
        for output, value in found.items():
            expected = alone["last_hidden_state"].mean(1) if output == "sentence_embedding" else alone[output]
            np.testing.assert_allclose(value, expected[0].numpy(), atol=1e-5)


def test_model_without_the_head(tmp_path: Path) -> None:
    path = tiny.save(tiny.build("BertModel"), tmp_path / "model")
    with pytest.raises(InvalidModel, match="has no question_answering head"):
        load_module(TASKS["question_answering"], path)
    load_module(TASKS["question_answering"], path, needs_head=False)
    load_module(TASKS["embedding"], path)


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(InvalidInput, match="yields id 50, the model has 50"):
        check_tokenizer([{"input_ids": [1, 50]}], 50)
