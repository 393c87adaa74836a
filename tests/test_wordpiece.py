import copy
import json
import struct
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import toy
from tests.wordpiece import UNCASED, Pair, build_driver, characters, pair, revealing
from tilewright.codegen.characters import MARK, Settings, classes
from tilewright.codegen.wordpiece import wordpiece_table

ALL = Settings(True, True, True, True)
CONTENT: dict[str, Any] = json.loads(UNCASED.read_text("utf-8"))
SOME = sorted(CONTENT["model"]["vocab"])[::101]
MARKS = [chr(run.first) for run in classes(ALL) if run.value >= MARK]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def uncased(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    both = pair(CONTENT, program, tmp_path_factory.mktemp("uncased"))
    with both.ours:
        yield both


@pytest.fixture(scope="module")
def shown(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    both = pair(revealing(ALL), program, tmp_path_factory.mktemp("shown"))
    with both.ours:
        yield both


def test_every_code_point_alone_and_within_a_word(shown: Pair) -> None:
    # planes 4 to 13 hold no characters; a few of each are asked about
    ranges = [range(0x40000), range(0x40000, 0xE0000, 997), range(0xE0000, 0x110000)]
    assert not [text for text in characters(*ranges) if shown.differs(text)]


@pytest.mark.parametrize("chosen", [Settings(*flags) for flags in product([False, True], repeat=4)][::3], ids=str)
def test_settings_of_the_normalizer(chosen: Settings, program: Path, tmp_path: Path) -> None:
    both = pair(revealing(chosen), program, tmp_path)
    with both.ours:
        assert not [text for text in characters(range(0x3400), range(0xF900, 0x11800, 5)) if both.differs(text)]


def test_marks_are_put_in_order(shown: Pair) -> None:
    assert len(MARKS) > 10
    assert not [(a, b) for a, b in product(MARKS, repeat=2) if shown.differs(f"a{a}{b}\u0301{a}e {b}\u0903{a}\u0301x")]


text = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(["\0", " ", "a", *MARKS])), max_size=40)
pieces = st.lists(st.sampled_from([*SOME, " ", "[SEP]", "[MASK]", "[MASK", "the", "é", "中", "각", "\u0301"]), max_size=30).map(
    "".join
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(text, pieces), st.one_of(st.none(), text, pieces))
def test_any_text_and_any_pair(uncased: Pair, one: str, other: str | None) -> None:
    assert not uncased.differs(one, *([] if other is None else [other]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=30))
def test_what_is_no_utf8_counts_as_the_replacement_character(uncased: Pair, garbage: bytes) -> None:
    assert uncased.ours.encode(b"a " + garbage) == uncased.ours.encode(("a " + garbage.decode("utf-8", "replace")).encode())


@pytest.mark.parametrize("lengths", [(3,), (40,), (0, 0), (5, 30), (30, 5), (25, 25), (24, 31), (31, 24)], ids=str)
def test_truncation_takes_from_the_longer_text(uncased: Pair, lengths: tuple[int, ...]) -> None:
    texts = ["a " * length for length in lengths]
    tokenizer = copy.deepcopy(uncased.theirs)
    for limit in (1 + len(lengths), 2 + len(lengths), 20, 21, 30, 41, 64):
        tokenizer.enable_truncation(limit)
        encoding = tokenizer.encode(*texts)
        got = uncased.ours.encode(*(text.encode() for text in texts), limit=limit)
        assert got == (len(encoding.ids), (encoding.ids, encoding.type_ids))
    assert uncased.ours.encode(*(text.encode() for text in texts), limit=len(lengths))[0] == -2


def test_room_for_fewer_tokens_than_there_are(uncased: Pair) -> None:
    total, (ids, types) = uncased.ours.encode(b"one two three", capacity=2)
    assert (total, len(ids), len(types)) == (5, 2, 2)
    assert uncased.ours.encode(b"one two three", capacity=0) == (5, ([], []))


def test_long_words_and_long_texts(uncased: Pair) -> None:
    assert not any(uncased.differs("a" * length) for length in (99, 100, 101, 100_000))
    assert not uncased.differs("a\u0301" * 100 + " " + "e" * 99 + "\u00e9")
    assert not uncased.differs(" ".join(SOME * 20))


