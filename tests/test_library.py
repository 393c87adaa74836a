"""Libraries for C programs: the examples built against them, beside the engine; what they export; and what is refused."""

import ctypes
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import tilewright
from tests import tiny
from tests.native import SANITIZERS, compile_c
from tests.native import runtime_sources as native_sources
from tests.test_cli import ok_json, refused
from tests.wordpiece import UNCASED
from tilewright.codegen.header import api, header
from tilewright.codegen.library import Library, runtime_sources
from tilewright.compiler import compile
from tilewright.errors import InvalidInput, TilewrightError
from tilewright.pipeline import quantize

ROOT = Path(__file__).parent.parent
C, CPP = ROOT / "examples/c/embed.c", ROOT / "examples/cpp/similarity.cpp"
TEXTS = ["a bad cab", "Dab, a [MASK] é!", "", "fade " * 40]
ZIG = (sys.executable, "-m", "ziglang", "cc")
MUSL, GLIBC_2_17 = (*ZIG, "--target=x86_64-linux-musl"), (*ZIG, "--target=x86_64-linux-gnu.2.17")
RUNTIME_HEADER = (ROOT / "runtime/tilewright.h").read_text("utf-8")


@dataclass
class Models:
    """Two tiny embedding models, their artifacts, and libraries of them, each made once."""

    root: Path

    def source(self, seed: int) -> Path:
        path = self.root / f"int8-{seed}"
        if not path.exists():
            floats = tiny.save(tiny.build("BertModel", seed, num_hidden_layers=1), self.root / f"float-{seed}")
            (floats / "tokenizer.json").write_text(json.dumps(tokenizer()))
            quantize(floats, [text or "a" for text in TEXTS], path)
        return path

    def artifact(self, seed: int) -> Path:
        path = self.root / f"{seed}.tw"
        if not path.exists():
            compile(self.source(seed), "portable", path)
        return path

    def library(self, seed: int, library: Library, compiler: tuple[str, ...] = ()) -> Path:
        path = self.root / f"{library.name}-{library.kind}-{abs(hash(compiler))}"
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CC", shlex.join(compiler))
                compile(self.source(seed), "portable", path, library=library)
        return path

    def shared(self) -> Path:
        """With its weights in a file."""
        return self.library(0, Library("c-library", "minilm"))

    def sanitized(self) -> Path:
        """An archive that holds its weights and a runtime under sanitizers."""
        return self.library(0, Library("static", "minilm", embed_weights=True), ("gcc", *SANITIZERS))

    def other(self) -> Path:
        return self.library(1, Library("static", "other", embed_weights=True))

    @cache  # noqa: B019  # lives as long as the tests
    def expected(self, seed: int, text: str) -> NDArray[np.float32]:
        engine = tilewright.load(self.artifact(seed), 1)
        return engine(**engine.tokenize([text], truncate=True))["sentence_embedding"][0]

    def __hash__(self) -> int:
        return id(self)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("library"))


