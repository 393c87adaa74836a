"""The C runtime by itself, under sanitizers: its API beside Python's, its parsers, its threads."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tilewright
from tests import tiny, toy
from tests.native import HERE, SANITIZERS, compile_c, runtime_sources
from tests.test_artifact import edit_manifest
from tests.test_end_to_end import SPARSITY, prune
from tilewright.frontend import load
from tilewright.manifest import Manifest, checksum
from tilewright.pipeline import quantize

Build = Callable[..., Path]
Ids = list[list[int]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds a program of tests/native together with the runtime, once."""
    directory = tmp_path_factory.mktemp("native")

    def build(name: str, *flags: str, without: str = "") -> Path:
        output = directory / name
        sources = [HERE / f"{name}.c", *(source for source in runtime_sources() if source.name != without)]
        return output if output.exists() else compile_c(output, sources, "-D_POSIX_C_SOURCE=200809L", *(flags or SANITIZERS))

    return build


def run(command: list[str | Path], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def message(ids: np.ndarray, mask: np.ndarray | None = None, types: np.ndarray | None = None) -> bytes:
    """A batch as run_artifact reads it."""
    kind = (mask is not None) + 2 * (types is not None)
    return (
        np.concatenate([[kind, *ids.shape], *(a.ravel() for a in (ids, mask, types) if a is not None)]).astype("<i8").tobytes()
    )


def check_same(program: Build, artifact: Path, isa: str, threads: int) -> None:
    """C gives, bit for bit, what Python gives, padded and ragged, in a program that the sanitizers find nothing wrong with."""
    engine, random = tilewright.load(artifact, 1, isa), np.random.default_rng(0)
    limits, typed = engine.manifest.limits, "token_type_ids" in engine.manifest.inputs
    messages, expected = [], []
    for batch, seq in ((1, 1), (1, 16), (3, 17), (40, 31)):
        ids, types = (random.integers(0, bound, (batch, seq)) for bound in (limits.vocab_size, limits.token_types))
        mask = (random.random((batch, seq)) < 0.7).astype(int)
        mask[:, -1] = 1
        for arrays in ((ids,), (ids, mask), *([(ids, mask, types)] if typed else [])):
            messages.append(message(*arrays))
            expected += [array.tobytes() for array in engine(*arrays).values()]
        kept, lengths = mask.astype(bool), mask.sum(1)
        messages.append(np.concatenate([[4, batch, kept.sum()], ids[kept], [0, *lengths.cumsum()]]).astype("<i8").tobytes())
        outputs = zip(engine.manifest.outputs, engine(ids, mask).values(), strict=True)
        expected += [(array[kept] if output.per == "token" else array).tobytes() for output, array in outputs]
    done = run([program("run_artifact"), artifact, isa, str(threads)], b"".join(messages))
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    assert done.stdout == b"".join(expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_c_gives_what_python_gives(program: Build, toy_artifact: Path, threads: int) -> None:
    check_same(program, toy_artifact, "portable", threads)


def test_c_gives_what_python_gives_of_an_encoder(program: Build, tmp_path: Path) -> None:
    source = prune(load(tiny.save(tiny.build("BertForTokenClassification"), tmp_path / "float")), SPARSITY["mixed"])
    quantize(source, tiny.texts(20), tmp_path / "int8")
    check_same(program, tilewright.compile(tmp_path / "int8", "avx2", tmp_path / "x.tw").path, "avx2", 2)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (message(np.array([[1, 100]])), "input_ids holds 100; the model takes 0 to 99"),
        (message(np.array([[1, -(2**63)]])), "input_ids holds -9223372036854775808"),
        (message(np.array([[1]]), np.array([[2]])), "attention_mask holds 2"),
        (message(np.array([[1]]), np.array([[0]])), "attention_mask of sequence 0 is all zero"),
        (message(np.array([[1]]), None, np.array([[2]])), "token_type_ids holds 2"),
        (message(np.ones((1, 33), int)), "sequence 0 has 33 tokens; the model takes at most 32"),
        (message(np.ones((0, 3), int)), "has shape [0, 3]"),
        (np.array([4, 2, 3, 1, 1, 1, 0, 4, 3]).astype("<i8").tobytes(), "offsets go from 4 to 3 at sequence 1"),
        (np.array([4, 1, 3, 1, 1, 1, 1, 3]).astype("<i8").tobytes(), "offsets that do not begin with 0"),
        (np.array([4, 1, 40, *[1] * 40, 0, 40]).astype("<i8").tobytes(), "sequence 0 has 40 tokens"),
    ],
)
def test_bad_input_is_a_status_and_the_engine_goes_on(program: Build, toy_artifact: Path, batch: bytes, text: str) -> None:
    done = run([program("run_artifact"), toy_artifact, "", "1"], batch + message(np.array([[1, 2]])))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr.decode().startswith("1 ") and text in done.stderr.decode()
    assert done.stdout == b"".join(
        toy.expected([1, 2])[name].astype(np.float32).tobytes() for name in ("hidden", "score", "total")
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path: (path / "weights.safetensors").write_bytes(b""), "weights.safetensors was altered"),
        (lambda path: (path / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda path: (path / "manifest.json").unlink(), "is not an artifact"),
        (lambda path: shutil.rmtree(path), "is not an artifact"),
        (lambda path: edit_manifest(path, lambda m: m.update(schema_version=3)), "schema version 3, expected 4"),
        (lambda path: edit_manifest(path, lambda m: m["levels"][0].update(features=["avx9"])), "this CPU lacks avx9"),
        (lambda path: edit_manifest(path, lambda m: m["levels"][0]["program"].update(outputs=[0, 1])), "other outputs"),
        (lambda path: edit_manifest(path, lambda m: m["levels"][0]["program"]["calls"].pop()), "other parameters"),
        (
            lambda path: edit_manifest(path, lambda m: m["levels"][0]["program"]["calls"][0].update(kernel="x")),
            "lacks the kernel x",
        ),
        (
            lambda path: edit_manifest(path, lambda m: m["levels"][0]["program"]["calls"][0]["arguments"].reverse()),
            "other parameters than its module takes (hidden",
        ),
        (
            lambda path: edit_manifest(path, lambda m: m["levels"][0]["program"]["values"][0].update(shape=[2**40, 2**40])),
            "a value is not described",
        ),
        (lambda path: edit_manifest(path, lambda m: m["limits"].update(vocab_size=99)), "impossible of parameter table"),
    ],
)
def test_c_checks_artifacts_by_itself(program: Build, toy_copy: Path, change: Callable[[Path], object], text: str) -> None:
    change(toy_copy)
    done = run([program("run_artifact"), toy_copy, "", "1"], message(np.array([[1, 2]])))
    assert text in done.stderr.decode()
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("seed", range(3))
def test_mutated_models_are_opened_or_refused(program: Build, toy_artifact: Path, seed: int) -> None:
    done = run([program("fuzz_open"), toy_artifact, str(seed), "1500"])
    assert done.returncode == 0, done.stderr.decode()
    opened, refused, _ = (int(part.split()[0]) for part in done.stdout.decode().split(","))
    assert opened > 20 and refused > 500


