import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import tilewright
from tests import toy
from tilewright.codegen import artifact
from tilewright.codegen import replace as replacing
from tilewright.codegen.artifact import check_output
from tilewright.cpu import cpu_features
from tilewright.errors import ArtifactTargetMismatch, InvalidArtifact, InvalidInput
from tilewright.manifest import LevelRecord, Manifest, Parameter, checksum
from tilewright.weights import ALIGNMENT, map_weights, write_weights

DTYPES = ("u1", "i1", "u2", "i2", "i4", "i8", "f4")


def edit_manifest(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = artifact / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    sign(value)
    path.write_text(json.dumps(value))


def sign(value: dict[str, Any]) -> None:
    """Give an edited manifest the checksum of its fields, as someone who means to deceive would."""
    value.pop("checksum", None)
    value["checksum"] = checksum(value)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3).map(tuple)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_weights_round_trip_aligned_and_readable_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "weights.safetensors"
    rng = np.random.default_rng(0)
    weights = {f"w{i}": np.asarray(rng.integers(0, 100, shape)).astype(dtype) for i, (dtype, shape) in enumerate(specs)}
    write_weights(path, weights)
    foreign, mapped = load_file(path), map_weights(path)
    assert list(mapped) == list(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(foreign[name], array)
        np.testing.assert_array_equal(mapped[name], array)
        assert mapped[name].dtype == array.dtype
        assert mapped[name].ctypes.data % ALIGNMENT == 0
        assert array.size == 0 or not mapped[name].flags.owndata


def test_weights_of_a_foreign_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float64"):
        write_weights(tmp_path / "w", {"w": np.zeros(3)})


def test_manifest_round_trips_and_hashes_every_other_file(toy_artifact: Path) -> None:
    text = (toy_artifact / "manifest.json").read_text()
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert list(manifest.levels[0].parameters) == ["shift", "table"]
    assert {*manifest.files, "manifest.json"} == {file.name for file in toy_artifact.iterdir()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema version 99"),
        (lambda m: m.update(schema_version=1), "schema version 1, expected 4; compile the model again"),
        (lambda m: m.pop("limits"), "'limits' is missing"),
        (lambda m: m.update(colour="red"), "unknown field 'colour'"),
        (
            lambda m: m["levels"][0]["layers"][0].update(density="x"),
            r"'levels\[0\].layers\[0\].density' must be float, found \"x\"",
        ),
        (lambda m: m["levels"][0]["layers"][0].update(block=[4]), r"'levels\[0\].layers\[0\].block' must be a list of 2"),
        (lambda m: m["outputs"][0].update(per="word"), r"'outputs\[0\].per' must be one of token, sequence"),
        (lambda m: m["limits"].update(max_tokens=True), "'limits.max_tokens' must be int"),
        (lambda m: m["limits"].update(max_tokens=40), "multiple of 16"),
        (lambda m: m["levels"][0].update(run_tokens=0), "`run_tokens` must be 1 to"),
        (lambda m: m["levels"][0].update(run_tokens=1 << 40), "`run_tokens` must be 1 to"),
        (lambda m: m["limits"].update(vocab_size=0), "positive"),
        (lambda m: m["outputs"][0].update(squeeze=True), "squeeze"),
        (lambda m: m.update(outputs=[]), "distinct and not empty"),
        (lambda m: m["files"].update({"../x": ""}), "plain names"),
        (lambda m: m["files"].pop("model.portable.so"), "must list model.portable.so"),
        (lambda m: m["files"].pop("weights.safetensors"), "must list weights.safetensors"),
        (lambda m: m.update(levels=[]), "`levels` must be distinct and not empty"),
        (lambda m: m["levels"].append(m["levels"][0]), "`levels` must be distinct"),
        (lambda m: m["levels"][0].pop("features"), r"'levels\[0\].features' is missing"),
        (lambda m: m["levels"][0].update(library="model.avx9.so"), "must list model.avx9.so"),
        (lambda m: m["levels"][0].update(parameters=["shift"]), r"'levels\[0\].parameters' must be an object"),
        (lambda m: m.update(inputs=["attention_mask"]), "must list input_ids"),
        (lambda m: m["head"].update(kind="poem"), r"'head.kind' must be one of embedding"),
        (lambda m: m["head"].update(kind="token_classification"), "a token_classification head has the outputs logits"),
        (lambda m: m["head"].update(problem_type="regression"), "`head.problem_type` must be given for sequence"),
        (lambda m: m["head"].update(pooling="mean"), "`head.pooling` must be given for an embedding"),
        (
            lambda m: m["levels"][0]["parameters"].update(table=vars(Parameter("absent", "float32", (100, 8)))),
            "lacks the tensor absent",
        ),
    ],
)
def test_bad_manifest_is_refused_by_field(toy_copy: Path, change: Callable[[Any], object], message: str) -> None:
    edit_manifest(toy_copy, change)
    with pytest.raises(InvalidArtifact, match=message) as caught:
        tilewright.load(toy_copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [(), ("shift",), ("table", "shift"), ("shift", "table", "shift")])
