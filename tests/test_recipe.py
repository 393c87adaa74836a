"""A tiny model through whole recipes: steps are done once, an interrupted one goes on, and runs give equal bytes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tilewright
from tests import tiny
from tilewright.artifact import read_manifest
from tilewright.errors import InvalidInput, InvalidModel
from tilewright.frontend import load
from tilewright.pipeline.recipe.run import StepRecord, compress
from tilewright.pipeline.recipe.schema import Recipe, dump_recipe, parse_recipe, read_recipe
from tilewright.pipeline.recipe.steps import DropExceeded, Watcher, Workspace
from tilewright.pipeline.training import Progress

RECIPE: dict[str, Any] = {
    "task": "token_classification",
    "model": "dense",
    "data": {"train": "train.jsonl", "dev": "dev.jsonl", "max_length": 24},
    "seed": 5,
    "steps": [
        {"step": "train", "epochs": 2, "learning_rate": 1e-2, "warmup": 0, "batch_size": 8, "checkpoint_every": 4},
        {"step": "prune", "score": "obs", "block": [4, 1], "sparsity": 0.5, "texts": 40, "damping": 0.1},
        {"step": "distil", "epochs": 2, "learning_rate": 1e-3, "batch_size": 8, "checkpoint_every": 4},
        {"step": "quantize", "texts": 20},
        {"step": "compile"},
    ],
}


def write_rows(path: Path, count: int, seed: int) -> None:
    rows = []
    for text in tiny.texts(count, seed):
        words = text.split()
        rows.append({"tokens": words, "tags": [int(word[1:]) % tiny.LABELS for word in words]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    tiny.save(tiny.build("DistilBertForTokenClassification"), directory / "dense")
    write_rows(directory / "train.jsonl", 60, 1)
    write_rows(directory / "dev.jsonl", 30, 2)
    return directory


def changed(*changes: str, **keys: Any) -> Recipe:
    return parse_recipe(yaml.safe_dump(RECIPE | keys), "r.yaml", changes)


class Interrupter(Watcher):
    """Stops a run as Ctrl-C does, at its optimizer step `at`, counted from 1 over all trainings of the run."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.steps = at, 0

    def training(self, progress: Progress) -> None:
        self.steps += 1
        if self.steps == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(place: Path) -> list[StepRecord]:
    return compress(changed(), place, place / "whole")


def test_every_step_leaves_what_it_promises(place: Path, whole: list[StepRecord]) -> None:
    assert [record.name for record in whole] == ["train", "prune", "distil", "quantize", "compile"]
    train, prune, distil, quantized, compiled = whole
    assert train.metrics["agreement"] > 0.45  # the tags follow from the words; a third would be chance
    assert prune.sparsity == distil.sparsity == pytest.approx(0.5, abs=0.01)
    assert quantized.sparsity is not None and quantized.sparsity >= 0.5
    assert set(compiled.metrics) == {"agreement", "f1"}
    assert compiled.metrics["agreement"] == pytest.approx(distil.metrics["agreement"], abs=0.15)
    steps = place / "whole" / "steps"
    assert sorted(path.name for path in steps.iterdir()) == sorted(record.directory for record in whole)
    sparse = load(steps / distil.directory / "model")
    assert {linear.block for linear in sparse.linears()} == {(4, 1)}
    assert not (steps / distil.directory / "checkpoints").exists()


def test_the_artifact_answers_and_carries_its_chain(place: Path, whole: list[StepRecord]) -> None:
    artifact = place / "whole" / "steps" / whole[-1].directory / "model.tw"
    engine = tilewright.load(artifact, num_threads=1)
    rows = [json.loads(line) for line in (place / "dev.jsonl").read_text().splitlines()]
    hits = total = 0
    for row in rows:
        found = engine([[int(word[1:]) + 1 for word in row["tokens"]]])["logits"][0].argmax(-1)
        hits, total = hits + int((found == np.array(row["tags"])).sum()), total + len(found)
    assert whole[-1].metrics["agreement"] == pytest.approx(hits / total)
    provenance = read_manifest(artifact).provenance
    assert [step["step"] for step in provenance["steps"]] == ["train", "prune", "distil", "quantize", "compile"]
    assert Recipe.model_validate(provenance["recipe"]) == changed()
    for before, after in zip(provenance["steps"], provenance["steps"][1:], strict=False):
        assert all(after["input_sha256"][name] == value for name, value in before["output_sha256"].items())
    assert provenance["steps"][2]["metrics"] == dict(whole[2].metrics)


