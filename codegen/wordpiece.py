"""tokenizer.json to the table that `runtime/wordpiece.c` reads: BERT's normalizer, pre-tokenizer, WordPiece and template.

The table is little-endian 32-bit words, in this order (`runtime/wordpiece.c` checks every one of them):

- header: magic, version, bytes of the whole table, id of unknown words, characters of the longest word that is looked up,
  then the counts of what follows: rules, words of texts, classes; entries and bytes of each of three dictionaries;
  bytes of the continuing prefix; entries of the template for one text and of that for two.
- rules: first character, last character, action (`_action`), ascending
- texts: the characters that rules of kind TEXT point at
- classes: first character, last character, class, ascending
- dictionaries: the vocabulary, added tokens found in the text as it is, added tokens found in the normalised text; each is
  where entries begin and the last one ends, their ids, and their UTF-8, in ascending order
- the continuing prefix, UTF-8
- templates: of each token kind (0: the special token `id`; 1 and 2: all tokens of the first and second text), id, token type

UTF-8 is filled up with zeros to whole words.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from tilewright.codegen.characters import TEXT, Rule, Run, Settings, classes, rules
from tilewright.tokenizer import guarded, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAGIC, VERSION = 0x50575754, 1  # "TWWP"
_PROBE = "a"
_INT32 = 2**31 - 1


def wordpiece_table(text: str) -> bytes | None:
    """The table of the tokenizer.json `text`; None if that is not BERT's WordPiece in every part, or no tokenizer at all."""
    try:
        tokenizer = read_tokenizer(text)
        return guarded(lambda: _table(tokenizer)) if _is_bert(tokenizer) else None
    except ValueError:
        return None  # whoever tokenizes with it will say so


def _table(tokenizer: Tokenizer) -> bytes | None:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model, normalizer = tokenizer.model, tokenizer.normalizer
    settings = Settings(
        normalizer.clean_text,
        normalizer.handle_chinese_chars,
        normalizer.lowercase if normalizer.strip_accents is None else normalizer.strip_accents,
        normalizer.lowercase,
    )
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    raw = {token.content: index for index, token in added.items() if not token.normalized}
    normalized = {normalizer.normalize_str(token.content): index for index, token in added.items() if token.normalized}
    if len(raw) + len(normalized) < len(added) or "" in normalized:
        return None  # of two that look alike the library takes the one that was added first
    if max(*vocabulary.values(), *added) > _INT32:
        return None
    found, templates = rules(settings), [_template(tokenizer, 1), _template(tokenizer, 2)]
    texts = "".join(run.value.text for run in found)
    dictionaries = [_dictionary(entries) for entries in (vocabulary, raw, normalized)]
    prefix = model.continuing_subword_prefix.encode()
    header = [
        MAGIC, VERSION, 0, vocabulary[model.unk_token], min(model.max_input_chars_per_word, _INT32),
        len(found), len(texts), len(classes(settings)),
        *(count for size, _ in dictionaries for count in size), len(prefix), *map(len, templates),
    ]  # fmt: skip
    body = b"".join(
        [
            _words(word for run in _actions(found) for word in run),
            _words(map(ord, texts)),
            _words(word for run in classes(settings) for word in run),
            *(content for _, content in dictionaries),
            _filled(prefix),
            *(_words(word for token in template for word in token) for template in templates),
        ]
    )
    header[2] = 4 * len(header) + len(body)
    return _words(header) + body


def _is_bert(tokenizer: Tokenizer) -> bool:
    """Whether every step is one that the C code repeats."""
    steps = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model)
    if [type(step).__name__ for step in steps] != ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
        return False
    if tokenizer.model.unk_token not in tokenizer.get_vocab(with_added_tokens=False):
        return False
    # stripping takes away white space only, which separates words anyway
    return all(
        not token.single_word and token.content.strip() == token.content
        for token in tokenizer.get_added_tokens_decoder().values()
    )


def _actions(found: Sequence[Run[Rule]]) -> Iterable[tuple[int, int, int]]:
    """The rules as words: kind in bits 0-1, spaced 2, starter 3, length of a text 4-7, operand from 8 on."""
    place = 0
    for first, last, rule in found:
        operand = rule.operand
        if rule.kind == TEXT:
            operand, place = place, place + len(rule.text)
        flags = rule.kind | rule.spaced << 2 | rule.starter << 3 | len(rule.text) << 4
        yield first, last, (flags | operand << 8) & 0xFFFFFFFF


def _dictionary(entries: Mapping[str, int]) -> tuple[tuple[int, int], bytes]:
    """(entries, bytes) and the content; an empty entry is left out, since it is found nowhere."""
    pairs = sorted((content.encode(), index) for content, index in entries.items() if content)
    text = b"".join(content for content, _ in pairs)
    starts = accumulate((len(content) for content, _ in pairs), initial=0)
    return (len(pairs), len(text)), _words(starts) + _words(index for _, index in pairs) + _filled(text)


def _template(tokenizer: Tokenizer, texts: int) -> list[tuple[int, int, int]]:
    """(kind, id, token type) of what post-processing makes of as many texts, seen from one that it makes."""
    encoding = tokenizer.encode(_PROBE, _PROBE if texts == 2 else None)
    template: list[tuple[int, int, int]] = []
    for token, sequence, kind in zip(encoding.ids, encoding.sequence_ids, encoding.type_ids, strict=True):
        entry = (0, token, kind) if sequence is None else (1 + sequence, 0, kind)
        if sequence is None or entry not in template:
            template.append(entry)
    return template


def _filled(text: bytes) -> bytes:
    return text + bytes(-len(text) % 4)


def _words(values: Iterable[int]) -> bytes:
    values = list(values)
    return struct.pack(f"<{len(values)}I", *values)