def test_engines_and_callers_side_by_side(program: Build, toy_artifact: Path) -> None:
    done = run([program("threads"), toy_artifact])
    assert done.returncode == 0, done.stderr.decode()


def test_sha256_is_that_of_python_with_and_without_extensions(program: Build) -> None:
    data = np.random.default_rng(0).integers(0, 256, 300).astype(np.uint8).tobytes()
    done = run([program("hashes", without="sha256.c"), "sha"], data)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == [*(hashlib.sha256(data[:size]).hexdigest() for size in range(301)), "equal"]


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def hashes(program: Build, texts: list[bytes]) -> list[str]:
    done = run([program("hashes", without="sha256.c"), "json"], b"".join(struct.pack("<Q", len(text)) + text for text in texts))
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


@given(st.lists(documents, min_size=1, max_size=20), st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_checksum_of_json_is_that_of_python(program: Build, values: list[object], ascii_only: bool) -> None:
    """However a text is spaced, and whether its characters are escaped."""
    texts = [json.dumps(value, indent=ascii_only or None, ensure_ascii=ascii_only).encode() for value in values]
    assert hashes(program, texts) == [checksum(value) for value in values]


MALFORMED = (
    b"", b"{", b"[1,", b"[1 2]", b'{"a" 1}', b'{"a":1,}', b"[1,]", b"01", b"1.", b"1e", b"-", b"+1", b".5", b"nul", b"NaN",
    b'"', b'"\\x"', b'"\\u12"', b'"\\ud800\\u"', b'"\n"', b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"',
    b"1 1", b'{"a":1,"a":2}', b'{1:2}', b"[" * 200 + b"]" * 200, b"\x00",
)  # fmt: skip


def test_malformed_json_is_refused(program: Build) -> None:
    found = hashes(program, list(MALFORMED))
    assert len(found) == len(MALFORMED)
    assert all(len(text) != 64 for text in found), found


def test_surrogates_that_stand_alone_hash_as_in_python(program: Build) -> None:
    texts = ['"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '{"\\ud800": 1, "\\uffff": 2, "\\ud83d\\ude00": 3}']
    assert hashes(program, [text.encode() for text in texts]) == [checksum(json.loads(text)) for text in texts]


def test_a_manifest_written_otherwise_is_the_same_to_c(program: Build, toy_copy: Path) -> None:
    path = toy_copy / "manifest.json"
    value = json.loads(path.read_text())
    Manifest.from_json(path.read_text())
    path.write_text(json.dumps(value, sort_keys=True))
    batch = message(np.array([[1, 2]]))
    done = run([program("run_artifact"), toy_copy, "", "1"], batch)
    assert (done.returncode, done.stderr) == (0, b"")
