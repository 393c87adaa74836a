"""Artifacts that were altered by someone who signed them again, that are replaced while they are read, and writers that die."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tilewright
from tests import tiny, toy
from tests.test_artifact import edit_manifest
from tests.test_end_to_end import SPARSITY, prune
from tilewright.commands.artifact import report
from tilewright.errors import InvalidArtifact, InvalidInput
from tilewright.frontend import load
from tilewright.manifest import Manifest
from tilewright.pipeline import quantize
from tilewright.scratch import scratch
from tilewright.weights import map_weights, write_weights

Weights = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose linears are stored in several sparse blocks, and so with index arrays."""
    root = tmp_path_factory.mktemp("sparse")
    source = prune(load(tiny.save(tiny.build("BertModel"), root / "float")), SPARSITY["mixed"])
    quantize(source, tiny.texts(20), root / "int8")
    return tilewright.compile(root / "int8", "avx2,avx512vnni", root / "model.tw").path


@pytest.fixture
def copy(sparse: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sparse, tmp_path / "model.tw"))


def edit_weights(artifact: Path, change: Callable[[Weights], object]) -> None:
    """Change tensors, and sign the artifact again."""
    file = artifact / "weights.safetensors"
    weights = {name: array.copy() for name, array in map_weights(file).items()}
    change(weights)
    write_weights(file, weights)
    edit_manifest(artifact, lambda m: m["files"].update({file.name: hashlib.sha256(file.read_bytes()).hexdigest()}))


def refused(artifact: Path, *parts: str) -> None:
    for isa in ("avx2", None):
        try:
            engine = tilewright.load(artifact, 1, isa)
            engine(np.ones((2, 7), np.int64))
        except InvalidArtifact as error:
            assert "\n" not in str(error)
            assert all(part in str(error) for part in parts), error
            return
    pytest.fail("the altered artifact ran")


def test_every_index_array_is_described_and_its_bounds_are_those_of_the_compiler(sparse: Path) -> None:
    manifest, weights = Manifest.from_json((sparse / "manifest.json").read_text()), map_weights(sparse / "weights.safetensors")
    roles: dict[str, set[str]] = {}
    for level in manifest.levels:
        for name, parameter in level.parameters.items():
            roles.setdefault(parameter.role, set()).add(name.rpartition(".")[2])
            array = weights[parameter.tensor]
            assert (parameter.dtype, parameter.shape) == (str(array.dtype), array.shape)
            if parameter.role == "addresses":
                assert (parameter.lowest, parameter.highest) == (array.min(), array.max())
    assert roles["addresses"] == {"index", "indptr", "parts"}
    assert (roles["vocab_size"], roles["max_positions"], roles["token_types"]) == ({"word"}, {"position"}, {"token_type"})
    assert not {"index", "indptr", "parts"} & roles["values"]


WRONG: dict[str, Callable[[NDArray[Any]], None]] = {
    "too large": lambda array: array.__setitem__(-1, np.iinfo(array.dtype).max),
    "random": lambda array: array.__setitem__(
        slice(None), np.random.default_rng(0).integers(0, np.iinfo(array.dtype).max, array.shape)
    ),
    "negative": lambda array: array.__setitem__(0, -1 if array.dtype.kind == "i" else np.iinfo(array.dtype).max),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["index", "indptr", "parts"])
def test_addresses_out_of_bounds_are_refused(copy: Path, kind: str, wrong: str) -> None:
    def change(weights: Weights) -> None:
        for name, array in weights.items():
            if name.partition("@")[0].endswith(f".{kind}"):
                WRONG[wrong](array.reshape(-1))

    edit_weights(copy, change)
    refused(copy, kind, "holds addresses")


@pytest.mark.parametrize("kind", ["indptr", "parts"])
def test_addresses_that_fall_are_refused(copy: Path, kind: str) -> None:
    """Within their bounds, but a row would end before it begins."""

    def change(weights: Weights) -> None:
        for name, array in weights.items():
            if name.partition("@")[0].endswith(f".{kind}"):
                array[:] = array[::-1].copy()

    edit_weights(copy, change)
    refused(copy, kind, "must not fall")


def limits(**values: int) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["limits"].update(values)