def test_parameters_that_the_module_does_not_take_are_refused(toy_copy: Path, names: tuple[str, ...]) -> None:
    own = toy.parameters()
    listed = {f"{i}{name}": vars(own[name]) for i, name in enumerate(names)}
    edit_manifest(toy_copy, lambda m: m["levels"][0].update(parameters=listed))
    with pytest.raises(InvalidArtifact, match="other parameters than its module takes"):
        tilewright.load(toy_copy)([[1]])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["outputs"].pop(),
        lambda m: m["outputs"].append({"name": "more", "per": "token", "width": 1, "squeeze": False}),
        lambda m: m["outputs"][0].update(width=9),
        lambda m: m["outputs"][2].update(per="token"),
    ],
)
def test_outputs_that_the_module_does_not_give_are_refused(toy_copy: Path, change: Callable[[Any], object]) -> None:
    edit_manifest(toy_copy, change)
    with pytest.raises(InvalidArtifact, match="other outputs than its module gives"):
        tilewright.load(toy_copy)([[1]])


@pytest.mark.parametrize("text", ["", '{"schema_version": 4, "isa"', "[]", "null", "\udcff"])
def test_truncated_manifest_is_refused(toy_copy: Path, text: str) -> None:
    (toy_copy / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidArtifact, match=r"manifest\.json"):
        tilewright.load(toy_copy)


@pytest.mark.parametrize("name", ["model.portable.so", "weights.safetensors", "tokenizer.json"])
def test_tampered_and_missing_files_are_refused(toy_copy: Path, name: str) -> None:
    data = bytearray((toy_copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (toy_copy / name).write_bytes(data)
    with pytest.raises(InvalidArtifact, match=f"{name} was altered"):
        tilewright.load(toy_copy)
    (toy_copy / name).unlink()
    with pytest.raises(InvalidArtifact, match=f"{name} cannot be read"):
        tilewright.load(toy_copy)


def test_missing_cpu_feature_is_named_before_any_code_is_loaded(tmp_path: Path, toy_library: Path) -> None:
    level = LevelRecord("avx9", ("sse2", "avx9-int2"), "model.avx9.so", {})
    foreign = tmp_path / "not-a-library.so"
    foreign.write_bytes(b"not an ELF file")
    path = toy.write(tmp_path / "x.tw", foreign, Manifest((level,), toy.MANIFEST.inputs, toy.MANIFEST.outputs, toy.LIMITS))
    with pytest.raises(ArtifactTargetMismatch, match="holds avx9; this CPU lacks avx9-int2, which avx9 needs; compile it here"):
        tilewright.load(path)


def test_library_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "not-a-library.so"
    foreign.write_bytes(b"not an ELF file")
    with pytest.raises(InvalidArtifact, match="cannot be loaded"):
        tilewright.load(toy.write(tmp_path / "x.tw", foreign))


def test_path_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InvalidArtifact, match="is not an artifact"):
            tilewright.load(path)


def test_cpu_features_have_llvm_names(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor: 0\nflags\t\t: sse4_2 avx2 bmi1 abm avx_vnni avx512_vnni avx512vl amx_int8 lahf_lm\n")
    assert cpu_features(cpuinfo) == {
        "sse4.2", "avx2", "bmi", "lzcnt", "avxvnni", "avx512vnni", "avx512vl", "amx-int8", "sahf"
    }  # fmt: skip
    assert cpu_features(tmp_path / "absent") == frozenset()
    assert "sse2" in cpu_features()


def test_artifact_replaces_an_artifact_only(tmp_path: Path, toy_library: Path) -> None:
    target = toy.write(tmp_path / "x.tw", toy_library)
    (target / "stale").touch()
    toy.write(target, toy_library)
    assert not (target / "stale").exists()
    with pytest.raises(InvalidInput, match="it exists; allow overwriting"):
        check_output(target, overwrite=False)
    other = tmp_path / "documents"
    other.mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(target)
    for path in (other, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(InvalidInput, match="is not an artifact"):
            toy.write(path, toy_library)
    assert sorted(os.listdir(tmp_path)) == ["documents", "file", "link", "x.tw"]


def test_unwritable_output_is_refused(tmp_path: Path, toy_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="is not a directory; create it"):
        toy.write(tmp_path / "absent" / "x.tw", toy_library)
    with pytest.raises(InvalidInput, match="cannot write"):
        toy.write(Path("/proc/x.tw"), toy_library)
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # tests may run as root, who may write anywhere
    with pytest.raises(InvalidInput, match="is not writable"):
        toy.write(tmp_path / "x.tw", toy_library)


@pytest.mark.parametrize("step", ["write_weights", "sha256", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_write_leaves_what_was_there(
    tmp_path: Path,
    toy_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException] | BaseException,
    existing: bool,
) -> None:
    target = tmp_path / "x.tw"
    if existing:
        toy.write(target, toy_library)
    before = {file.name: file.read_bytes() for file in target.iterdir()} if existing else None

    def fail(*arguments: object) -> None:
        raise error

    if step == "replace":
        monkeypatch.setattr(replacing, "put", fail)
    else:
        monkeypatch.setattr(artifact, step, fail)
    with pytest.raises((KeyboardInterrupt, InvalidInput)):
        toy.write(target, toy_library)
    assert os.listdir(tmp_path) == (["x.tw"] if existing else [])
    assert before == ({file.name: file.read_bytes() for file in target.iterdir()} if existing else None)
