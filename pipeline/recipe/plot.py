"""The picture of a run: the metric and the sparsity after each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tilewright.pipeline.recipe.run import StepRecord


def plot(records: Sequence[StepRecord], path: Path) -> Path:
    """Draw the metrics and the share of zeros after each of the `records` to the PNG file `path`."""
    from matplotlib.figure import Figure

    labels = [f"{number} {record.name}" for number, record in enumerate(records)]
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name in names:
        points = [(number, record.metrics[name]) for number, record in enumerate(records) if name in record.metrics]
        upper.plot(*zip(*points, strict=True), marker="o", label=name)
    if names:
        upper.legend(fontsize=8)
    upper.set_ylabel("metric")
    zeros = [(number, 100 * record.sparsity) for number, record in enumerate(records) if record.sparsity is not None]
    if zeros:
        lower.bar(*zip(*zeros, strict=True), width=0.5, color="gray")
    lower.set_ylabel("zero weights, %")
    lower.set_ylim(0, 100)
    lower.set_xticks(range(len(labels)), labels, rotation=20)
    figure.savefig(path, dpi=120)
    return path
