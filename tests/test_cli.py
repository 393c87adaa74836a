"""The command line on tiny models: what it prints, and how it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests import tiny
from tilewright.cli import app

LINES = "\n".join(tiny.texts(24))


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def ok_json(*arguments: str | Path) -> Any:
    return json.loads(ok(*arguments, "--json"))


def refused(code: int, *arguments: str | Path) -> str:
    """The one line on stderr with which the command fails with `code`, printing nothing else."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def compiled(root: Path, name: str) -> Path:
    """Quantise and compile the tiny model of a transformers class with the command line."""
    source = tiny.save(tiny.build(name), root / "float")
    (root / "texts.txt").write_text(LINES)
    ok("quantize", source, "--texts", root / "texts.txt", "-o", root / "int8")
    ok("compile", root / "int8", "-o", root / "model.tw")
    return root / "model.tw"


@pytest.fixture(scope="session")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a token classifier: float, int8, texts.txt and model.tw."""
    root = tmp_path_factory.mktemp("tagger")
    compiled(root, "DistilBertForTokenClassification")
    return root


def test_version_and_help() -> None:
    assert ok("--version").startswith("tilewright ")
    assert "check-hardware" in ok("--help")
    assert invoke("frobnicate").exit_code == 2


def test_check_hardware() -> None:
    assert "native" in ok("check-hardware")
    machine = ok_json("check-hardware")
    assert machine["cores"] >= 1
    assert not machine["levels"][0]["missing"]  # portable runs anywhere
    assert machine["native"] in [level["name"] for level in machine["levels"] if not level["missing"]]


def test_inspect_tells_what_would_run_sparse(tagger: Path) -> None:
    assert "the model is float" in ok("inspect", tagger / "float")
    assert "0 of 12 linears would run sparse" in ok("inspect", tagger / "int8", "--target", "avx2")
    report = ok_json("inspect", tagger / "int8")
    assert (report["architecture"], report["head"], report["quantized"]) == ("distilbert", "token_classification", True)
    assert len(report["linears"]) == 6 * tiny.LAYERS
    assert report["linears"][0]["block_density"]["4x1"] == 1.0


def test_inspect_sparse(tmp_path: Path) -> None:
    model = tiny.build("DistilBertModel")
    for layer in model.transformer.layer:
        weight = layer.ffn.lin1.weight.data.view(tiny.WIDE // 4, 4, tiny.HIDDEN)
        weight[:, :, np.random.default_rng(0).random(tiny.HIDDEN) < 0.75] = 0
    report = ok_json("inspect", tiny.save(model, tmp_path / "sparse"), "--target", "avx2")
    up = [linear for linear in report["linears"] if linear["shape"] == [tiny.WIDE, tiny.HIDDEN]]
    assert all(linear["block"] for linear in up)
    assert "linears would run sparse" in ok("inspect", tmp_path / "sparse", "--target", "avx2")


def test_quantize_and_compile_report_what_they_wrote(tagger: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tagger / "float", "--texts", tagger / "texts.txt", "--method", "percentile")
    assert ok_json(*arguments, "-o", tmp_path / "int8")["method"] == "percentile"
    made = ok_json("compile", tagger / "int8", "--target", "portable", "-o", tmp_path / "small.tw", "--max-tokens", "64")
    (level,) = made["levels"]
    assert (level["name"], made["max_tokens"]) == ("portable", 64)
    assert set(made["seconds"]) == {"load", "lower", "schedule", "build", "write"}
    assert len(level["kernels"]) == 4 * tiny.LAYERS
    assert set(made["bytes"]) == {"manifest.json", "model.portable.so", "weights.safetensors", "tokenizer.json"}


def test_pack(tagger: Path, tmp_path: Path) -> None:
    made = ok_json("pack", tagger / "int8", "-o", tmp_path / "packed")
    assert made["bytes"] == sum(file.stat().st_size for file in (tmp_path / "packed").iterdir())
    assert "packed" in ok("pack", tmp_path / "packed", "-o", tmp_path / "again")
    assert "not quantised" in refused(2, "pack", tagger / "float", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compile_names_the_artifact_after_the_model(tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "int8.tw: portable" in ok("compile", tagger / "int8", "--target", "portable")
    assert [path.name for path in tmp_path.iterdir()] == ["int8.tw"]


def test_run_tags_tokens(tagger: Path, tmp_path: Path) -> None:
    artifact = tagger / "model.tw"
    assert "w3" in ok("run", artifact, "--text", "w3 w4", "--text", "w5")
    result = ok_json("run", artifact, "--text", "w3 w4", "--text", "w5", "-o", tmp_path / "out.npz")
    first, second = result["results"]
    assert (result["kind"], first["texts"], second["tokens"]) == ("token_classification", ["w3 w4"], 1)
    assert [tag["token"] for tag in first["labels"]] == ["w3", "w4"]
    logits = np.load(tmp_path / "out.npz")["logits"]
    assert logits.shape == (2, 2, tiny.LABELS)
    assert [tag["index"] for tag in first["labels"]] == logits[0].argmax(-1).tolist()
    assert first["labels"][0]["label"] == f"LABEL_{first['labels'][0]['index']}"


def test_run_reads_arrays(tagger: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=[[3, 4, 9], [5, 9, 9]], attention_mask=[[1, 1, 1], [1, 0, 0]])
    assert "sequence 1 (1 tokens)" in ok("run", tagger / "model.tw", "--input", tmp_path / "in.npz")
    results = ok_json("run", tagger / "model.tw", "--input", tmp_path / "in.npz")["results"]
    assert [[tag["id"] for tag in result["labels"]] for result in results] == [[3, 4, 9], [5]]


def test_run_answers_questions(tmp_path: Path) -> None:
    artifact = compiled(tmp_path, "BertForQuestionAnswering")
    arguments = ("run", artifact, "--text", "w1 w2", "--context", "w3 w4 w5 w6")
    (result,) = ok_json(*arguments)["results"]
    assert result["answer"] == "w3 w4 w5 w6"[result["start"] : result["end"]] != ""
    assert result["answer"] in ok(*arguments)
    assert "go in pairs" in refused(2, "run", artifact, "--text", "w1", "--text", "w2", "--context", "w3")


def test_run_classifies_sequences(tmp_path: Path) -> None:
    artifact = compiled(tmp_path, "DistilBertForSequenceClassification")
    (result,) = ok_json("run", artifact, "--text", "w1 w2")["results"]
    assert result["label"] in ok("run", artifact, "--text", "w1 w2")
    assert sum(result["probabilities"].values()) == pytest.approx(1)


def test_run_embeds(tmp_path: Path) -> None:
    artifact = compiled(tmp_path, "BertModel")
    assert "cosine" in ok("run", artifact, "--text", "w1 w2", "--text", "w3")
    (result,) = ok_json("run", artifact, "--text", "w1 w2")["results"]
    assert len(result["embedding"]) == tiny.HIDDEN


def test_benchmark_beside_onnxruntime(tagger: Path, tmp_path: Path) -> None:
    onnx = tiny.export(tiny.build("DistilBertForTokenClassification"), tmp_path / "float.onnx", ["logits"])
    arguments = ("benchmark", tagger / "model.tw", "--seq-len", "16", "--batch", "2", "--threads", "1", "--duration", "0.05")
    result = ok_json(*arguments, "--baseline", "onnxruntime", "--baseline-model", onnx, "--profile")
    assert result["ratio"] == pytest.approx(result["tilewright"]["p50"] / result["onnxruntime"]["p50"])
    assert (result["tilewright"]["batch"], result["tilewright"]["seq_len"]) == (2, 16)
    assert sum(kernel["share"] for kernel in result["kernels"]) == pytest.approx(1)
    assert "attention" in ok(*arguments, "--profile")


def test_benchmark_refuses(tagger: Path, tmp_path: Path) -> None:
    artifact = tagger / "model.tw"
    assert "--baseline-model" in refused(2, "benchmark", artifact, "--baseline", "onnxruntime")
    assert "openvino" in refused(2, "benchmark", artifact, "--baseline", "openvino")
    assert "does not exist" in refused(2, "benchmark", artifact, "--baseline-model", tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    assert "cannot load" in refused(2, "benchmark", artifact, "--baseline-model", tmp_path / "bad.onnx")
    assert "at most 32" in refused(2, "benchmark", artifact, "--seq-len", "33")


def test_models_that_cannot_be_read(tagger: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.onnx").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    for verb in ("inspect", "compile"):
        assert "does not exist" in refused(2, verb, tmp_path / "missing")
        assert "not a complete ONNX file" in refused(2, verb, tmp_path / "foreign.onnx")
        assert "not a model" in refused(3, verb, tmp_path / "empty")


def test_compile_refuses_and_leaves_nothing(tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "tilewright quantize" in refused(2, "compile", tagger / "float")
    assert "unknown target 'z80'" in refused(2, "compile", tagger / "int8", "--target", "z80")
    assert "is not a directory" in refused(2, "compile", tagger / "int8", "-o", "no/such/place.tw")
    (tmp_path / "taken").write_text("mine")
    assert "not an artifact" in refused(2, "compile", tagger / "int8", "-o", "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_quantize_refuses_and_leaves_nothing(tagger: Path, tmp_path: Path) -> None:
    texts, output = tmp_path / "texts.txt", tmp_path / "out"
    assert "cannot be read" in refused(2, "quantize", tagger / "float", "--texts", texts, "-o", output)
    texts.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(2, "quantize", tagger / "float", "--texts", texts, "-o", output)
    texts.write_text("\n")
    assert "no calibration text" in refused(2, "quantize", tagger / "float", "--texts", texts, "-o", output)
    texts.write_text(LINES)
    assert "unknown" in refused(2, "quantize", tagger / "float", "--texts", texts, "-o", output, "--method", "magic")
    assert "quantised already" in refused(2, "quantize", tagger / "int8", "--texts", texts, "-o", output)
    assert "exists" in refused(2, "quantize", tagger / "float", "--texts", texts, "-o", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_run_refuses_bad_input(tagger: Path, tmp_path: Path) -> None:
    artifact, source = tagger / "model.tw", tmp_path / "in.npz"

    def given(**arrays: Any) -> str:
        np.savez(source, **arrays)
        return refused(2, "run", artifact, "--input", source)

    assert "--text" in refused(2, "run", artifact)
    assert "cannot be read" in refused(2, "run", artifact, "--input", source)
    source.write_text("plain text")
    assert "not an npz file" in refused(2, "run", artifact, "--input", source)
    with source.open("wb") as file:
        np.save(file, [[1]])
    assert "not an npz file" in refused(2, "run", artifact, "--input", source)
    assert "0 to 49" in given(input_ids=[[50]])
    assert "0 to 49" in given(input_ids=[[-1]])
    assert "expected [batch, seq]" in given(input_ids=[1, 2])
    assert "expected integers" in given(input_ids=[[0.5]])
    assert "all zero" in given(input_ids=[[1]], attention_mask=[[0]])
    assert "holds input_ids, speed" in given(input_ids=[[1]], speed=[[1]])
    assert "input_ids is needed" in given(attention_mask=[[1]])
    assert "at most 32" in refused(2, "run", artifact, "--text", "w1 " * 33)
    assert ok("run", artifact, "--text", "w1 " * 33, "--truncate")
    assert "is not a directory" in refused(2, "run", artifact, "--text", "w1", "-o", tmp_path / "no" / "out.npz")
    (tmp_path / "folder").mkdir()
    assert "cannot write" in refused(2, "run", artifact, "--text", "w1", "-o", tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"in.npz", "folder"}


def test_run_refuses_bad_artifacts(tagger: Path, tmp_path: Path) -> None:
    assert "not an artifact" in refused(4, "run", tmp_path, "--text", "w1")
    copy = shutil.copytree(tagger / "model.tw", tmp_path / "copy.tw")
    next(copy.glob("model.*.so")).write_bytes(b"other")
    assert "was altered" in refused(4, "run", copy, "--text", "w1")


def test_text_needs_a_tokenizer(tagger: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tagger / "int8", tmp_path / "int8")
    (source / "tokenizer.json").unlink()
    ok("compile", source, "-o", tmp_path / "mute.tw")
    assert "no tokenizer" in refused(2, "run", tmp_path / "mute.tw", "--text", "w1")


def test_missing_extra_is_named(tagger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    arguments = ("benchmark", tagger / "model.tw", "--baseline-model", tmp_path / "model.onnx")
    assert "pip install 'tilewright[bench]'" in refused(3, *arguments)


def test_interrupt_leaves_nothing(tagger: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "tilewright", "compile", str(tagger / "int8"), "-o", str(tmp_path / "model.tw")]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.PIPE, text=True)
    while not any(scratch.iterdir()) and process.poll() is None:  # building begins
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.strip()) == (130, "")
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]
