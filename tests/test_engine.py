import gc
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright
from tests import toy
from tilewright.engine import TensorInfo
from tilewright.errors import InvalidInput

Sequences = list[list[int]]
sequences = st.lists(
    st.lists(st.integers(0, toy.LIMITS.vocab_size - 1), min_size=1, max_size=toy.LIMITS.max_positions),
    min_size=1,
    max_size=12,
)


def pad(batch: Sequences, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, padded on the right, or at random places when there is a seed. Padding holds an invalid id."""
    rng = np.random.default_rng(seed)
    length = max(map(len, batch)) + (seed is not None)
    ids, mask = np.full((len(batch), length), -1), np.zeros((len(batch), length), np.int64)
    for row, sequence in enumerate(batch):
        columns = np.arange(len(sequence))
        columns = columns if seed is None else np.sort(rng.permutation(length)[: len(sequence)])
        ids[row, columns], mask[row, columns] = sequence, 1
    return ids, mask


def check(outputs: dict[str, np.ndarray], batch: Sequences, mask: np.ndarray) -> None:
    for row, sequence in enumerate(batch):
        for name, value in toy.expected(sequence).items():
            found = outputs[name][row]
            if name != "total":
                assert not found[mask[row] == 0].any()
                found = found[mask[row] == 1]
            np.testing.assert_array_equal(found, value)


@given(sequences, st.none() | st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_any_batch_gives_each_sequence_its_own_results(engine: tilewright.Engine, batch: Sequences, seed: int | None) -> None:
    ids, mask = pad(batch, seed)
    check(engine(ids, mask), batch, mask)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_a_batch_is_split_between_sequences_and_no_more_than_the_limit_asks(
    engine: tilewright.Engine, lengths: list[int]
) -> None:
    ids, mask = pad([[1] * length for length in lengths])
    runs, tokens = 1, 0
    for length in lengths:
        runs, tokens = (runs, tokens + length) if tokens + length <= toy.LIMITS.max_tokens else (runs + 1, length)
    calls = {kernel.name: kernel.calls for kernel in engine.profile({"input_ids": ids, "attention_mask": mask}, iterations=1)}
    assert calls == {"hidden": runs, "score": runs, "total": runs, "other": 1}


def test_a_run_takes_as_many_tokens_for_each_thread_as_the_level_says(tmp_path: Path, toy_library: Path) -> None:
    (level,) = toy.MANIFEST.levels
    manifest = replace(toy.MANIFEST, levels=(replace(level, run_tokens=16),))
    artifact = toy.write(tmp_path / "toy.tw", toy_library, manifest)
    for threads, lengths, runs in ((1, [8] * 5, 3), (2, [8] * 5, 2), (1, [30, 2], 2), (1, [32], 1)):
        ids, mask = pad([[1] * length for length in lengths])
        few = tilewright.load(artifact, num_threads=threads)
        calls = {kernel.name: kernel.calls for kernel in few.profile({"input_ids": ids, "attention_mask": mask}, iterations=1)}
        assert calls["hidden"] == runs
        check(few(ids, mask), [[1] * length for length in lengths], mask)


def test_token_types_reach_the_module(engine: tilewright.Engine) -> None:
    outputs = engine(input_ids=[[5, 6, 7]], token_type_ids=[[0, 1, 1]])
    np.testing.assert_array_equal(outputs["hidden"][0], toy.expected([5, 6, 7], [0, 1, 1])["hidden"])


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "u4", "i8", "u8"])
def test_any_integer_dtype_and_a_bool_mask_are_accepted(engine: tilewright.Engine, dtype: str) -> None:
    outputs = engine(np.array([[5, 6, 0]], dtype), attention_mask=[[True, True, False]])
    np.testing.assert_array_equal(outputs["total"][0], toy.expected([5, 6])["total"])


def test_results_are_the_callers_to_keep(engine: tilewright.Engine) -> None:
    first = engine([[1] * 16])
    kept = {name: value.copy() for name, value in first.items()}
    first["hidden"][0, 0, 0] += 0  # writable
    for length in (16, 7, 16):
        engine([[9] * length])
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)


def test_results_outlive_their_engine(toy_artifact: Path) -> None:
    outputs = tilewright.load(toy_artifact, num_threads=1)([[1, 2, 3]])
    gc.collect()
    np.testing.assert_array_equal(outputs["hidden"][0], toy.expected([1, 2, 3])["hidden"])


ONE = [[1, 2, 3]]
LONG = np.ones((2, 33), int)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[1.0, 2.0]]}, "dtype float64; expected integers"),
        ({"input_ids": [[True]]}, "dtype bool"),
        ({"input_ids": [["a"]]}, "expected integers"),
        ({"input_ids": [1, 2]}, r"shape \(2,\); expected \[batch, seq\]"),
        ({"input_ids": [[1, 2], [3]]}, "rows of different lengths"),
        ({"input_ids": np.zeros((0, 4), int)}, r"shape \(0, 4\); expected at least one sequence"),
        ({"input_ids": np.zeros((2, 0), int)}, r"shape \(2, 0\); expected at least one sequence of at least one token"),
        ({"input_ids": [[1, 100]]}, "input_ids holds 100; the model takes 0 to 99"),
        ({"input_ids": [[1, -1]]}, "input_ids holds -1"),
        ({"input_ids": np.array([[2**63 + 5]], np.uint64)}, "input_ids holds 9223372036854775807"),
        ({"input_ids": LONG}, "sequence 0 has 33 tokens; the model takes at most 32"),
        ({"input_ids": LONG, "attention_mask": np.tri(2, 33, 31, dtype=int)}, "sequence 1 has 33 tokens"),
        ({"input_ids": ONE, "attention_mask": [[1, 1]]}, r"attention_mask has shape \(1, 2\), input_ids \(1, 3\)"),
        ({"input_ids": ONE * 2, "attention_mask": [[1, 1, 1], [0, 0, 0]]}, "of sequence 1 is all zero"),
        ({"input_ids": ONE, "attention_mask": [[1, 2, 1]]}, "attention_mask holds 2; expected 1"),
        ({"input_ids": ONE, "attention_mask": [[1, -1, 0]]}, "attention_mask holds -1"),
        ({"input_ids": ONE, "attention_mask": [[1.0, 1.0, 0.0]]}, "attention_mask has dtype float64"),
        ({"input_ids": ONE, "token_type_ids": [[0, 2, 0]]}, "token_type_ids holds 2; the model takes 0 to 1"),
        ({"input_ids": ONE, "token_type_ids": [[0, 0]]}, "token_type_ids has shape"),
    ],
)
def test_bad_input_is_refused_on_one_line(engine: tilewright.Engine, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        engine(**inputs)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(engine(ONE)["score"][0], toy.expected(ONE[0])["score"])


def test_thread_count_below_one_is_refused(toy_artifact: Path) -> None:
    with pytest.raises(InvalidInput, match="num_threads is 0"):
        tilewright.load(toy_artifact, num_threads=0)


def test_metadata(engine: tilewright.Engine) -> None:
    assert engine.inputs[0] == TensorInfo("input_ids", "int64", ("batch", "seq"))
    assert [info.optional for info in engine.inputs] == [False, True, True]
    assert [info.shape for info in engine.outputs] == [("batch", "seq", 8), ("batch", "seq"), ("batch", 8)]


def test_tokenize_pads_and_truncates(engine: tilewright.Engine) -> None:
    inputs = engine.tokenize(["a b c", "b"])
    np.testing.assert_array_equal(inputs["input_ids"], [[1, 2, 3], [2, 0, 0]])
    np.testing.assert_array_equal(inputs["attention_mask"], [[1, 1, 1], [1, 0, 0]])
    check(engine(**inputs), [[1, 2, 3], [2]], inputs["attention_mask"])
    np.testing.assert_array_equal(engine.tokenize([("a", "b c")])["token_type_ids"], [[0, 1, 1]])
    with pytest.raises(InvalidInput, match="one str"):
        engine.tokenize("a b")
    assert engine.tokenize(["a " * 40])["input_ids"].shape == (1, 40)
    assert engine.tokenize(["a " * 40], truncate=True)["input_ids"].shape == (1, 32)


def test_benchmark_and_profile(engine: tilewright.Engine) -> None:
    result = engine.benchmark(3, 20, iterations=5, warmup=1)
    assert (result.batch, result.seq_len, result.threads, result.iterations) == (3, 20, 1, 5)
    assert 0 < result.p50 <= result.p90 <= result.p99
    assert result.throughput == pytest.approx(3 / result.p50 * 1e3)
    kernels = engine.profile({"input_ids": [[1] * 32] * 3}, iterations=2)  # two chunks
    calls = {kernel.name: kernel.calls for kernel in kernels}
    assert calls["hidden"] == calls["total"] == 2
    assert kernels[-1].name == "other"
    check(engine([[1, 2]]), [[1, 2]], np.ones((1, 2)))  # and the instrument is gone


def test_engines_of_different_sizes_in_many_threads_agree(toy_artifact: Path) -> None:
    engines = [tilewright.load(toy_artifact, num_threads=count) for count in (1, 2, 3)]
    rng = np.random.default_rng(0)
    batches = [[list(rng.integers(0, 100, rng.integers(1, 33))) for _ in range(5)] for _ in range(40)]

    def work(job: int) -> None:
        ids, mask = pad(batches[job % len(batches)])
        check(engines[job % 3](ids, mask), batches[job % len(batches)], mask)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(240)))


def test_threads_that_come_and_go_leave_none_behind(toy_artifact: Path) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def call() -> None:
        for engine in (single, double):
            engine([[1, 2, 3]])

    single, double = (tilewright.load(toy_artifact, num_threads=count) for count in (1, 2))
    call()
    before = threads()
    for _ in range(10):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    del double
    gc.collect()
    double = tilewright.load(toy_artifact, num_threads=2)
    call()
    assert threads() <= before


def test_weights_are_shared_pages_of_the_file(engine: tilewright.Engine) -> None:
    check(engine([[1, 2]]), [[1, 2]], np.ones((1, 2)))
    mappings = Path("/proc/self/smaps").read_text().split("weights.safetensors")[1:]
    assert mappings
    for mapping in mappings:  # a page copied on write counts as anonymous
        assert re.search(r"^Anonymous: +0 kB", mapping.split("VmFlags")[0], re.MULTILINE)


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_idle_threads_sleep(toy_artifact: Path) -> None:
    code = """
import sys, time, tilewright
engine = tilewright.load(sys.argv[1], num_threads=2)
for _ in range(5):
    engine([[1] * 32])
    time.sleep(0.2)
print(time.process_time())
for _ in range(5):
    engine([[1] * 32])
    time.sleep(0.2)
print(time.process_time())
"""
    before, after = map(float, run_python(code, str(toy_artifact)).split())
    assert after - before < 0.25  # a worker that spins as TVM's do takes 0.16 s of each 0.2 s


def test_running_an_artifact_imports_no_compiler(toy_artifact: Path) -> None:
    code = """
import sys, tilewright
assert not {"tvm", "tvm_ffi", "torch", "numpy"} & sys.modules.keys()
engine = tilewright.load(sys.argv[1])
engine(**engine.tokenize(["a b"]))
assert not {"tvm", "tvm_ffi", "torch", "pydantic", "transformers", "tilewright.codegen"} & sys.modules.keys()
assert "libtvm" not in open("/proc/self/maps").read()
import tvm
engine(**engine.tokenize(["a b"]))  # the compiler can come later
"""
    run_python(code, str(toy_artifact))


def test_memory_does_not_grow_with_calls_or_engines(toy_artifact: Path) -> None:
    code = """
import gc, resource, sys, numpy as np, tilewright
def pages():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1])
def work(count):
    for _ in range(count // 100):
        engine = tilewright.load(sys.argv[1], num_threads=2)
        for call in range(100):
            engine(np.ones((1 + call % 7, 1 + call % 32), int))
work(300)
before = pages()
work(3000)
print((pages() - before) * resource.getpagesize())
"""
    assert int(run_python(code, str(toy_artifact))) < 1 << 20
