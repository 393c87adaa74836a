"""Loads an artifact and runs it with the C runtime and NumPy only: no compiler, torch or transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.artifact import consistently, read_manifest
from tilewright.cpu import ISA_VARIABLE, available_cores, choose_level, cpu_features
from tilewright.errors import InvalidArtifact, InvalidInput
from tilewright.files import read_text
from tilewright.forking import Gate
from tilewright.manifest import TOKENIZER, LevelRecord, Manifest
from tilewright.measure import BenchmarkResult, KernelClock, KernelTime, random_ids, summarize, time_calls
from tilewright.packing import Inputs, as_inputs
from tilewright.runtime import Runtime
from tilewright.tokenizer import guarded, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_THREADS = 1024
"""More than any machine this is for has cores."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of an input or output of an engine."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    optional: bool = False


def load(path: str | Path, num_threads: int | None = None, isa: str | None = None) -> Engine:
    """Check the artifact at `path` and load it to run on `num_threads` threads (default: the cores available).

    isa: the level to run, of those that the artifact holds. Default: what the environment variable TILEWRIGHT_ISA names, or
    else the best that this CPU runs. Of the other levels no code is loaded and no weight is touched.
    Raises InvalidArtifact (missing, truncated or altered files, another schema), ArtifactTargetMismatch (CPU features
    this machine lacks) and InvalidInput (num_threads below 1, a level not held). No code of the artifact runs before it is
    checked.
    """
    if num_threads is not None:
        check_count("num_threads", num_threads, MAX_THREADS)
    directory = Path(path)
    return consistently(directory, lambda: _load(directory, num_threads or available_cores(), isa))


def _load(directory: Path, num_threads: int, isa: str | None) -> Engine:
    manifest = read_manifest(directory)
    level = choose_level(manifest.levels, cpu_features(), isa or os.environ.get(ISA_VARIABLE) or None)
    runtime = Runtime.open(directory, level.name, num_threads)
    tokenizer = _read_tokenizer(directory / TOKENIZER) if TOKENIZER in manifest.files else None
    return Engine(manifest, level, runtime, tokenizer, num_threads)


