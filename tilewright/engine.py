"""Loads an artifact and runs it with TVM's runtime and NumPy only: no compiler, torch or transformers."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.artifact import check_addresses, consistently, open_artifact
from tilewright.cpu import ISA_VARIABLE, available_cores, choose_level, cpu_features
from tilewright.errors import InvalidArtifact, InvalidInput
from tilewright.files import read_text
from tilewright.forking import Gate
from tilewright.manifest import GROUP, TOKENIZER, LevelRecord, Manifest
from tilewright.measure import BenchmarkResult, KernelClock, KernelTime, random_ids, summarize, time_calls
from tilewright.packing import Float32, Int32, Packed, pack
from tilewright.runtime import Executable, acquire_threads, release_threads
from tilewright.tokenizer import guarded, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_THREADS = 1024
"""More than any machine this is for has cores."""

RUN_TOKENS = 256
"""Tokens of one run for each thread, if a batch has more than one sequence: their activations stay in the L2 cache."""


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
    manifest, weights = open_artifact(directory)
    level = choose_level(manifest.levels, cpu_features(), isa or os.environ.get(ISA_VARIABLE) or None)
    check_addresses(level, weights)
    parameters = [weights[parameter.tensor] for parameter in level.parameters.values()]
    executable = Executable((directory / level.library).resolve(), parameters)
    tokenizer = _read_tokenizer(directory / TOKENIZER) if TOKENIZER in manifest.files else None
    return Engine(manifest, level, executable, tokenizer, num_threads)


def _read_tokenizer(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise InvalidArtifact(f"{path} cannot be read ({error}); compile the model again") from None


class Engine:
    """A loaded artifact. Calls from several threads are safe and run one after the other."""

    def __init__(
        self, manifest: Manifest, level: LevelRecord, executable: Executable, tokenizer: str | None, num_threads: int
    ) -> None:
        """Use `load`."""
        self.manifest = manifest
        self.level = level
        self.num_threads = num_threads
        self._executable = executable
        self._tokenizer_text = tokenizer
        self._tokenizer_lock = Gate()  # truncation is a setting of the shared tokenizer
        self._takes_types = "token_type_ids" in manifest.inputs
        self._workspace = _aligned_rows(4, manifest.limits.max_tokens + GROUP)
        self._threads = acquire_threads(num_threads)
        weakref.finalize(self, release_threads, self._threads)

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
        packed = self._pack(input_ids, attention_mask, token_type_ids)
        return self._unpack(packed, self._threads.run(lambda: self._run(packed)))

    def profile(self, inputs: Mapping[str, ArrayLike], iterations: int = 10) -> tuple[KernelTime, ...]:
        """Mean time of each kernel over `iterations` calls with `inputs`, the largest first."""
        check_count("iterations", iterations)
        if unknown := [name for name in inputs if name not in self.manifest.inputs]:
            raise InvalidInput(f"inputs hold {unknown[0]!r}; the model takes {', '.join(self.manifest.inputs)}")
        packed = self._pack(**inputs)
        clock = KernelClock()

        def job() -> float:
            plain = time_calls(lambda: self._run(packed), duration=0, iterations=iterations, warmup=1)
            with self._executable.timed(clock.record):
                for _ in range(iterations):
                    self._run(packed)
            return sum(plain) / iterations

        return clock.summary(iterations, self._threads.run(job))

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

    def _pack(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
    ) -> Packed:
        if token_type_ids is not None and not self._takes_types:
            raise InvalidInput(f"token_type_ids was passed; the model takes {', '.join(self.manifest.inputs)}")
        return pack(self.manifest.limits, input_ids, attention_mask, token_type_ids)

    def _run(self, packed: Packed) -> list[list[Float32]]:
        """Outputs of each chunk. Only one thread at a time may be here: the workspace is shared."""
        max_tokens = min(self.manifest.limits.max_tokens, RUN_TOKENS * self.num_threads)
        return [self._run_chunk(packed, first, last) for first, last in packed.chunks(max_tokens)]

    def _run_chunk(self, packed: Packed, first: int, last: int) -> list[Float32]:
        begin, end = packed.offsets[first], packed.offsets[last]
        groups = -(-(end - begin) // GROUP)
        ids, positions, types, offsets = self._workspace

        def fill(row: Int32, values: Int32 | None) -> Int32:
            size = 0 if values is None else end - begin
            if values is not None:
                row[:size] = values[begin:end]
            row[size : groups * GROUP] = 0
            return row[: groups * GROUP].reshape(groups, GROUP)

        arguments = [fill(ids, packed.input_ids), fill(positions, packed.position_ids)]
        if self._takes_types:
            arguments.append(fill(types, packed.token_type_ids))
        offsets = offsets[: last - first + 1]
        np.subtract(packed.offsets[first : last + 1], begin, out=offsets)
        results = self._executable(*arguments, offsets)
        leading = {"token": (groups, GROUP), "sequence": (last - first,)}
        if [result.shape for result in results] != [(*leading[o.per], o.width) for o in self.manifest.outputs]:
            raise InvalidArtifact("the manifest lists other outputs than its module gives; compile the model again")
        return [
            result.reshape(groups * GROUP, -1)[: end - begin] if output.per == "token" else result
            for output, result in zip(self.manifest.outputs, results, strict=True)
        ]

    def _unpack(self, packed: Packed, chunks: list[list[Float32]]) -> dict[str, Float32]:
        outputs: dict[str, Float32] = {}
        for index, output in enumerate(self.manifest.outputs):
            parts = [chunk[index] for chunk in chunks]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
            array = packed.scatter(array) if output.per == "token" else array
            outputs[output.name] = array[..., 0] if output.squeeze else array
        return outputs


def check_count(name: str, value: object, most: int = 2**31 - 1) -> None:
    """Raise InvalidInput unless `value` is an integer from 1 to `most`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidInput(f"{name} is {value!r}; expected an integer from 1 to {most}")


def _aligned_rows(rows: int, columns: int) -> Int32:
    """i32[rows, columns], each row starting at a multiple of 64 bytes (columns is a multiple of 16)."""
    memory = np.empty(rows * columns + GROUP, np.int32)
    skip = -memory.ctypes.data % 64 // memory.itemsize
    return memory[skip : skip + rows * columns].reshape(rows, columns)