@pytest.mark.parametrize(
    "added",
    [
        {"content": "a[b", "normalized": False},
        {"content": "Éa", "normalized": True},
        {"content": "don't", "normalized": True, "special": False},
        {"content": "[MASK]s", "normalized": False, "lstrip": True, "rstrip": True},
    ],
    ids=lambda added: added["content"],
)
def test_added_tokens_are_found_in_the_text(added: dict[str, Any], program: Path, tmp_path: Path) -> None:
    base = {"id": 30522, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    content = CONTENT | {"added_tokens": [*CONTENT["added_tokens"], base | added]}
    both = pair(content, program, tmp_path)
    word = added["content"]
    cases = [word, f"x{word}y", f"  {word} . {word}{word}[SEP]", word.upper(), word[:-1], f"\u0301{word}\u0301", f"中{word}中"]
    with both.ours:
        assert both.theirs.encode(f"x {word}", add_special_tokens=False).ids[-1] == 30522
        assert not [case for case in cases if both.differs(case)]


@pytest.mark.parametrize("processor", [None, {"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]}], ids=str)
def test_other_ways_to_put_special_tokens_around(processor: Any, program: Path, tmp_path: Path) -> None:
    both = pair(CONTENT | {"post_processor": processor}, program, tmp_path)
    with both.ours:
        assert not both.differs("a man") and not both.differs("a man", "and a woman")


def altered(**changes: Any) -> str:
    return json.dumps({**CONTENT, **changes})


def test_other_tokenizers_have_no_table() -> None:
    token = CONTENT["added_tokens"][0]
    assert wordpiece_table(toy.TOKENIZER) is None
    assert wordpiece_table(altered(normalizer=None)) is None
    assert wordpiece_table(altered(pre_tokenizer={"type": "Whitespace"})) is None
    assert wordpiece_table(altered(added_tokens=[token | {"single_word": True}])) is None
    assert wordpiece_table(altered(added_tokens=[token | {"content": " a", "id": 30522}])) is None
    alike = [token | {"content": content, "id": 30522 + i, "normalized": True} for i, content in enumerate(("É", "e"))]
    assert wordpiece_table(altered(added_tokens=alike)) is None
    assert wordpiece_table("{}") is None


def test_tables_are_compact() -> None:
    table = wordpiece_table(json.dumps(CONTENT))
    assert table is not None
    words = sum(len(word.encode()) for word in CONTENT["model"]["vocab"])
    assert len(table) < words + 8 * len(CONTENT["model"]["vocab"]) + 50_000


TEXT = "a É [SEP] 각\u0301 \u0903\u0301x, don't 中".encode()
REQUEST = struct.pack("=QiiQ", 100, 1, 100, len(TEXT)) + TEXT


def refused(program: Path, table: bytes, path: Path) -> bool:
    """Whether the driver refuses `table` in one line; it must not crash over it, nor over a text if it takes it."""
    path.write_bytes(table)
    done = subprocess.run([program, path], input=REQUEST, capture_output=True, check=False)
    assert done.returncode in (0, 2), done.stderr.decode()
    assert done.returncode == 0 or done.stderr.count(b"\n") == 1
    return done.returncode == 2


def test_damaged_tables_are_refused(program: Path, tmp_path: Path) -> None:
    table = wordpiece_table(json.dumps(revealing(Settings(True, True, False, True))))
    assert table is not None
    words = len(table) // 4
    places = [*range(20), *range(20, words, words // 20)]
    for place in places:
        for value in (0, 0xFFFFFFFF):
            altered = bytearray(table)
            struct.pack_into("<I", altered, 4 * place, value)
            assert refused(program, bytes(altered), tmp_path / "t") or place > 2 or altered == table
    for size in (0, 3, 60, 68, len(table) // 2, len(table) - 4, len(table) - 1):
        assert refused(program, table[:size], tmp_path / "t")
    assert refused(program, table + bytes(4), tmp_path / "t")
