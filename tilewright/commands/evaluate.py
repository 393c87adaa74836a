"""`tilewright evaluate`: how well a model answers, and how fast, on a whole file of a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.commands.output import Json, Threads, print_json, progress_bar, stdout, table
from tilewright.cpu import available_cores
from tilewright.errors import InvalidInput

if TYPE_CHECKING:
    from tilewright.pipeline.evaluation import Evaluation

_BASELINE = "onnxruntime"


def evaluate(
    model: Annotated[Path, typer.Argument(help="Artifact, or checkpoint: INT8, which is compiled first, or float.")],
    task: Annotated[str, typer.Option(help="squad, embedding, tokens or classification.")],
    data: Annotated[Path, typer.Option(help="File of the task's format.")],
    reference: Annotated[Path | None, typer.Option(help="Model to compare answers with, such as the dense one.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to take, evenly spread over the file.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence.", show_default="384, or 128")] = None,
    stride: Annotated[int, typer.Option(min=1, help="Tokens that windows of a context share.")] = 128,
    baseline: Annotated[str | None, typer.Option(help="Engine to compare with: onnxruntime.")] = None,
    baseline_model: Annotated[Path | None, typer.Option(help="ONNX file that the baseline runs.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure the answers of a model, with the compiled artifact itself answering."""
    if baseline not in (None, _BASELINE):
        raise InvalidInput(f"baseline {baseline} is unknown; choose {_BASELINE}")
    if (baseline is None) != (baseline_model is None):
        raise InvalidInput("--baseline and --baseline-model go together; give both, or neither")
    from tilewright.pipeline.evaluation import answering, evaluate_baseline
    from tilewright.pipeline.evaluation import evaluate as run
    from tilewright.pipeline.recipe.steps import spread
    from tilewright.pipeline.tasks import find_task
    from tilewright.pipeline.tasks.base import TextSettings

    chosen = find_task(task)
    count = threads or available_cores()
    longest = max_length or (384 if chosen.name == "question_answering" else 128)
    settings = TextSettings(max_length=longest, stride=stride)
    rows = spread(chosen.read(data), limit)
    other = answering(chosen, reference, settings, count).predict if reference is not None else None
    with progress_bar("answering") as progress:
        found = {str(model): run(chosen, model, rows, settings, reference=other, threads=count, progress=progress)}
    if baseline_model is not None:
        name = f"{_BASELINE} {baseline_model}"
        found[name] = evaluate_baseline(chosen, baseline_model, model, rows, settings, count)
    if as_json:
        print_json(
            {"task": chosen.name, "data": str(data), "threads": count, "models": [_json(name, e) for name, e in found.items()]}
        )
        return
    metrics = next(iter(found.values())).metrics
    grid = table("model", *metrics, "rows", "rows/s")
    for name, evaluation in found.items():
        values = (f"{value:.4g}" for value in evaluation.metrics.values())
        grid.add_row(name, *values, str(evaluation.records), f"{evaluation.per_second:.1f}")
    stdout().print(grid)


def _json(name: str, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "model": name,
        "metrics": evaluation.metrics,
        "rows": evaluation.records,
        "seconds": evaluation.seconds,
        "rows_per_second": evaluation.per_second,
    }
