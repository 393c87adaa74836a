"""The commands of the pipeline, on a tiny model: compress, recipes, evaluate, provenance."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests import tiny
from tests.test_recipe import write_rows
from tilewright.cli import app
from tilewright.pipeline.recipe.recipes import shipped
from tilewright.pipeline.recipe.schema import parse_recipe
from tilewright.pipeline.tasks import TASKS

STEPS = [
    {"step": "evaluate"},
    {"step": "prune", "score": "obs", "sparsity": 0.5, "damping": 0.1, "texts": 20},
    {"step": "distil", "epochs": 1, "batch_size": 8},
    {"step": "quantize", "texts": 10},
    {"step": "compile"},
]


def tilewright(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def printed(*arguments: str | Path) -> Any:
    result = tilewright(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    tiny.save(tiny.build("BertForTokenClassification"), directory / "dense")
    write_rows(directory / "train.jsonl", 40, 1)
    write_rows(directory / "dev.jsonl", 20, 2)
    recipe = {
        "task": "token_classification",
        "model": "dense",
        "data": {"train": "train.jsonl", "dev": "dev.jsonl", "max_length": 24},
        "steps": STEPS,
    }
    (directory / "r.yaml").write_text(yaml.safe_dump(recipe))
    return directory


@pytest.fixture(scope="module")
def run(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = printed("compress", place / "r.yaml", "-o", place / "run")
    return found


@pytest.fixture(scope="module")
def artifact(place: Path, run: dict[str, Any]) -> Path:
    return place / "run" / "steps" / run["steps"][-1]["directory"] / "model.tw"


def test_compress_reports_every_step(place: Path, run: dict[str, Any]) -> None:
    assert [step["name"] for step in run["steps"]] == [str(step["step"]) for step in STEPS]
    assert Path(run["plot"]).read_bytes().startswith(b"\x89PNG")
    result = tilewright("compress", place / "r.yaml", "-o", place / "run")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["step", "agreement", "f1", "zeros", "time"] in rows
    assert next(row for row in rows if row[:2] == ["1", "prune"])[4] == "50.0%"


def test_dry_run_measures_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    before = sorted(place.rglob("*"))
    steps = printed("compress", place / "r.yaml", "-o", tmp_path / "new", "--dry-run", "--set", "steps.2.epochs=100")["steps"]
    assert [step["name"] for step in steps] == [str(step["step"]) for step in STEPS]
    assert not any(step["done"] for step in steps)
    assert [step["seconds"] is not None for step in steps] == [False, True, True, False, False]
    assert all(step["memory"] > 1e8 for step in steps if step["seconds"] is not None)
    assert not (tmp_path / "new").exists() and sorted(place.rglob("*")) == before
    result = tilewright("compress", place / "r.yaml", "-o", tmp_path / "new", "--dry-run")
    assert "sparsity 0.5" in result.stdout and "compiling and evaluating aside" in result.stdout


def test_dry_run_knows_what_is_done(place: Path, run: dict[str, Any]) -> None:
    steps = printed("compress", place / "r.yaml", "-o", place / "run", "--dry-run")["steps"]
    assert all(step["done"] and step["seconds"] is None for step in steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compress", "nothing", "-o", "x"],
            "recipe nothing is no file and does not come along; give a file or one of",
        ),
        (["compress", "r.yaml", "-o", "x", "--set", "sparsity"], "sparsity changes nothing of the recipe"),
        (["compress", "r.yaml", "-o", "x", "--set", "mode=1"], "r.yaml: mode: the key is unknown; allowed: description"),
        (["compress", "r.yaml", "-o", "x", "--resume"], "x holds no run to resume"),
        (["recipes", "show", "nothing"], "recipe nothing is no file"),
        (["evaluate", "dense", "--task", "squat", "--data", "dev.jsonl"], "task squat is unknown"),
        (["evaluate", "dense", "--task", "squad", "--data", "dev.jsonl"], "dev.jsonl"),
        (["evaluate", "dense", "--task", "tokens", "--data", "none"], "data none cannot be read"),
        (["evaluate", "dense", "--task", "tokens", "--data", "dev.jsonl", "--baseline", "tvm"], "baseline tvm is unknown"),
        (["evaluate", "dense", "--task", "tokens", "--data", "dev.jsonl", "--baseline", "onnxruntime"], "go together"),
        (["provenance", "dense"], "dense holds neither manifest.json nor provenance.json"),
    ],
)
def test_errors_are_one_line(place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(place)
    result = tilewright(*arguments)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (place / "x").exists()


def test_evaluate_lets_the_artifact_answer(place: Path, run: dict[str, Any], artifact: Path) -> None:
    arguments = ("evaluate", artifact, "--task", "tokens", "--data", place / "dev.jsonl", "--max-length", "24")
    (found,) = printed(*arguments)["models"]
    assert found["metrics"] == pytest.approx(run["steps"][-1]["metrics"])
    assert found["rows"] == 20 and found["rows_per_second"] == pytest.approx(20 / found["seconds"])
    assert "rows/s" in tilewright(*arguments, "--limit", "5").stdout


def test_evaluate_beside_onnx_runtime(place: Path, artifact: Path) -> None:
    model = tiny.build("BertForTokenClassification")
    onnx = tiny.export(model, place / "model.onnx", ["logits"], types=True)
    arguments = ("evaluate", place / "dense", "--task", "tokens", "--data", place / "dev.jsonl", "--max-length", "24")
    ours, theirs = printed(*arguments, "--baseline", "onnxruntime", "--baseline-model", onnx)["models"]
    assert ours["metrics"] == pytest.approx(theirs["metrics"])  # float32 both: classes agree


def test_evaluate_for_another_task(place: Path, artifact: Path) -> None:
    (place / "t.jsonl").write_text('{"text": "w1", "label": 0}\n')
    result = tilewright("evaluate", artifact, "--task", "classification", "--data", place / "t.jsonl", "--max-length", "24")
    assert result.exit_code == 2 and "is for token_classification, not for sequence_classification" in result.stderr
    result = tilewright("evaluate", artifact, "--task", "tokens", "--data", place / "dev.jsonl")
    assert result.exit_code == 2 and "max_length is 128, the model has 32 positions; lower it" in result.stderr


def test_provenance_prints_verifies_and_gives_the_recipe_back(place: Path, artifact: Path, tmp_path: Path) -> None:
    result = tilewright("provenance", artifact, "--verify", place / "run")
    assert result.exit_code == 0, result.output
    tree = result.stdout.partition("model.tw")[2]  # its path names a step, too
    places = [tree.index(name) for name in ("prune", "distil", "quantize", "compile")]
    assert places == sorted(places) and "sparsity 0.5" in result.stdout and "metrics: agreement" in result.stdout
    assert result.stdout.count("verified:") == 6  # three links, and the files of three steps
    text = tilewright("provenance", artifact, "--recipe").stdout
    assert parse_recipe(text, "r") == parse_recipe((place / "r.yaml").read_text(), "r")


def test_provenance_of_an_altered_run(place: Path, run: dict[str, Any], artifact: Path) -> None:
    file = place / "run" / "steps" / run["steps"][2]["directory"] / "model" / "model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        result = tilewright("provenance", artifact, "--verify", place / "run")
        assert result.exit_code == 4
        assert "step 1, distil: 3 files: no file below" in result.stderr and "its model.safetensors" in result.stderr
    finally:
        file.write_bytes(content)


def test_recipes_that_come_along() -> None:
    found = printed("recipes", "list")
    names = [recipe["name"] for recipe in found]
    assert set(names) == set(shipped()) and "fast-distilbert" in names
    assert {recipe["task"] for recipe in found} == set(TASKS)
    for name in names:
        assert tilewright("recipes", "list").stdout.count(name)
        text = tilewright("recipes", "show", name).stdout
        assert text == shipped()[name]
        parse_recipe(text, name)
    paper = parse_recipe(shipped()["fast-distilbert"], "")
    prune = next(step for step in paper.steps if step.step == "prune")
    assert (prune.sparsity, prune.block) == (0.8, (4, 1))
