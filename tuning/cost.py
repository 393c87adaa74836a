"""Which candidates to try first: by an XGBoost model of trials, shared by all workloads, or predicted rates before that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.decisions import Storage
from tilewright.codegen.workload import Workload
from tilewright.schedules.rates import LevelRates
from tilewright.tuning.features import Features, changes, features
from tilewright.tuning.records import Log, Values

FEWEST = 24
"""Trials from which on the model is asked."""

CHANGE = 0.001
"""What a changed decision is taken to cost, so that of those that rates cannot tell apart the fewest changes come first."""


@dataclass(frozen=True)
class Sample:
    """A trial of a workload: its seconds over the default's are `ratio`."""

    task: Workload
    decisions: Values
    default: Values
    ratio: float


def samples_of(log: Log) -> list[Sample]:
    """The trials that a log holds."""
    found = []
    for key, record in log.records.items():
        task = Workload.parse(key)
        found += [Sample(task, record.default | one.changes, record.default, one.ratio) for one in record.trials]
    return found


class CostModel:
    """Predicts the logarithm of a candidate's ratio: by rates, and trees that learn what rates do not know; deterministic."""

    def __init__(self, rates: LevelRates | None, earlier: Iterable[Sample] = (), seed: int = 0) -> None:
        """rates: to start from. earlier: trials of earlier runs and of other CPUs."""
        self._rates, self._seed = rates, seed
        self._samples = list(earlier)
        self._fitted: tuple[Any, list[str], int] | None = None

    def add(self, samples: Iterable[Sample]) -> None:
        """Learn from these, too."""
        self._samples += samples

    def predict(self, task: Workload, decisions: Sequence[Values], default: Values) -> NDArray[np.float64]:
        """f64[n]: the logarithm of what each of `decisions` is expected to take over the default."""
        prior = np.array([predicted(task, made, default, self._rates) for made in decisions])
        if len(self._samples) < FEWEST:
            return prior
        model, names = self._fit()
        import xgboost

        rows = xgboost.DMatrix(_matrix([features(task, made, default) for made in decisions], names))
        found: NDArray[np.float64] = prior + model.predict(rows)
        return found

    def _fit(self) -> tuple[Any, list[str]]:
        import xgboost

        if self._fitted is None or self._fitted[2] != len(self._samples):
            rows = [features(one.task, one.decisions, one.default) for one in self._samples]
            names = sorted({name for row in rows for name in row})
            # a few wild candidates must not be all that the model fits
            costs = np.clip([math.log(one.ratio) for one in self._samples], -3.0, 3.0)
            targets = costs - [predicted(one.task, one.decisions, one.default, self._rates) for one in self._samples]
            settings = {"max_depth": 3, "eta": 0.1, "lambda": 10, "subsample": 0.8, "nthread": 1, "seed": self._seed}
            model = xgboost.train(settings, xgboost.DMatrix(_matrix(rows, names), targets), num_boost_round=60)
            self._fitted = model, names, len(self._samples)
        return self._fitted[0], self._fitted[1]


def predicted(task: Workload, decisions: Values, default: Values, rates: LevelRates | None) -> float:
    """The logarithm of the expected ratio by the table of rates, which knows storages, and the number of changes."""
    return by_rates(task, decisions, default, rates) + CHANGE * changes(decisions, default)


def by_rates(task: Workload, decisions: Values, default: Values, rates: LevelRates | None) -> float:
    """The logarithm of the expected ratio by the table of rates alone; 0 where it does not know a storage."""
    if rates is None or "storage" not in decisions:
        return 0.0
    cycles = []
    for values in (decisions, default):
        held = values["storage"]
        rate = rates.of(Storage(held["family"], held["block"] and (held["block"][0], held["block"][1])))
        if rate is None:
            return 0.0
        density = task.density / 100 if held["block"] else 1.0
        head = task.epilogue.partition("@")[0].partition(">")[0]
        kind: Any = head if head in ("qkv", "add_norm") else "activate"
        cycles.append(rate.cycles(task.n, task.k, density, kind))
    return math.log(cycles[0] / cycles[1])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks, ties sharing theirs; 0 where one of them is constant."""
    left, right = (ranks - ranks.mean() for ranks in (_ranks(np.asarray(values, float)) for values in (a, b)))
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    ranks: NDArray[np.float64] = (starts + (counts - 1) / 2)[where]
    return ranks


def _matrix(rows: Sequence[Features], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[row.get(name, math.nan) for name in names] for row in rows])