def test_a_second_run_gives_the_same_bytes_from_the_recipe_of_the_artifact(
    place: Path, whole: list[StepRecord], tmp_path: Path
) -> None:
    artifact = place / "whole" / "steps" / whole[-1].directory / "model.tw"
    again = parse_recipe(yaml.safe_dump(read_manifest(artifact).provenance["recipe"]), "again")
    records = compress(again, place, tmp_path / "again")
    assert [record.key for record in records] == [record.key for record in whole]
    assert [record.output_sha256 for record in records] == [record.output_sha256 for record in whole]


def test_steps_that_are_done_are_not_repeated(place: Path, whole: list[StepRecord]) -> None:
    watcher = Interrupter()
    assert compress(changed(), place, place / "whole", watcher=watcher) == whole
    other = compress(changed("steps.3.texts=10", steps=RECIPE["steps"][:4]), place, place / "whole", watcher=watcher)
    assert watcher.steps == 0
    assert other[:3] == whole[:3] and other[3].key != whole[3].key


def test_interrupted_run_goes_on_and_ends_alike(place: Path, whole: list[StepRecord], tmp_path: Path) -> None:
    output, recipe = tmp_path / "run", changed(steps=RECIPE["steps"][:4])
    # 16 steps each, checkpoints every 4: interrupted at step 6, at 5 + 8, and at step 8 of the distillation
    for at in (6, 9, 12):
        with pytest.raises(KeyboardInterrupt):
            compress(recipe, place, output, resume=output.exists(), watcher=Interrupter(at))
    with pytest.raises(InvalidInput, match="is a step that was interrupted; go on with --resume"):
        compress(recipe, place, output)
    watcher = Interrupter()
    records = compress(recipe, place, output, resume=True, watcher=watcher)
    assert watcher.steps == 12
    assert [record.output_sha256 for record in records] == [record.output_sha256 for record in whole[:4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: None, None),
        (lambda place: write_rows(place / "dev.jsonl", 31, 2), r"data_sha256.dev.jsonl was"),
        (
            lambda place: tiny.save(tiny.build("DistilBertForTokenClassification", 1), place / "dense"),
            "model_sha256.model",
        ),
    ],
)
def test_resuming_with_other_data_or_model(
    place: Path, tmp_path: Path, change: Callable[[Path], None], message: str | None
) -> None:
    own = tmp_path / "own"
    shutil.copytree(place, own, ignore=shutil.ignore_patterns("whole"))
    recipe = changed("steps.0.max_steps=8", steps=RECIPE["steps"][:1])
    with pytest.raises(KeyboardInterrupt):
        compress(recipe, own, own / "run", watcher=Interrupter(5))
    change(own)
    if message is None:
        compress(recipe, own, own / "run", resume=True)
    else:
        with pytest.raises(InvalidInput, match=message):
            compress(recipe, own, own / "run", resume=True)


def test_resuming_with_another_recipe_names_what_changed(place: Path, tmp_path: Path) -> None:
    compress(changed("steps.0.max_steps=1", steps=RECIPE["steps"][:1]), place, tmp_path / "run")
    other = changed("steps.0.max_steps=2", "seed=6", steps=RECIPE["steps"][:1])
    with pytest.raises(InvalidInput, match=r"recipe\.seed was 5, is 6; recipe\.steps\.0\.max_steps was 1, is 2; restore them"):
        compress(other, place, tmp_path / "run", resume=True)
    with pytest.raises(InvalidInput, match="holds no run to resume"):
        compress(other, place, tmp_path / "none", resume=True)


