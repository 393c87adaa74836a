"""What BERT's normalizer and pre-tokenizer make of each character, as runs of a table.

Both treat every character by itself, with one exception that the table keeps account of: decomposing (NFD) puts combining
marks in order of their class. The `tokenizers` library is asked about every character, because its Unicode is of another
version than Python's, and its categories of yet another.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, cmp_to_key
from typing import Generic, NamedTuple, TypeVar

from tokenizers.normalizers import NFD, BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

T = TypeVar("T")

DROP, SHIFT, TEXT, HANGUL = range(4)
"""What a character becomes: nothing, the character `operand` further on, a text, or the parts of a Korean syllable."""

SEPARATOR, ISOLATED, MARK = 1, 2, 3
"""Classes of normalised characters: what separates words, what is a word by itself, and from MARK on combining marks in the
order of their combining class. All other characters have class 0."""

_PLANES = (0, 1, 2, 3, 14, 15, 16)  # nothing is assigned in the others, and what is not assigned stays as it is
_BLOCK = 256  # characters asked about at a time
_SYLLABLES = range(0xAC00, 0xD7A4)
_BOUND = "\u2603"  # a snowman, between the characters of a block: no step changes it or makes it of others
_LAST_MARK = "\u0345"  # of the highest combining class: every other mark goes before it


class Settings(NamedTuple):
    """Those of a BertNormalizer, in its order; strip_accents is never left open here."""

    clean_text: bool
    handle_chinese_chars: bool
    strip_accents: bool
    lowercase: bool


class Rule(NamedTuple):
    """What normalising makes of a character.

    spaced: with a space before and behind it. starter: of a dropped one, that marks do not change places across it.
    """

    kind: int
    operand: int = 0
    text: str = ""
    spaced: bool = False
    starter: bool = False


class Run(NamedTuple, Generic[T]):
    """Adjacent characters, `first` to `last`, of which the same holds."""

    first: int
    last: int
    value: T


@cache
def rules(settings: Settings) -> tuple[Run[Rule], ...]:
    """Ascending runs of the characters that normalising changes."""
    found: dict[int, Rule] = {}
    for block in _blocks():
        results = _each(BertNormalizer(*settings), block)
        if results == list(block):
            continue
        starters = set() if all(results) else _starters(block, settings)
        for character, result in zip(block, results, strict=True):
            if result != character:
                found[ord(character)] = _rule(ord(character), result, character in starters)
    return tuple(_runs(found))


@cache
def classes(settings: Settings) -> tuple[Run[int], ...]:
    """Ascending runs of the normalised characters whose class is not 0."""
    split = BertPreTokenizer().pre_tokenize_str
    found: dict[int, int] = {}
    for block in _blocks():
        if len(split(f"a{block}a")) > 1:
            words = {character: len(split(f"a{character}a")) for character in block}
            found |= {ord(c): SEPARATOR if count == 2 else ISOLATED for c, count in words.items() if count > 1}
    if settings.strip_accents:
        found |= _marks(settings)
    return tuple(_runs(found))


def _marks(settings: Settings) -> dict[int, int]:
    """The classes of the marks that stripping accents leaves, in the order into which decomposing brings them."""
    kept = BertNormalizer(*settings).normalize_str
    marks = sorted((c for block in _blocks() for c in _moved(block) if kept(c)), key=cmp_to_key(_compare))
    found, kind = {}, MARK
    for index, mark in enumerate(marks):
        kind += index > 0 and _compare(marks[index - 1], mark) != 0
        found[ord(mark)] = kind
    return found


def _compare(one: str, other: str) -> int:
    """Which of two marks decomposing puts first; 0 if it leaves them as they are."""
    decompose = NFD().normalize_str
    if decompose(one + other) != one + other:
        return 1
    return -1 if decompose(other + one) != other + one else 0


def _moved(block: str) -> set[str]:
    """The combining marks of `block`."""
    text = NFD().normalize_str(_BOUND.join(_LAST_MARK + character for character in block))
    return {c for c, result in zip(block, text.split(_BOUND), strict=True) if not result.startswith(_LAST_MARK)}


def _starters(block: str, settings: Settings) -> set[str]:
    """The characters of `block` that marks do not pass when they are put in order.

    Of those that cleaning drops it does not matter: they are gone before.
    """
    cleaned = _each(BertNormalizer(settings.clean_text, False, False, False), block)
    return {character for character, result in zip(block, cleaned, strict=True) if result} - _moved(block)


def _blocks() -> Iterator[str]:
    """All characters that may be changed, in ascending order."""
    for plane in _PLANES:
        for start in range(plane << 16, (plane + 1) << 16, _BLOCK):
            if not 0xD800 <= start < 0xE000:  # halves of UTF-16 pairs are no characters
                yield "".join(map(chr, range(start, start + _BLOCK))).replace(_BOUND, "")


def _each(normalizer: BertNormalizer, block: str) -> list[str]:
    return normalizer.normalize_str(_BOUND.join(block)).split(_BOUND)


def _rule(point: int, result: str, starter: bool) -> Rule:
    if point in _SYLLABLES:
        return Rule(HANGUL)
    if not result:
        return Rule(DROP, starter=starter)
    spaced = len(result) > 2 and result[0] == result[-1] == " "
    core = result[1:-1] if spaced else result
    if len(core) == 1:
        return Rule(SHIFT, ord(core) - point, spaced=spaced)
    return Rule(TEXT, text=core, spaced=spaced)


def _runs(found: dict[int, T]) -> Iterator[Run[T]]:
    """`found`, whose keys ascend, with adjacent equal entries together."""
    first = last = -2
    value: T | None = None
    for point, own in sorted(found.items()):
        if point == last + 1 and own == value:
            last = point
            continue
        if value is not None:
            yield Run(first, last, value)
        first, last, value = point, point, own
    if value is not None:
        yield Run(first, last, value)