def tokenizer() -> dict[str, object]:
    """BERT's, with a vocabulary of as many words as the tiny model has."""
    content = json.loads(UNCASED.read_text("utf-8"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", ",", *"abcdef", *(f"##{letter}" for letter in "abcdef"), "bad"]
    content["model"]["vocab"] = {word: index for index, word in enumerate(words)}
    content["added_tokens"] = [token | {"id": words.index(token["content"])} for token in content["added_tokens"]]
    for name, token in content["post_processor"]["special_tokens"].items():
        token["ids"] = [words.index(name)]
    return content


def embeddings(program: Path, weights: Path | str, texts: list[str]) -> NDArray[np.float32]:
    """What the C example prints; nine digits name a float32."""
    done = subprocess.run([program, weights, *texts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.array([line.split() for line in done.stdout.splitlines()], np.float32)


def check_equal(found: NDArray[np.float32], models: Models) -> None:
    np.testing.assert_array_equal(found, np.stack([models.expected(0, text) for text in TEXTS]))


def flags_of(directory: Path) -> tuple[str, ...]:
    return f"-I{directory}", f"-L{directory}", f"-Wl,-rpath,{directory}"


def test_c_example_on_a_shared_library_equals_python(models: Models, tmp_path: Path) -> None:
    directory = models.shared()
    assert sorted(os.listdir(directory)) == ["libminilm.so", "minilm.h", "minilm.safetensors"]
    subprocess.run(["make", "-s", "-C", C.parent, f"LIBRARY={directory}", f"OUTPUT={tmp_path / 'embed'}"], check=True)
    check_equal(embeddings(tmp_path / "embed", directory / "minilm.safetensors", TEXTS), models)


def test_c_example_and_runtime_under_sanitizers_equal_python(models: Models, tmp_path: Path) -> None:
    directory = models.sanitized()
    assert sorted(os.listdir(directory)) == ["libminilm.a", "minilm.h"]
    program = compile_c(tmp_path / "embed", [C, directory / "libminilm.a"], *SANITIZERS, f"-I{directory}")
    check_equal(embeddings(program, "", TEXTS), models)


def test_c_example_on_an_artifact_is_the_same_but_for_the_prefix(models: Models, tmp_path: Path) -> None:
    text = C.read_text("utf-8").replace("minilm.h", "tilewright.h").replace("minilm_", "tilewright_")
    (tmp_path / "embed.c").write_text(text.replace("MINILM_", "TILEWRIGHT_"))
    program = compile_c(tmp_path / "embed", [tmp_path / "embed.c", *native_sources()], *SANITIZERS)
    check_equal(embeddings(program, models.artifact(0), TEXTS), models)


@pytest.mark.timeout(900)  # zig compiles musl itself at its first use
def test_c_example_linked_statically_with_musl_equals_python(models: Models, tmp_path: Path) -> None:
    directory = models.library(0, Library("static", "minilm", embed_weights=True), MUSL)
    program = tmp_path / "embed"
    command = [*MUSL, "-std=c11", "-O2", "-static", C, "-o", program, f"-I{directory}", f"-L{directory}", "-lminilm"]
    subprocess.run(command, check=True)
    assert b"interpreter" not in subprocess.run(["readelf", "-l", program], check=True, capture_output=True).stdout
    check_equal(embeddings(program, "", TEXTS), models)


def test_a_shared_library_for_an_older_glibc(models: Models) -> None:
    library = models.library(1, Library("c-library", "old"), GLIBC_2_17) / "libold.so"
    used = subprocess.run(["objdump", "-T", library], check=True, capture_output=True, text=True).stdout
    assert max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", used)) == 17


@pytest.mark.parametrize("flags", [(), SANITIZERS], ids=["plain", "sanitizers"])
def test_cpp_example_tells_cosines(models: Models, flags: tuple[str, ...], tmp_path: Path) -> None:
    directory, program = models.shared(), tmp_path / "similarity"
    warnings = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
    subprocess.run(["g++", "-std=c++17", *warnings, *flags, CPP, "-o", program, *flags_of(directory), "-lminilm"], check=True)
    done = subprocess.run([program, directory / "minilm.safetensors", *TEXTS], check=True, capture_output=True, text=True)
    first, *others = (models.expected(0, text).astype(np.float64) for text in TEXTS)
    for line, text, other in zip(done.stdout.splitlines(), TEXTS[1:], others, strict=True):
        assert line == f"{first @ other / np.sqrt((first @ first) * (other @ other)):.6f} {text}"
    failed = subprocess.run([program, tmp_path / "none", "a", "b"], check=False, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def test_two_models_link_into_one_program(models: Models, tmp_path: Path) -> None:
    one, two = models.sanitized(), models.other()
    sources = [ROOT / "tests/native/two_models.c", one / "libminilm.a", two / "libother.a"]
    program = compile_c(tmp_path / "two", sources, *SANITIZERS, f"-I{one}", f"-I{two}")
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert [np.float32(line) for line in lines] == [models.expected(seed, "a bad cab")[0] for seed in (0, 1)]


def test_two_shared_libraries_load_into_one_process(models: Models, tmp_path: Path) -> None:
    second = tmp_path / "libother.so"  # an archive may become part of a library of one's own
    whole = ["-Wl,--whole-archive", models.other() / "libother.a", "-Wl,--no-whole-archive"]
    subprocess.run(["gcc", "-shared", "-o", second, *whole, "-lm", "-pthread"], check=True)
    weights = os.fsencode(models.shared() / "minilm.safetensors")
    for seed, name, file, path in ((0, "minilm", models.shared() / "libminilm.so", weights), (1, "other", second, None)):
        functions = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        engine, result = ctypes.c_void_p(), np.zeros(tiny.HIDDEN, np.float32)
        assert getattr(functions, f"{name}_open")(path, None, ctypes.byref(engine)) == 0
        ids = (ctypes.c_int64 * 3)(2, 7, 3)
        outputs = (ctypes.c_void_p * 2)(None, result.ctypes.data)
        assert getattr(functions, f"{name}_run")(engine, ids, None, None, ctypes.c_size_t(1), ctypes.c_size_t(3), outputs) == 0
        getattr(functions, f"{name}_close")(engine)
        np.testing.assert_array_equal(result, models.expected(seed, "a"))


def symbols(file: Path, *options: str) -> set[str]:
    lines = subprocess.run(["nm", *options, file], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1] for line in lines if line and not line.endswith(":")}


def test_libraries_export_their_api_and_nothing_else(models: Models) -> None:
    functions = {f"minilm_{name}" for name in api(RUNTIME_HEADER)}
    assert {"minilm_open", "minilm_run", "minilm_tokenize", "minilm_close", "minilm_error"} <= functions
    assert symbols(models.shared() / "libminilm.so", "--dynamic", "--defined-only") == functions
    assert symbols(models.shared() / "libminilm.so") == set()  # stripped
    assert symbols(models.sanitized() / "libminilm.a", "--extern-only", "--defined-only") >= functions
    assert symbols(models.other() / "libother.a", "--extern-only", "--defined-only") == {
        name.replace("minilm", "other") for name in functions
    }


@pytest.mark.parametrize("compiler", [["gcc", "-xc", "-std=c99"], ["g++", "-xc++", "-std=c++11"]], ids=["c", "c++"])
def test_headers_stand_alone(compiler: list[str], tmp_path: Path) -> None:
    for embedded in (False, True):
        text = header(RUNTIME_HEADER, "my_model", embedded=embedded)
        assert not re.search(r"tilewright_|TILEWRIGHT|NAME|model\.tw", text)
        (tmp_path / "my_model.h").write_text(text)
        source = '#include "my_model.h"\n#include "my_model.h"\nmy_model_status status = MY_MODEL_OK;\n'
        command = [*compiler, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{tmp_path}", "-"]
        subprocess.run(command, input=source, text=True, check=True)


def error_of(program: Path, weights: Path | str, **environment: str) -> str:
    done = subprocess.run([program, weights, "a"], check=False, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_weights_that_do_not_belong_to_a_library_are_refused(models: Models, tmp_path: Path) -> None:
    directory = models.shared()
    program = compile_c(tmp_path / "embed", [C, directory / "libminilm.so"], *SANITIZERS, *flags_of(directory))
    weights = bytearray((directory / "minilm.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "altered").write_bytes(weights)
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name in ("altered", "empty"):
        assert "was altered" in error_of(program, tmp_path / name)
    for name in ("fifo", "none", "."):
        assert "cannot be read" in error_of(program, tmp_path / name)
    assert "no path was given" in error_of(program, "")
    whole = models.sanitized()
    embedded = compile_c(tmp_path / "whole", [C, whole / "libminilm.a"], *SANITIZERS, f"-I{whole}")
    assert "holds its weights" in error_of(embedded, tmp_path / "none")
    assert "avx9" in error_of(program, directory / "minilm.safetensors", TILEWRIGHT_ISA="avx9")


@pytest.mark.parametrize(
    "name", ["", "1st", "a-b", "a b", "é", "_a", "tw", "TW_x", "tilewright", "tilewright2", "a" * 65, "a\n"]
)
def test_names_that_are_no_prefix_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="the library's name is"):
        Library("static", name)


def test_command_line(models: Models, tmp_path: Path) -> None:
    output = tmp_path / "my-model"
    result = ok_json(
        "compile", models.source(0), "--target", "portable", "--emit", "c-library", "--embed-weights", "-o", output
    )
    assert (result["name"], result["kind"]) == ("my_model", "c-library")
    assert result["bytes"] == {name: (output / name).stat().st_size for name in ("libmy_model.so", "my_model.h")}
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    arguments = ("compile", models.source(0), "--target", "portable", "-o", output)
    assert "is not an artifact" in refused(2, *arguments)
    assert "--emit" in refused(2, *arguments, "--name", "x")
    assert "is not a library's directory" in refused(2, *arguments[:-1], models.artifact(0), "--emit", "static", "--name", "x")
    with pytest.MonkeyPatch.context() as patch:
        for compiler in ("/none/cc", "false"):
            patch.setenv("CC", compiler)
            assert "linking libx failed" in refused(2, *arguments, "--emit", "static", "--name", "x")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert os.listdir(tmp_path) == ["my-model"]


def test_sources_are_found() -> None:
    assert (runtime_sources() / "library/library.c").is_file()


def test_the_runtime_tokenizes_for_an_artifact(models: Models, toy_artifact: Path) -> None:
    from tilewright.runtime import library

    class Text(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_char_p), ("size", ctypes.c_size_t))

    def tokenize(artifact: Path, texts: list[bytes], truncate: int, capacity: int) -> tuple[int, list[int], list[int], int]:
        engine, count = ctypes.c_void_p(), ctypes.c_size_t()
        assert library().tilewright_open(os.fsencode(artifact), None, ctypes.byref(engine)) == 0
        ids, types = (ctypes.c_int64 * capacity)(), (ctypes.c_int64 * capacity)()
        given = (Text * len(texts))(*(Text(text, len(text)) for text in texts))
        status = library().tilewright_tokenize(
            engine, given, ctypes.c_size_t(len(texts)), truncate, ids, types, ctypes.c_size_t(capacity), ctypes.byref(count)
        )
        library().tilewright_close(engine)
        return status, ids[: count.value], types[: count.value], count.value

    pair = ("a bad cab", "Dab, \0 é " * 20)
    expected = tilewright.load(models.artifact(0), 1).tokenize([pair], truncate=True)
    status, ids, types, _ = tokenize(models.artifact(0), [text.encode() for text in pair], 1, tiny.POSITIONS)
    assert (status, ids, types) == (0, expected["input_ids"][0].tolist(), expected["token_type_ids"][0].tolist())
    assert tokenize(models.artifact(0), [b"a b c"], 0, 2)[::3] == (1, 5)
    assert tokenize(models.artifact(0), [], 0, 2)[0] == 1
    assert tokenize(toy_artifact, [b"a"], 0, 2)[0] == 1  # another tokenizer: no table
    with pytest.raises(TilewrightError, match="give input_ids instead of text"):
        raise TilewrightError(library().tilewright_error().decode())
