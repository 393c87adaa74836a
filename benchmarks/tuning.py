"""Results of tuning from a log: a table of gains, curves of the best so far, and a plot of the gain of each kernel.

    python -m benchmarks.tuning tuning_logs/znver4.jsonl                              # Markdown
    python -m benchmarks.tuning tuning_logs/znver4.jsonl --plots docs/benchmarks      # and PNG plots

The table and the plot show what was accepted (medians of paired ratios in the last turns); the curves show the search's own
measurements, which are fewer and so flatter themselves a little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import line_color, new_figure, save_figure
from tilewright.codegen.workload import Workload
from tilewright.schedules import rates
from tilewright.tuning.cost import CostModel, Sample, by_rates, samples_of, spearman
from tilewright.tuning.records import Log, Record, read_log
from tilewright.tuning.search import best_so_far

FEWEST_RANKED = 4
"""Candidates of a workload from which on their order means something."""

SHARES = (8, 16, 32, 64)
"""Trials after which the share of the final gain is told."""


def by_level(log: Log) -> Mapping[str, list[Record]]:
    """Records by ISA level, sorted by key."""
    found: dict[str, list[Record]] = {}
    for key, record in sorted(log.records.items()):
        found.setdefault(Workload.parse(key).isa, []).append(record)
    return found


def name(record: Record) -> str:
    """A kernel for people."""
    task = Workload.parse(record.key)
    head = task.epilogue.partition(">")[0].partition("@")[0]
    if task.op == "attention":
        return f"attention {task.n}x{task.k} t{task.tokens}"
    block = "dense" if task.block is None else f"{task.block[0]}x{task.block[1]} {100 - task.density} %"
    return f"{head} {task.n}x{task.k} {block} t{task.tokens}"


def markdown(log: Log) -> str:
    """A summary and a table for each level, and the machines."""
    lines = [f"- {', '.join(f'{key} {value}' for key, value in machine.facts.items())}" for machine in log.machines.values()]
    for level, records in by_level(log).items():
        gains = [record.gain.median for record in records]
        tuned = sum(record.decisions != record.default for record in records)
        mean = statistics.geometric_mean(gains)
        lines += ["", f"### {level}: {mean:.3f}x in the mean, {tuned} of {len(records)} tuned, least {min(gains):.3f}x", ""]
        shares = [f"{share(records, trials):.0%} of the final gain within {trials} trials" for trials in SHARES]
        lines += [", ".join(shares) + ".", ""]
        lines += [
            "| kernel | gain | 95 % | % of peak | default | trials | decided otherwise |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        for record in records:
            gain = record.gain
            changes = ", ".join(f"{key} {value}" for key, value in _changes(record).items())
            lines.append(
                f"| {name(record)} | {gain.median:.3f} | {gain.low:.2f}-{gain.high:.2f} | {record.peak[0]:.0%} | "
                f"{record.peak[1]:.0%} | {len(record.trials)} | {changes or '-'} |"
            )
    return "\n".join(lines) + "\n"


def share(records: Sequence[Record], trials: int) -> float:
    """The share of what the whole search gained that so many trials of a workload had gained; of the geometric means."""
    curves = [best_so_far(one.ratio for one in record.trials) for record in records if record.trials]
    final = sum(math.log(curve[-1]) for curve in curves)
    return sum(math.log(curve[min(trials, len(curve)) - 1]) for curve in curves) / final if final else 1.0


def _changes(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.decisions.items() if record.default.get(key) != value}


def plot(log: Log, directory: Path, stem: str) -> list[Path]:
    """Two PNG files for each level: best so far by trials, and gain by kernel."""
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for level, records in by_level(log).items():
        made += [_curves(records, level, directory / f"tuning_{stem}_{level}_curves.png")]
        made += [_gains(records, level, directory / f"tuning_{stem}_{level}_gains.png")]
    return made


def _curves(records: Sequence[Record], level: str, path: Path) -> Path:
    figure, axes = new_figure(f"Best so far while searching, {level}")
    tried = [record for record in records if record.trials]
    for index, record in enumerate(tried):
        curve = best_so_far(one.ratio for one in record.trials)
        axes.step(range(1, len(curve) + 1), curve, where="post", color=line_color(index, len(tried)), label=name(record))
    axes.set(xlabel="trials", ylabel="times faster than the default")
    return save_figure(figure, axes, path)


def _gains(records: Sequence[Record], level: str, path: Path) -> Path:
    figure, axes = new_figure(f"Gain of each kernel over its default, {level}")
    figure.set_size_inches(9, max(3, 0.28 * len(records)))
    places, gains = np.arange(len(records)), [record.gain for record in records]
    finite = [min(gain.high, 10.0) for gain in gains]
    errors = [
        [gain.median - gain.low for gain in gains],
        [max(high - gain.median, 0.0) for high, gain in zip(finite, gains, strict=True)],
    ]
    medians = [gain.median for gain in gains]
    axes.barh(places, [median - 1 for median in medians], left=1, xerr=errors, label="median, 95 % interval")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, [name(record) for record in records], fontsize="small")
    axes.set(xlabel="times faster than the default")
    return save_figure(figure, axes, path)


def ranking(samples: Sequence[Sample], cpu: str, folds: int = 3) -> Mapping[str, float]:
    """Mean rank correlation (Spearman) of predictions with what was measured, of candidates that the model did not see.

    Beside the model's, that of rates alone and that of a random order.
    """
    draw = random.Random(0)
    candidates = sorted({_identity(one) for one in samples})
    draw.shuffle(candidates)
    fold = {one: index % folds for index, one in enumerate(candidates)}
    found: dict[str, list[float]] = {"model": [], "rates": [], "random": []}
    for level, left_out in itertools.product(sorted({one.task.isa for one in samples}), range(folds)):
        known = rates.find(level, cpu)
        model = CostModel(known, [one for one in samples if fold[_identity(one)] != left_out])
        for key in sorted({one.task.key() for one in samples if one.task.isa == level}):
            tested = [one for one in samples if one.task.key() == key and fold[_identity(one)] == left_out]
            if len(tested) < FEWEST_RANKED:
                continue
            (task, default), truth = (tested[0].task, tested[0].default), [one.ratio for one in tested]
            decisions = [one.decisions for one in tested]
            found["model"].append(spearman(model.predict(task, decisions, default), truth))
            found["rates"].append(spearman([by_rates(task, one, default, known) for one in decisions], truth))
            found["random"].append(spearman([draw.random() for _ in tested], truth))
    return {name: statistics.mean(values or [0.0]) for name, values in found.items()}


def _identity(sample: Sample) -> tuple[str, str]:
    """A candidate, whatever the number of tokens."""
    return sample.task.at(0, 1).key(), json.dumps(sample.decisions, sort_keys=True)


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="where to write PNG plots")
    options = parser.parse_args(arguments)
    log = read_log(options.log)
    print(markdown(log))
    ranks = ", ".join(f"{name} {value:.2f}" for name, value in ranking(samples_of(log), options.log.stem).items())
    print(f"Rank correlation of predictions with candidates that the model did not see: {ranks}.\n")
    made = plot(log, options.plots, options.log.stem) if options.plots else []
    for path in made:
        print(f"![{path.stem.replace('_', ' ')}]({path})")
    return made


if __name__ == "__main__":
    main()