def test_quantising_that_costs_too_much(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def metrics(space: Workspace, model: Path, dense: Path) -> dict[str, float]:
        return {"agreement": 0.85 if "quantize" in str(model) else 0.9}

    monkeypatch.setattr(Workspace, "metrics", metrics)
    train = RECIPE["steps"][0] | {"max_steps": 1}
    quantize = {"step": "quantize", "texts": 9, "max_drop": 0.04}
    _, record = compress(changed(steps=[train, quantize]), place, tmp_path / "run")
    expected = "INT8 costs 0.05 of agreement (0.9 to 0.85), max_drop is 0.04; try another method, more texts, or distil longer"
    assert record.notes == (expected,)
    with pytest.raises(DropExceeded, match=re.escape(expected)):
        compress(changed(steps=[train, quantize | {"on_miss": "fail"}]), place, tmp_path / "run")
    _, record = compress(changed(steps=[train, quantize | {"max_drop": 0.06}]), place, tmp_path / "run")
    assert record.notes == ()


def test_magnitude_in_a_recipe(place: Path, tmp_path: Path) -> None:
    prune = {
        "step": "prune", "score": "magnitude", "block": [4, 4], "sparsity": 0.75, "interval": 2, "balanced": True,
        "training": {"epochs": 2, "batch_size": 8}, "loss": {"logits": 1},
    }  # fmt: skip
    (record,) = compress(changed(steps=[prune]), place, tmp_path / "run")
    assert record.sparsity == pytest.approx(0.75)


def test_embeddings_without_labels(tmp_path: Path) -> None:
    tiny.save(tiny.build("BertModel"), tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n".join(tiny.texts(40)))
    recipe = {
        "task": "embedding", "model": "dense", "data": {"train": "texts.txt", "dev": "texts.txt", "max_length": 24},
        "steps": [{"step": "evaluate"}, {"step": "prune", "score": "obs", "sparsity": 0.5, "damping": 0.1},
                  {"step": "distil", "epochs": 4, "learning_rate": 1e-3}],
    }  # fmt: skip
    dense, pruned, distilled = compress(parse_recipe(yaml.safe_dump(recipe), "r"), tmp_path, tmp_path / "run")
    assert dense.metrics["cosine"] == pytest.approx(1)
    assert 0.3 < pruned.metrics["cosine"] < distilled.metrics["cosine"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "x"}, "mode: the key is unknown; allowed: description, task, model, data, seed, steps"),
        ({"task": "squat"}, "task: Input should be 'question_answering', 'sequence"),
        ({"data": {"train": "a", "length": 3}}, "data.length: the key is unknown; allowed: max_length, stride, train"),
        ({"data": {}}, "data.train: Field required"),
        ({"steps": []}, "steps: Tuple should have at least 1 item"),
        ({"steps": [{"step": "shrink"}]}, "steps.0: Input tag 'shrink' found using 'step' does not match .*'train', 'prune'"),
        ({"steps": [{"step": "train", "epoch": 1}]}, "steps.0.epoch: the key is unknown; allowed: epochs, max_steps"),
        ({"steps": [{"step": "prune", "score": "x"}]}, "steps.0: Input tag 'x' found using 'score' .*'obs', 'magnitude'"),
        (
            {"steps": [{"step": "prune", "score": "obs", "sparse": 1}]},
            "steps.0.sparse: the key is unknown; allowed: block, sparsity, scope, balanced, indivisible, rounds, damping",
        ),
        (
            {"steps": [{"step": "prune", "score": "magnitude", "training": {"x": 1}}]},
            "steps.0.training.x: the key is unknown; allowed: epochs",
        ),
        ({"steps": [{"step": "distil", "loss": {"logit": 1}}]}, "steps.0.loss.logit: the key is unknown; allowed: attention"),
        ({"steps": [{"step": "prune", "score": "obs", "sparsity": 1}]}, "steps.0.sparsity: Input should be less than 1"),
        ({"steps": [{"step": "compile"}]}, r"steps.0 \(compile\) needs INT8 weights; put quantize before it"),
        ({"steps": [{"step": "quantize"}, {"step": "train"}]}, r"steps.1 \(train\) stands after quantize"),
        (
            {"task": "embedding", "steps": [{"step": "train"}]},
            r"steps.0 \(train\): the task embedding has no labels",
        ),
        ({"data": {"train": "a"}, "steps": [{"step": "evaluate"}]}, r"steps.0 \(evaluate\) has no data"),
    ],
)
def test_bad_recipes_name_the_key_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"r.yaml: {message}"):
        changed(**changes)


@pytest.mark.parametrize("text", ["- a", "", "a: [", "a: !!python/object:os.system x", "[" * 1000])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InvalidInput, match=r"r\.yaml is no"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("change", ["steps.9.x=1", "seed", "steps.x.y=1", "seed.x=1"])
def test_changes_that_change_nothing(change: str) -> None:
    with pytest.raises(InvalidInput, match="changes nothing of the recipe"):
        changed(change)


def test_what_a_recipe_names_must_exist(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"data none.jsonl does not exist at"):
        compress(changed("data.train=none.jsonl"), place, tmp_path / "a")
    with pytest.raises(InvalidModel, match=r"model .*nowhere does not exist"):
        compress(changed("model=nowhere"), place, tmp_path / "a")
    with pytest.raises(InvalidInput, match="asset bert is unknown; known: distilbert_qdq, minilm, squad"):
        compress(changed("model=asset:bert"), place, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_positions_and_blocks_that_do_not_fit(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"data\.max_length is 100, the model has 32 positions"):
        compress(changed("data.max_length=100"), place, tmp_path / "a")
    with pytest.raises(InvalidInput, match="block 3x1 has no kernel"):
        compress(changed("steps.1.block=[3, 1]"), place, place / "whole")


def test_dumped_recipe_reads_back() -> None:
    assert Recipe.model_validate(dump_recipe(changed())) == changed()
