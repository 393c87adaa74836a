"""Tokenizers from the text of a tokenizer.json, whose library answers some garbage with a Rust panic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")


def read_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of the JSON `text`; raises ValueError, in one line, where it is none."""
    from tokenizers import Tokenizer

    return guarded(lambda: Tokenizer.from_str(text))


def guarded(call: Callable[[], T]) -> T:
    """The result of a `call` into the tokenizers library; whatever that raises becomes a ValueError of one line."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic is no Exception
        raise ValueError(" ".join(str(error).split())[:200]) from None
