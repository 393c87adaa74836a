"""The C tokenizer beside the `tokenizers` library.

As a program, `python -m tests.wordpiece` compares them on every code point and on all texts of SQuAD, and prints the counts.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.native import RUNTIME, SANITIZERS, compile_c
from tilewright.codegen.characters import Settings, rules
from tilewright.codegen.wordpiece import wordpiece_table

ROOT = Path(__file__).parent.parent
UNCASED = ROOT / "models/minilm-l6-80-4x1/tokenizer.json"
_SOURCES = ("wordpiece", "wordpiece_table", "normalize")
_NO_LIMIT = 2**64 - 1

Tokens = tuple[list[int], list[int]]
"""Ids and token types."""


def build_driver(directory: Path) -> Path:
    """Compile the C tokenizer, under sanitizers, to a program that answers requests."""
    sources = [ROOT / "tests/native/wordpiece.c", *(RUNTIME / f"{name}.c" for name in _SOURCES)]
    return compile_c(directory / "wordpiece", sources, *SANITIZERS)


class Driver:
    """A running driver with the table of one tokenizer; a crash of it raises struct.error."""

    def __init__(self, program: Path, table: Path) -> None:
        self._process = subprocess.Popen([program, table], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        assert self._process.returncode == 0  # else the sanitizers found something

    def encode(self, *texts: bytes, limit: int = _NO_LIMIT, capacity: int = 1 << 16) -> tuple[int, Tokens]:
        """What encode returns, and the tokens that it wrote."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = struct.pack("=Qii", limit, len(texts), capacity)
        self._process.stdin.write(request + b"".join(struct.pack("=Q", len(text)) + text for text in texts))
        self._process.stdin.flush()
        (total,) = struct.unpack("=q", self._process.stdout.read(8))
        written = max(0, min(total, capacity))
        values = struct.unpack(f"={2 * written}q", self._process.stdout.read(16 * written))
        return total, (list(values[:written]), list(values[written:]))


@dataclass
class Pair:
    """Both tokenizers, made of one tokenizer.json."""

    theirs: Tokenizer
    ours: Driver

    def differs(self, *texts: str) -> bool:
        encoding = self.theirs.encode(*texts)
        return self.ours.encode(*(text.encode() for text in texts))[1] != (encoding.ids, encoding.type_ids)


def pair(content: dict[str, Any], program: Path, directory: Path) -> Pair:
    text = json.dumps(content)
    table = wordpiece_table(text)
    assert table is not None
    path = directory / "wordpiece.bin"
    path.write_bytes(table)
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Pair(tokenizer, Driver(program, path))


def revealing(settings: Settings) -> dict[str, Any]:
    """A tokenizer of `settings` that knows every character which normalising makes of another, so that a wrong one shows."""
    made = {character for run in rules(settings) for character in run.value.text or chr(run.first + run.value.operand)}
    shown = sorted(made | set("aex") | {chr(c) for run in rules(settings) for c in (run.first, run.last)} - {" "})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *shown, *(f"##{character}" for character in shown)]
    content: dict[str, Any] = json.loads(UNCASED.read_text("utf-8"))
    content["normalizer"] = {"type": "BertNormalizer", **settings._asdict()}
    content["model"]["vocab"] = {word: index for index, word in enumerate(words)}
    content["added_tokens"] = [token | {"id": words.index(token["content"])} for token in content["added_tokens"]]
    for name, token in content["post_processor"]["special_tokens"].items():
        token["ids"] = [words.index(name)]
    return content


def characters(*ranges: range, together: int = 256) -> Iterator[str]:
    """Texts in which so many code points stand alone and within a word each."""
    points = [chr(c) for points in ranges for c in points if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), together):
        yield " ".join(f"{c} a{c}e" for c in points[start : start + together])


def _squad() -> Iterator[str]:
    from benchmarks.assets import squad_dev, squad_train

    for path in (squad_dev(), squad_train()):
        for article in json.loads(path.read_text("utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                yield paragraph["context"]
                yield from (question["question"] for question in paragraph["qas"])


def main() -> None:
    from tilewright.assets import fetch

    cased = fetch("distilbert_qdq") / "tokenizer.json"
    everything = range(0x110000)
    with tempfile.TemporaryDirectory() as place:
        program = build_driver(Path(place))
        for name, content in {
            "MiniLM, uncased": json.loads(UNCASED.read_text("utf-8")),
            "DistilBERT, cased": json.loads(cased.read_text("utf-8")),
            "every setting on": revealing(Settings(True, True, True, True)),
        }.items():
            both = pair(content, program, Path(place))
            with both.ours:
                for what, texts in {"all code points": characters(everything, together=16), "SQuAD": _squad()}.items():
                    differing = [both.differs(text) for text in texts]
                    print(f"{name}: {len(differing)} texts of {what}, {sum(differing)} differ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
