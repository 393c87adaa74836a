"""`tilewright check-hardware`: this CPU, named ones, and predictions for a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.test_cli import ok, ok_json, refused
from tilewright.schedules import rates


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the config.json of a DistilBERT that nobody has trained."""
    directory = tmp_path_factory.mktemp("untrained")
    transformers.DistilBertConfig(architectures=["DistilBertForQuestionAnswering"]).save_pretrained(directory)
    return directory


def test_named_cpus() -> None:
    lake = ok_json("check-hardware", "--target", "Xeon Platinum 8375C")
    assert (lake["llvm_cpu"], lake["native"], lake["cores"]) == ("icelake-server", "avx512vnni", None)
    levels = {level["name"]: level["missing"] for level in lake["levels"]}
    assert levels["avx512vnni"] == levels["avx2"] == []
    assert "avxvnni" in levels["avxvnni"]
    assert ok_json("check-hardware", "--target", "c6i.4xlarge")["levels"] == lake["levels"]
    assert ok_json("check-hardware", "--target", "c6a")["native"] == "avx2"
    bare = ok_json("check-hardware", "--target", "avx2")
    assert (bare["llvm_cpu"], bare["native"]) == (None, "avx2")
    assert "unknown target 'z80'" in refused(2, "check-hardware", "--target", "z80")


def test_every_level_says_what_stands_behind_its_figures() -> None:
    for level in ok_json("check-hardware", "--target", "icelake-server")["levels"]:
        known = rates.find(level["name"], "icelake-server")
        assert (level["rates"] is None) == (level["break_even"] is None) == (known is None)
        if known is not None:
            assert (level["rates"]["source"], level["rates"]["cpu"]) == (known.source, known.cpu)
            assert all(0 <= share <= 1 for share in level["break_even"].values())


def test_prediction_for_a_model_without_weights(config: Path) -> None:
    found = ok_json("check-hardware", "--target", "c6i", "--model", config)["prediction"]
    assert (found["level"], found["batch"], found["seq_len"], found["threads"]) == ("avx512vnni", 1, 128, 1)
    dense, *rows = found["rows"]
    assert (dense["block"], dense["speedup"]) == ("dense", 1)
    assert {row["sparsity"] for row in rows} == {0.7, 0.8, 0.9}
    for row in (dense, *rows):
        assert row["speedup"] == pytest.approx(dense["milliseconds"] / row["milliseconds"])
        assert 6e-3 * sum(row["microseconds"].values()) <= row["milliseconds"]  # six layers, and the embedding
    for share in (0.7, 0.8, 0.9):
        times = [row["milliseconds"] for row in rows if row["sparsity"] == share]
        assert times == sorted(times)
    best = {row["sparsity"]: row["speedup"] for row in reversed(rows)}
    assert 1 < best[0.7] < best[0.8] < best[0.9]


def test_options_of_a_prediction(config: Path) -> None:
    def rows(*options: str) -> list[dict[str, float]]:
        arguments = ("check-hardware", "--target", "avx2", "--model", config / "config.json", "--sparsity", "0.8", *options)
        found = ok_json(*arguments)["prediction"]["rows"]
        return sorted(found, key=lambda row: str(row["block"]))

    slow, fast, many = (rows(*options) for options in (("--ghz", "2"), ("--ghz", "4"), ("--ghz", "2", "--batch", "8")))
    for a, b, c in zip(slow, fast, many, strict=True):
        assert a["milliseconds"] == pytest.approx(2 * b["milliseconds"]) == pytest.approx(c["milliseconds"] / 8)
    dense = next(row["milliseconds"] for row in rows() if row["block"] == "dense")
    assert all(row["milliseconds"] <= dense for row in rows("--sparsity", "0.01"))  # what does not pay is computed as dense


def test_what_is_printed(config: Path) -> None:
    text = ok("check-hardware", "--target", "c6i", "--model", config)
    assert "modelled" in text and "llvm-mca" in text
    assert "3.00 GHz (assumed)" in text
    assert "gather 4x1" in text
    assert "over dense" in text


def test_a_level_without_rates_says_so(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(entry for entry in rates.table() if entry.isa == "avx2")
    monkeypatch.setattr(rates, "table", lambda: known)
    text = ok("check-hardware", "--target", "icelake-server", "--model", config)
    assert "no rates for avx512vnni, which this CPU has too" in text
    found = ok_json("check-hardware", "--target", "icelake-server", "--model", config)
    assert found["prediction"]["level"] == "avx2"
    assert {level["name"] for level in found["levels"] if level["rates"]} == {"avx2"}
    monkeypatch.setattr(rates, "table", lambda: ())
    assert "nothing can be predicted" in ok("check-hardware", "--target", "icelake-server", "--model", config)


def test_bad_models_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(2, "check-hardware", "--model", tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "architecture llama is not supported" in refused(3, "check-hardware", "--model", tmp_path)
