"""Several ISA levels in one artifact: what is stored, which one runs, and how a wrong wish is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm.target import Target
from tvm.target import codegen as llvm

import tilewright
from tests import tiny, toy
from tests.emulated_cpu import EmulationError
from tests.emulator import Encoder, emulate
from tests.kernel_harness import HOST, runs_here
from tests.test_cli import ok, ok_json, refused
from tests.test_emulated_encoder import INPUTS, sparsify
from tilewright.codegen.lower import lower
from tilewright.codegen.model import EncoderModel
from tilewright.cpu import ISA_VARIABLE, choose_level
from tilewright.errors import ArtifactTargetMismatch, InvalidArtifact, InvalidInput
from tilewright.frontend import load
from tilewright.manifest import LevelRecord
from tilewright.pipeline import quantize
from tilewright.schedules.choice import plan
from tilewright.schedules.isa import ISAS, TARGET_SETS, resolve_all
from tilewright.weights import WeightPool, map_weights

LEVELS = ("avx2", "avxvnni", "avx512vnni", "amx")
RUNNING = [name for name in LEVELS if runs_here(name)]
NOTHING: frozenset[str] = frozenset()
EMULATED = {
    "haswell": ("haswell", "avx2"),
    "skylake_x": ("skylake-avx512", "avx2"),
    "icelake_u": ("icelake-client", "avx512vnni"),
    "sapphire_rapids": ("sapphirerapids", "amx"),
}
"""Emulated CPU to its name in LLVM and the best of LEVELS that it has."""

emulation = pytest.mark.skipif(find_spec("bochscpu") is None, reason="bochscpu-python is not installed")


# names


@pytest.mark.parametrize(
    ("names", "levels"),
    [
        ("avx2", ["avx2"]),
        ("avx512vnni,avx2", ["avx2", "avx512vnni"]),
        ("c6i, c6a", ["avx2", "avx512vnni"]),
        ("haswell,c5a,Xeon Platinum 8375C", ["avx2", "avx512vnni"]),
        ("server", list(TARGET_SETS["server"])),
        ("avx2,server,portable", ["portable", *TARGET_SETS["server"]]),
        ("native,avx2", ["portable", "avx2"]),
    ],
)
def test_names_give_distinct_levels_the_least_first(names: str, levels: list[str]) -> None:
    assert [isa.name for isa in resolve_all(names, NOTHING)] == levels


@pytest.mark.parametrize(("names", "unknown"), [("avx2,z80", "z80"), ("avx2,", ""), ("", ""), ("servers", "servers")])
def test_an_unknown_name_of_a_list_is_refused(names: str, unknown: str) -> None:
    with pytest.raises(InvalidInput, match=f"unknown target {unknown!r}; choose"):
        resolve_all(names, HOST)


# weights

arrays = st.builds(
    lambda dtype, shape, value: np.full(shape, value, dtype),
    st.sampled_from(["i1", "u1", "f4"]),
    st.sampled_from([(4,), (2, 2), (16,), (0,), ()]),
    st.integers(0, 1),
)
packings = st.lists(st.dictionaries(st.sampled_from("abc"), arrays, max_size=3), min_size=1, max_size=4)


@given(packings)
def test_the_pool_gives_back_every_weight_and_stores_none_twice(levels: list[dict[str, np.ndarray]]) -> None:
    pool = WeightPool()
    parameters = [pool.add(f"level{i}", weights) for i, weights in enumerate(levels)]
    for weights, names in zip(levels, parameters, strict=True):
        assert list(names) == list(weights)  # the order of the call
        for name, array in weights.items():
            held = pool.tensors[names[name]]
            assert held.dtype == array.dtype
            np.testing.assert_array_equal(held, array, strict=True)
    contents = {(a.dtype.str, a.shape, a.tobytes()) for weights in levels for a in weights.values()}
    assert len(pool.tensors) == len(contents)
    assert all(name.split("@")[0] in "abc" for name in pool.tensors)
    assert set(parameters[0].values()) <= levels[0].keys()  # an artifact of one level has plain names


# choice

FEATURES = ("f1", "f2", "f3")
features = st.lists(st.sampled_from(FEATURES), unique=True).map(tuple)
records = st.lists(features, min_size=1, max_size=4).map(
    lambda needs: [LevelRecord(f"level{i}", need, f"model.level{i}.so", {}) for i, need in enumerate(needs)]
)


@given(records, st.frozensets(st.sampled_from(FEATURES)), st.none() | st.integers(0, 4).map("level{}".format))
def test_a_chosen_level_always_runs(levels: list[LevelRecord], available: frozenset[str], isa: str | None) -> None:
    able = [level.name for level in levels if available.issuperset(level.features)]
    named = {level.name: level for level in levels}
    try:
        assert choose_level(levels, available, isa).name == (isa or able[-1])
        assert isa is None or isa in able
    except InvalidInput as error:
        assert isa not in named
        assert f"asks for {isa}; the artifact holds {', '.join(named)};" in str(error)
    except ArtifactTargetMismatch as error:
        level = named[isa] if isa else levels[0]
        assert level.name not in able
        lacks = [feature for feature in level.features if feature not in available]
        assert f"this CPU lacks {', '.join(lacks)}, which {level.name} needs" in str(error)
        assert ("--target native" in str(error)) == (not able)


@pytest.fixture
def two_levels(tmp_path: Path, toy_library: Path) -> Path:
    """The toy's artifact with a level beyond every CPU, whose library is none."""
    (small,) = toy.MANIFEST.levels
    levels = (
        dataclasses.replace(small, name="small", library="model.small.so"),
        dataclasses.replace(small, name="big", library="model.big.so", features=("sse2", "avx9", "amx-9")),
    )
    return toy.write(tmp_path / "two.tw", toy_library, dataclasses.replace(toy.MANIFEST, levels=levels))