def _read_tokenizer(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise InvalidArtifact(f"{path} cannot be read ({error}); compile the model again") from None


class Engine:
    """A loaded artifact. Calls from several threads are safe and run one after the other."""

    def __init__(
        self, manifest: Manifest, level: LevelRecord, runtime: Runtime, tokenizer: str | None, num_threads: int
    ) -> None:
        """Use `load`."""
        self.manifest = manifest
        self.level = level
        self.num_threads = num_threads
        self._runtime = runtime
        self._tokenizer_text = tokenizer
        self._tokenizer_lock = Gate()  # truncation is a setting of the shared tokenizer
        self._takes_types = "token_type_ids" in manifest.inputs

    def __reduce__(self) -> Any:
        """Engines hold code and threads of their process."""
        raise InvalidInput("an engine cannot be pickled or copied; load the artifact where it is needed")

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """What a call takes."""
        return tuple(TensorInfo(name, "int64", ("batch", "seq"), optional=name != "input_ids") for name in self.manifest.inputs)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """What a call returns."""
        axes: dict[str, tuple[str, ...]] = {"token": ("batch", "seq"), "sequence": ("batch",)}
        return tuple(
            TensorInfo(o.name, "float32", axes[o.per] if o.squeeze else (*axes[o.per], o.width)) for o in self.manifest.outputs
        )

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
    ) -> dict[str, Float32]:
        """Run integer arrays [batch, seq] and return the manifest's outputs by name, f32, zero at padding.

        A sequence's results do not depend on the rest of the batch or on where its padding is. Raises InvalidInput.
        """
        results = self._run(self._inputs(input_ids, attention_mask, token_type_ids))
        outputs = zip(self.manifest.outputs, results, strict=True)
        return {output.name: array[..., 0] if output.squeeze else array for output, array in outputs}

    def profile(self, inputs: Mapping[str, ArrayLike], iterations: int = 10) -> tuple[KernelTime, ...]:
        """Mean time of each kernel over `iterations` calls with `inputs`, the largest first."""
        check_count("iterations", iterations)
        if unknown := [name for name in inputs if name not in self.manifest.inputs]:
            raise InvalidInput(f"inputs hold {unknown[0]!r}; the model takes {', '.join(self.manifest.inputs)}")
        arrays = self._inputs(**inputs)
        clock = KernelClock()
        plain = time_calls(lambda: self._run(arrays), duration=0, iterations=iterations, warmup=1)
        with self._runtime.timed(clock.record):
            for _ in range(iterations):
                self._run(arrays)
        return clock.summary(iterations, sum(plain) / iterations)

    def benchmark(
        self,
        batch: int = 1,
        seq_len: int = 128,
        *,
        duration: float = 2.0,
        iterations: int | None = None,
        warmup: int = 3,
    ) -> BenchmarkResult:
        """Time calls on random ids [batch, seq_len]: `iterations` of them, or for `duration` seconds."""
        for name, count in (("batch", batch), ("seq_len", seq_len), ("iterations", 1 if iterations is None else iterations)):
            check_count(name, count)
        if not 0 <= duration < float("inf") or warmup < 0:
            raise InvalidInput(f"duration is {duration} and warmup {warmup}; expected numbers that are not negative")
        ids = random_ids(self.manifest.limits.vocab_size, batch, seq_len)
        samples = time_calls(lambda: self(ids), duration=duration, iterations=iterations, warmup=warmup)
        return summarize(samples, batch, seq_len, self.num_threads)

    def tokenize(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], *, truncate: bool = False
    ) -> dict[str, NDArray[np.int64]]:
        """Inputs of a call for `texts` (or pairs of texts), padded on the right; `truncate` cuts what is too long."""
        if isinstance(texts, str):
            raise InvalidInput("tokenize was given one str; expected a list of texts")
        tokenizer = self._tokenizer
        with self._tokenizer_lock:
            if truncate:
                tokenizer.enable_truncation(self.manifest.limits.max_positions)
            else:
                tokenizer.no_truncation()
            try:
                encodings = guarded(lambda: tokenizer.encode_batch(list(texts)))
            except ValueError as error:
                raise InvalidInput(
                    f"the texts cannot be encoded ({error}); expected a list of str, or of pairs of them"
                ) from None
        shape = len(encodings), max((len(encoding.ids) for encoding in encodings), default=0)
        arrays: dict[str, NDArray[np.int64]] = {name: np.zeros(shape, np.int64) for name in self.manifest.inputs}
        for row, encoding in enumerate(encodings):
            fields: dict[str, Any] = {
                "input_ids": encoding.ids,
                "attention_mask": 1,
                "token_type_ids": encoding.type_ids,
            }
            for name, array in arrays.items():
                array[row, : len(encoding.ids)] = fields[name]
        return arrays

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self._tokenizer_text is None:
            raise InvalidInput("the artifact holds no tokenizer; pass input_ids instead of text")
        try:
            tokenizer = read_tokenizer(self._tokenizer_text)
        except ValueError as error:
            raise InvalidArtifact(f"{TOKENIZER} is not a tokenizer ({error}); compile the model again") from None
        tokenizer.no_padding()  # the file may ask for padding to a fixed length
        return tokenizer

    def _inputs(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
    ) -> Inputs:
        if token_type_ids is not None and not self._takes_types:
            raise InvalidInput(f"token_type_ids was passed; the model takes {', '.join(self.manifest.inputs)}")
        return as_inputs(input_ids, attention_mask, token_type_ids)

    def _run(self, inputs: Inputs) -> list[Float32]:
        return self._runtime.run(*inputs)


def check_count(name: str, value: object, most: int = 2**31 - 1) -> None:
    """Raise InvalidInput unless `value` is an integer from 1 to `most`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidInput(f"{name} is {value!r}; expected an integer from 1 to {most}")
