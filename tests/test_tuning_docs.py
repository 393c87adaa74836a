"""docs/tuning.md, "Tune for your Xeon SKU": run from nothing to a tuned artifact, with a small budget."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import tuning
from tests import tiny
from tests.test_cli import LINES, ok, ok_json, refused
from tilewright.tuning.records import read_log

DOCS = Path(__file__).parent.parent / "docs" / "tuning.md"
SMALL = ("--trials", "2", "--tokens", "16", "--accept-disturbed", "--json")


def commands() -> list[list[str]]:
    section = DOCS.read_text("utf-8").split("## Tune for your Xeon SKU")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("tilewright ")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tuned")
    source = tiny.save(tiny.build("DistilBertForTokenClassification"), root / "float")
    (root / "texts.txt").write_text(LINES)
    ok("quantize", source, "--texts", root / "texts.txt", "-o", root / "int8")
    return root / "int8"


def test_from_nothing_to_a_tuned_artifact(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verbs = []
    for command in commands():
        verb, *rest = (str(model) if word == "MODEL" else word for word in command)
        verbs.append(verb)
        if verb == "tune" and "--dry-run" not in rest:
            budget = rest.index("--time-budget")
            found = ok_json(verb, *rest[:budget], *rest[budget + 2 :], *SMALL[:-1])
        else:
            ok(verb, *rest)
    assert verbs == ["check-hardware", "tune", "tune", "compile", "inspect"]
    (level,) = found["levels"].values()
    assert found["logs"] == [str(next(Path("tuning_logs").glob("*.jsonl")))]
    log = read_log(Path(found["logs"][0]))
    assert [row["key"] for row in level] == list(log.records)
    assert sum(row["trials"] for row in level) == 2
    kernels = ok_json("inspect", "model.tw")["levels"][0]["kernels"]
    used = {record["key"] for kernel in kernels for record in kernel["records"]}
    linear = {key for key in log.records if ":attention:" not in key}
    assert used == linear
    verified = ok_json("logs", "verify", found["logs"][0])["records"]
    assert [row["key"] for row in verified] == list(log.records)
    assert all(row["gain"] and not row["reason"] for row in verified)
    made = tuning.main([found["logs"][0], "--plots", str(tmp_path / "plots")])
    assert [path.suffix for path in made] == [".png", ".png"]
    assert all(path.stat().st_size > 1000 for path in made)


def test_wishes_are_refused_in_a_line(model: Path) -> None:
    assert "90s, 20m or 2h" in refused(2, "tune", model, "--time-budget", "soon")
    assert "multiples of 16" in refused(2, "tune", model, "--tokens", "10")
    assert "HOST:PORT" in refused(2, "tune", model, "--rpc-tracker", "nowhere")
    dry = ok_json("tune", model, "--dry-run", "--trials", "5")
    assert dry["trials"] == 5