def parameter(suffix: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(m: dict[str, Any]) -> None:
        for level in m["levels"]:
            for name, values in level["parameters"].items():
                if name.endswith(suffix):
                    values.update(fields)

    return change


def program(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """Changes the program of every level."""
    return lambda m: [change(level["program"]) for level in m["levels"]]


def unwritten(program: dict[str, Any]) -> int:
    """A new value like the first output, with a storage of its own, that no kernel takes."""
    values = program["values"]
    values.append({**values[program["outputs"][0]], "storage": len(values)})
    return len(values) - 1


MANIFESTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (limits(vocab_size=60), "`limits.vocab_size` is 60"),
    (limits(max_positions=64), "`limits.max_positions` is 64"),
    (limits(token_types=3), "`limits.token_types` is 3"),
    (limits(max_tokens=2**40), "`max_tokens` must be at most"),
    (limits(vocab_size=2**40), "below 2**31"),
    (limits(max_tokens=2**20), "takes"),
    (parameter(".position", shape=[64, 32]), "`limits.max_positions` is 32"),
    (parameter(".word", dtype="int8"), "is float32[50, 32], but embeddings.word"),
    (parameter(".gamma", shape=[33]), "is float32[32], but"),
    (parameter(".gamma", shape=[-1]), "has the shape [-1]"),
    (parameter(".gamma", tensor="embeddings.norm.quant"), "is float32[2], but"),
    (parameter(".gamma", role="addresses"), "holds addresses, which must be"),
    (parameter(".gamma", role="poetry"), "must be one of values, addresses"),
    (program(lambda p: [value.update(storage=0) for value in p["values"]]), "share a storage"),
    (program(lambda p: p["outputs"].__setitem__(0, unwritten(p))), "an output is written by no kernel"),
    (lambda m: m["provenance"].update(steps=5), "`provenance.steps` must be a list"),
    (lambda m: m["provenance"]["steps"].append(5), "`provenance.steps` must be a list"),
    (lambda m: m["provenance"]["steps"][-1].update(notes=7), "must be lists of texts"),
    (lambda m: m["files"].update({"a\0b": ""}), "plain names"),
    (lambda m: m["files"].update({"manifest.json": ""}), "plain names"),
    (lambda m: m["files"].update({"\ud800": ""}), "cannot be read"),
    (lambda m: m["levels"][0].update(library="weights.safetensors"), "cannot be loaded"),
]


@pytest.mark.parametrize(("change", "message"), MANIFESTS)
def test_a_manifest_that_was_altered_and_signed_again_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(copy, change)
    if message != "takes":
        refused(copy, message)
        return
    # more tokens than memory was planned for: whatever is made of them is right, or refused
    engine = tilewright.load(copy, 1)
    ids = np.random.default_rng(0).integers(0, 50, (400, 32))
    try:
        outputs = engine(ids)
    except InvalidArtifact:
        return
    np.testing.assert_array_equal(outputs["sentence_embedding"][399], engine(ids[399:])["sentence_embedding"][0])


def test_a_manifest_that_was_edited_is_refused_by_its_checksum(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    for before, after in (('"vocab_size": 50', '"vocab_size": 51'), ('"checksum": "', '"checksum": "0')):
        assert before in text
        (copy / "manifest.json").write_text(text.replace(before, after))
        refused(copy, "manifest.json was altered")
    (copy / "manifest.json").write_text(json.dumps(json.loads(text), sort_keys=True))  # the same, written otherwise
    tilewright.load(copy, 1)


def test_a_parameter_of_another_dtype_is_refused_by_the_module(copy: Path) -> None:
    """Table and manifest agree with each other, but not with the code."""
    edit_weights(copy, lambda w: w.update({"embeddings.norm.gamma": w["embeddings.norm.gamma"].view(np.int32)}))
    edit_manifest(copy, parameter("embeddings.norm.gamma", dtype="int32"))
    refused(copy, "other parameters than its module takes")


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "model.avx2.so", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_regular_file_is_refused_at_once(copy: Path, name: str, kind: str) -> None:
    (copy / name).unlink()
    {"fifo": os.mkfifo, "directory": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind](copy / name)
    refused(copy, name)
    with pytest.raises(InvalidArtifact):
        report(copy)


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from tests import toy
from tilewright.codegen.artifact import write_artifact
path, library, add, count = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
for _ in range(count):
    write_artifact(path, libraries={"portable": library}, weights={"shift": toy.SHIFT, "table": toy.TABLE + np.float32(add)},
                   manifest=toy.MANIFEST, tokenizer=toy.TOKENIZER)
"""


def writer(path: Path, library: Path, add: int, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(library), str(add), str(count)])


def test_two_writers_and_a_reader_never_see_less_than_an_artifact(toy_copy: Path, toy_library: Path) -> None:
    writers = [writer(toy_copy, toy_library, add, 40) for add in (0, 1000)]
    seen: set[float] = set()
    loads = 0
    while any(process.poll() is None for process in writers) or not loads:
        engine = tilewright.load(toy_copy, 1)
        score = float(engine([[1]])["score"][0, 0])
        assert report(toy_copy)["outputs"][0]["name"] == "hidden"
        seen.add(score)
        loads += 1
    assert [process.wait() for process in writers] == [0, 0]
    assert seen <= {8.0, 1008.0}
    assert os.listdir(toy_copy.parent) == ["toy.tw"]


def test_an_artifact_compiled_anew_runs_its_new_code(toy_copy: Path, toy_library: Path, tmp_path: Path) -> None:
    """The dynamic linker takes a path it has loaded for the same library, whatever lies there since."""
    first = tilewright.load(toy_copy, 1)
    other = toy.build_library(tmp_path / "other.so", positions=1000)
    for library, expected in ((other, 1008.0), (toy_library, 9.0), (other, 1008.0)):
        toy.write(toy_copy, library)
        assert tilewright.load(toy_copy, 1)([[0, 1]])["score"][0, 1] == expected
    assert first([[0, 1]])["score"][0, 1] == 9.0


def test_a_killed_writer_leaves_nothing_that_the_next_does_not_remove(toy_copy: Path, toy_library: Path) -> None:
    code = WRITER.replace(
        "from tilewright.codegen.artifact import",
        "from tilewright.codegen import artifact\nfrom tilewright.codegen.artifact import",
    )
    code = code.replace(
        "for _ in", "import os, signal\nartifact.write_weights = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\nfor _ in"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(toy_copy), str(toy_library), "0", "1"], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [name for name in os.listdir(toy_copy.parent) if name != "toy.tw"]
    assert len(left) == 1
    assert left[0].startswith(".toy.tw.writing-")
    tilewright.load(toy_copy, 1)
    toy.write(toy_copy, toy_library)
    assert os.listdir(toy_copy.parent) == ["toy.tw"]


def test_working_directories_of_the_living_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "work-file").touch()
    with scratch(tmp_path, "work-") as first:
        with scratch(tmp_path, "work-") as second:
            assert first.is_dir()
            assert second.is_dir()
        assert not second.exists()
    assert os.listdir(tmp_path) == ["work-file"]
    (tmp_path / "work-abandoned" / "deep").mkdir(parents=True)
    with scratch(tmp_path, "work-"):
        assert not (tmp_path / "work-abandoned").exists()


COMPILE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
import tilewright.errors
try:
    tilewright.compile(sys.argv[1], "avx2", sys.argv[2])
except tilewright.errors.TilewrightError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [4096, 100_000])
def test_a_file_size_limit_is_an_error_that_leaves_nothing(sparse: Path, tmp_path: Path, limit: int) -> None:
    (tmp_path / "tmp").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(sparse.parent / "int8"), str(tmp_path / "x.tw"), str(limit)],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1
    assert "File too large" in run.stdout
    assert os.listdir(tmp_path) == ["tmp"]
    assert os.listdir(tmp_path / "tmp") == []


def test_a_full_temporary_directory_is_an_error(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(InvalidInput, match=r"cannot work in the temporary directory .*set TMPDIR"):
        tilewright.compile(sparse.parent / "int8", "avx2", tmp_path / "x.tw")
    assert os.listdir(tmp_path) == []


def test_a_killed_compile_leaves_nothing_that_the_next_does_not_remove(sparse: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-m", "tilewright", "compile", str(sparse.parent / "int8"), "--target", "avx2"]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "x.tw")], env=environment, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "tmp").glob("tilewright-compile-*/*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.1)
    subprocess.run([*command, "-o", str(tmp_path / "x.tw")], env=environment, check=True, capture_output=True)
    deadline = time.monotonic() + 60
    while os.listdir(tmp_path / "tmp") and time.monotonic() < deadline:  # what the killed run's linker was about to write
        with scratch(tmp_path / "tmp", "tilewright-compile-"):
            time.sleep(0.2)
    assert os.listdir(tmp_path / "tmp") == []
    assert sorted(os.listdir(tmp_path)) == ["tmp", "x.tw"]


def test_the_same_input_gives_the_same_bytes(sparse: Path, tmp_path: Path) -> None:
    """In processes with other hash seeds, other addresses and other paths."""
    made = []
    for seed in ("1", "2"):
        output = tmp_path / seed / ("x" * int(seed)) / "model.tw"
        output.parent.mkdir(parents=True)
        code = (
            f"junk = [bytearray(7919 * i) for i in range({int(seed) * 200})]\n"
            f"import tilewright; tilewright.compile({str(sparse.parent / 'int8')!r}, 'portable,avx2', {str(output)!r})"
        )
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TMPDIR": str(output.parent)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        made.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in output.iterdir()})
    assert made[0] == made[1]
