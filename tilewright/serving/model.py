"""A model that is served: texts or token ids in, what its head says out."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.artifact import consistently, read_manifest
from tilewright.errors import InvalidArtifact
from tilewright.files import read_text
from tilewright.manifest import TOKENIZER, Manifest
from tilewright.results import Tokens, interpret
from tilewright.serving.errors import INVALID, TOO_LARGE, RequestError
from tilewright.serving.metrics import Metrics
from tilewright.serving.pool import Lost, Pool
from tilewright.serving.queue import Inputs, Outputs
from tilewright.serving.settings import Service, Settings
from tilewright.tokenizer import guarded, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Text = str | tuple[str, str]
_TOKENIZING = 2  # threads

SCORES = "scores"
"""Use of a model whose head gives one score to a text or a pair of them, as a cross-encoder for reranking does."""


@dataclass(frozen=True)
class Answer:
    """One sequence with its outputs."""

    tokens: Tokens
    outputs: Outputs


class ServedModel:
    """An async context manager: within it the model's instances run."""

    def __init__(self, service: Service, settings: Settings, metrics: Metrics) -> None:
        """Raises InvalidArtifact."""
        self.service, self._settings, self._metrics = service, settings, metrics
        artifact = service.launch.artifact
        self.manifest, self._tokenizers = consistently(artifact, lambda: _read(artifact))
        self.pool = Pool(service, self.manifest, metrics, hang=settings.timeout)
        self._threads = ThreadPoolExecutor(_TOKENIZING, "tokenizer")

    async def __aenter__(self) -> ServedModel:
        await self.pool.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.pool.__aexit__(*error)
        self._threads.shutdown()

    @property
    def name(self) -> str:
        """In requests."""
        return self.service.name

    @property
    def uses(self) -> frozenset[str]:
        """The kind of its head, and `scores` if that gives one score."""
        kind = self.manifest.head.kind
        single = kind == "sequence_classification" and self.manifest.outputs[0].width == 1
        return frozenset({kind, SCORES} if single else {kind})

    async def run(self, given: Sequence[Text | list[int]], truncate: bool = False) -> list[Answer]:
        """Run texts, pairs of texts, or token ids as they are; raises RequestError for what cannot be run or takes too long."""
        try:
            async with asyncio.timeout(self._settings.timeout):
                sequences = await self._sequences(given, truncate)
                outputs = await self.pool.run([self._inputs(sequence) for sequence in sequences])
        except TimeoutError:
            raise RequestError(504, f"not answered within {self._settings.timeout:g} s; send less at once, or later") from None
        except Lost as error:
            raise RequestError(500, str(error)) from None
        return [Answer(sequence, own) for sequence, own in zip(sequences, outputs, strict=True)]

    def interpret(self, answer: Answer) -> dict[str, Any]:
        """What the head says about a sequence (`tilewright.results`)."""
        return interpret(self.manifest, answer.outputs, answer.tokens)

    async def _sequences(self, given: Sequence[Text | list[int]], truncate: bool) -> list[Tokens]:
        if len(given) > self._settings.max_inputs:
            raise RequestError(
                TOO_LARGE, f"{len(given)} inputs were sent; at most {self._settings.max_inputs} are taken at once"
            )
        texts = [one for one in given if not isinstance(one, list)]
        encodings = iter(await self._encode(texts, truncate) if texts else [])
        sequences = []
        for number, one in enumerate(given):
            if isinstance(one, list):
                tokens = Tokens(np.arange(len(one)), one)
            else:
                encoding = next(encodings)
                tokens = Tokens(np.arange(len(encoding.ids)), encoding.ids, (one,) if isinstance(one, str) else one, encoding)
            self._check(number, tokens.ids)
            sequences.append(tokens)
        if (total := sum(len(tokens.ids) for tokens in sequences)) > self._settings.max_tokens:
            raise RequestError(
                TOO_LARGE, f"the inputs have {total} tokens; at most {self._settings.max_tokens} are taken at once"
            )
        return sequences

    def _check(self, number: int, ids: Sequence[int]) -> None:
        limits = self.manifest.limits
        if not ids:
            raise RequestError(INVALID, f"input {number} has no tokens")
        if len(ids) > limits.max_positions:
            message = f"input {number} has {len(ids)} tokens; the model takes at most {limits.max_positions}"
            raise RequestError(TOO_LARGE, f"{message}, and cuts texts off there if truncate is true")
        if not 0 <= min(ids) <= max(ids) < limits.vocab_size:
            wrong = next(one for one in ids if not 0 <= one < limits.vocab_size)
            raise RequestError(INVALID, f"input {number} holds the token {wrong}; the model takes 0 to {limits.vocab_size - 1}")

    def _inputs(self, tokens: Tokens) -> Inputs:
        inputs = {"input_ids": np.array(tokens.ids, np.int32)}
        if "token_type_ids" in self.manifest.inputs:
            types = [0] * len(tokens.ids) if tokens.encoding is None else tokens.encoding.type_ids
            if max(types) >= self.manifest.limits.token_types:
                raise RequestError(INVALID, f"model {self.name} takes no pairs of texts")  # by its tokenizer, they have types
            inputs["token_type_ids"] = np.array(types, np.int32)
        return inputs

    async def _encode(self, texts: Sequence[Text], truncate: bool) -> list[Encoding]:
        if not self._tokenizers:
            raise RequestError(INVALID, f"model {self.name} holds no tokenizer; send token ids instead of text")
        began = time.monotonic()
        tokenizer = self._tokenizers[truncate]
        encode = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: guarded(lambda: tokenizer.encode_batch(texts))
        )
        try:
            encodings: list[Encoding] = await encode
        except ValueError as error:
            raise RequestError(INVALID, f"the texts cannot be tokenised ({error})") from None
        self._metrics.tokenize_seconds.labels(self.name).observe(time.monotonic() - began)
        return encodings


def _read(artifact: Path) -> tuple[Manifest, dict[bool, Tokenizer]]:
    """The manifest, and tokenizers by whether they truncate, which is a setting of theirs; instances check the other files."""
    manifest, tokenizers = read_manifest(artifact), {}
    if TOKENIZER in manifest.files:
        try:
            text = read_text(artifact / TOKENIZER)
            for truncate in (False, True):
                tokenizers[truncate] = read_tokenizer(text)
                tokenizers[truncate].no_padding()  # the file may ask for padding to a fixed length
                tokenizers[truncate].no_truncation()
        except (OSError, ValueError) as error:
            raise InvalidArtifact(f"{artifact / TOKENIZER} is not a tokenizer ({error}); compile the model again") from None
        if hashlib.sha256(text.encode()).hexdigest() != manifest.files[TOKENIZER]:
            raise InvalidArtifact(f"{artifact / TOKENIZER} was altered; copy or compile the artifact again")
        tokenizers[True].enable_truncation(manifest.limits.max_positions)
    return manifest, tokenizers