def test_argument_and_environment_name_a_level(two_levels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert tilewright.load(two_levels).level.name == "small"
    assert tilewright.load(two_levels, isa="small").level.name == "small"
    for value, isa in (("small", None), ("", None), ("big", "small"), ("avx2", "small")):  # the argument wins
        monkeypatch.setenv(ISA_VARIABLE, value)
        loaded = tilewright.load(two_levels, 1, isa)
        np.testing.assert_array_equal(loaded([[1, 2]])["hidden"][0], toy.expected([1, 2])["hidden"])


@pytest.mark.parametrize("by_argument", [True, False])
@pytest.mark.parametrize(
    ("isa", "error", "message"),
    [
        ("big", ArtifactTargetMismatch, "asks for big; this CPU lacks avx9, amx-9, which big needs; choose small$"),
        ("avx2", InvalidInput, "asks for avx2; the artifact holds small, big; choose small$"),
        ("SMALL", InvalidInput, "asks for SMALL; the artifact holds small, big; choose small$"),
    ],
)
def test_a_level_that_cannot_run_is_refused(
    two_levels: Path, monkeypatch: pytest.MonkeyPatch, isa: str, error: type[Exception], message: str, by_argument: bool
) -> None:
    if not by_argument:
        monkeypatch.setenv(ISA_VARIABLE, isa)
    with pytest.raises(error, match=message):
        tilewright.load(two_levels, isa=isa if by_argument else None)
    code = 4 if error is ArtifactTargetMismatch else 2
    flags = ("--isa", isa) if by_argument else ()
    assert re.search(message, refused(code, "run", two_levels, "--text", "a", *flags).strip())
    assert re.search(message, refused(code, "benchmark", two_levels, *flags).strip())


def test_every_file_is_checked_whichever_level_runs(two_levels: Path) -> None:
    (two_levels / "model.big.so").write_bytes(b"other")
    with pytest.raises(InvalidArtifact, match=r"model\.big\.so was altered"):
        tilewright.load(two_levels, isa="small")
    (two_levels / "model.big.so").unlink()
    with pytest.raises(InvalidArtifact, match=r"model\.big\.so cannot be read"):
        tilewright.load(two_levels, isa="small")


# a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EncoderModel:
    """A tagger with dense linears and two kinds of sparse ones."""
    directory = tmp_path_factory.mktemp("model")
    source = tiny.build("DistilBertForTokenClassification", dim=64, hidden_dim=128)
    sparsify(source)
    return load(quantize(load(tiny.save(source, directory / "float")), tiny.texts(40), directory / "quantized"))


@pytest.fixture(scope="module")
def packed(model: EncoderModel) -> Mapping[str, Mapping[str, np.ndarray]]:
    """The parameters of each level by themselves."""
    return {name: lower(model, plan(model, ISAS[name], sparse="always")).parameters for name in ISAS}


@pytest.fixture(scope="module")
def artifact(model: EncoderModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tilewright.compile(model, ",".join(LEVELS), tmp_path_factory.mktemp("levels") / "model.tw", sparse="always").path


def test_each_level_has_its_weights_and_equal_ones_are_stored_once(
    artifact: Path, packed: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    levels = json.loads((artifact / "manifest.json").read_text())["levels"]
    stored = map_weights(artifact / "weights.safetensors")
    assert [level["name"] for level in levels] == list(LEVELS)
    for level in levels:
        assert list(level["parameters"]) == list(packed[level["name"]])
        for name, array in packed[level["name"]].items():
            np.testing.assert_array_equal(stored[level["parameters"][name]["tensor"]], array, strict=True)
    contents = {(a.dtype.str, a.shape, a.tobytes()) for name in LEVELS for a in packed[name].values()}
    assert len(stored) == len(contents)
    floats = [name for name, array in packed["avx2"].items() if array.dtype == np.float32]
    assert all(len({level["parameters"][name]["tensor"] for level in levels}) == 1 for name in floats)
    row = [level["parameters"]["layer0.output.weight"]["tensor"] for level in levels]
    assert row == ["layer0.output.weight", *["layer0.output.weight@avxvnni"] * 2, "layer0.output.weight@amx"]


def test_levels_of_one_packing_need_no_further_weights(model: EncoderModel, tmp_path: Path) -> None:
    """avx512 stores the bytes of avx2, but counts their columns otherwise, because its rows are longer."""
    both = tilewright.compile(model, "avx2,avx512", tmp_path / "both.tw", sparse="always").path
    alone = tilewright.compile(model, "avx2", tmp_path / "alone.tw", sparse="always").path
    further = map_weights(both / "weights.safetensors").keys() - map_weights(alone / "weights.safetensors").keys()
    assert all(name.endswith(".index@avx512") for name in further), further
    assert (both / "model.avx2.so").stat().st_size == (alone / "model.avx2.so").stat().st_size
    if runs_here("avx2"):
        found, expected = (tilewright.load(path, num_threads=1, isa="avx2")(**INPUTS) for path in (both, alone))
        np.testing.assert_array_equal(found["logits"], expected["logits"])


@pytest.mark.skipif(not RUNNING, reason="this CPU runs none of the levels")
def test_levels_give_the_same_results(artifact: Path) -> None:
    results = {isa: tilewright.load(artifact, num_threads=1, isa=isa)(**INPUTS)["logits"] for isa in RUNNING}
    for logits in results.values():
        np.testing.assert_allclose(logits, results[RUNNING[0]], rtol=1e-5, atol=1e-5)
    assert tilewright.load(artifact, num_threads=1).level.name == RUNNING[-1]


@pytest.mark.skipif(not RUNNING, reason="this CPU runs none of the levels")
def test_only_the_chosen_library_is_mapped(artifact: Path) -> None:
    code = """
import sys, tilewright
engine = tilewright.load(sys.argv[1], num_threads=1, isa=sys.argv[2])
engine([[1]])
print(open("/proc/self/maps").read())
"""
    maps = subprocess.run([sys.executable, "-c", code, artifact, RUNNING[0]], capture_output=True, text=True, check=True)
    assert set(re.findall(r"model\.\w+\.so", maps.stdout)) == {f"model.{RUNNING[0]}.so"}


def test_command_line_reports_levels(
    model: EncoderModel, artifact: Path, packed: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    report = ok_json("inspect", artifact)
    tensors = {name: {(a.dtype.str, a.shape, a.tobytes()) for a in packed[name].values()} for name in LEVELS}
    for level in report["levels"]:
        name = level["name"]
        others = set().union(*(tensors[other] for other in LEVELS if other != name))
        assert level["bytes"] == {
            "library": (artifact / f"model.{name}.so").stat().st_size,
            "weights": sum(len(content) for *_, content in tensors[name]),
            "shared": sum(len(content) for *_, content in tensors[name] & others),
        }
        assert (not level["missing"]) == runs_here(name)
        columns = name in ("avx2", "avx512")  # which multiply bytes only as columns
        blocks = {tuple(kernel["block"] or ()) for kernel in level["kernels"]}
        assert blocks == ({(4, 1)} if columns else {(), (4, 1), (16, 4)})
    assert [level["name"] for level in report["levels"]] == list(LEVELS)
    text = ok("inspect", artifact)
    assert all(name in text for name in LEVELS)
    assert "compiled already" in refused(2, "inspect", artifact, "--target", "avx2")


def test_command_line_runs_a_level(artifact: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **INPUTS)
    for isa in RUNNING:
        assert ok_json("run", artifact, "--input", tmp_path / "in.npz", "--isa", isa)["isa"] == isa
    if RUNNING:
        result = ok_json("benchmark", artifact, "--isa", RUNNING[0], "--seq-len", "8", "--duration", "0")
        assert result["isa"] == RUNNING[0]


@emulation
@pytest.mark.skipif(not runs_here("avx2"), reason="this CPU has no avx2, the level compared with")
@pytest.mark.parametrize("cpu", EMULATED)
def test_an_older_cpu_gets_a_level_it_can_run(artifact: Path, cpu: str) -> None:
    name, best = EMULATED[cpu]
    held = llvm.llvm_get_cpu_features(Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": name}))
    trace = emulate(cpu, Encoder(artifact, INPUTS, frozenset(map(str, held))))
    assert trace.isa == best
    expected = tilewright.load(artifact, num_threads=1, isa="avx2")(**INPUTS)["logits"]
    np.testing.assert_allclose(trace.outputs["logits"], expected, rtol=1e-5, atol=1e-5)


@emulation
def test_the_emulated_cpu_would_have_stopped_a_wrong_choice(artifact: Path) -> None:
    with pytest.raises(EmulationError, match="#UD"):
        emulate("haswell", Encoder(artifact, INPUTS))  # told that the CPU has everything
