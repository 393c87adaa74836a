"""`tilewright benchmark --latency-bound`: the highest throughput of several instances within a latency."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.commands.output import print_json, stderr, stdout, table
from tilewright.cpu import available_cores
from tilewright.errors import InvalidInput

if TYPE_CHECKING:
    from tilewright.instances import Instances, Memory
    from tilewright.throughput import Trial


@dataclass(frozen=True)
class Goal:
    """What to search for, and how long to measure each setting (seconds); `cores` None means all available."""

    latency_bound: str
    percentile: float
    cores: int | None
    max_batch: int
    seq_len: int
    duration: float


def search(artifact: Path, isa: str | None, goal: Goal, as_json: bool) -> None:
    """Search and print; raises InvalidInput for a bound or cores that make no sense, and what loading raises."""
    from tilewright.throughput import best, parse_bound

    bound = parse_bound(goal.latency_bound)
    available = sorted(os.sched_getaffinity(0))[: available_cores()]
    if goal.cores is not None and goal.cores > len(available):
        raise InvalidInput(f"--cores {goal.cores} is more than the {len(available)} available; give at most {len(available)}")
    trials, memory = run_trials(artifact, isa, goal, bound, available[: goal.cores])
    chosen = best(trials, bound)
    result = {
        "artifact": str(artifact),
        "latency_bound_ms": bound,
        "percentile": goal.percentile,
        "cores": goal.cores or len(available),
        "seq_len": goal.seq_len,
        "best": None if chosen is None else _row(chosen),
        "smallest_latency": _row(min(trials, key=lambda trial: trial.latency)),
        "trials": [_row(trial) | {"within_bound": trial.latency <= bound} for trial in trials],
        "memory": memory,
    }
    if as_json:
        print_json(result)
    else:
        _print(result)


def run_trials(
    artifact: Path, isa: str | None, goal: Goal, bound: float, cores: list[int]
) -> tuple[list[Trial], dict[str, Any] | None]:
    """All trials, and the memory of as many instances as there are cores."""
    from tilewright.instances import Instances
    from tilewright.throughput import Setting, climb, summarize_instances, thread_counts

    trials: list[Trial] = []
    memory: dict[str, Any] | None = None
    with stderr().status("starting ...") as status:
        for threads in thread_counts(len(cores)):
            with Instances(artifact, isa) as instances:

                def measure(setting: Setting, instances: Instances = instances) -> Trial:
                    name = f"{setting.instances} x {setting.threads} thread(s), batch {setting.batch}"
                    status.update(f"measuring {name} ...")
                    samples = instances.measure(setting.instances, setting.batch, goal.seq_len, goal.duration)
                    trial = summarize_instances(setting, samples, goal.percentile)
                    status.console.print(f"{name}: {trial.latency:.2f} ms, {trial.throughput:.1f} sequences/s", style="dim")
                    return trial

                status.update(f"starting {len(cores) // threads} x {threads} thread(s) ...")
                own = [cores[first : first + threads] for first in range(0, len(cores) - threads + 1, threads)]
                if memory is None:
                    memory = _memory(instances, own, goal.seq_len)
                else:
                    instances.start(own)
                trials += climb(threads, len(cores), goal.max_batch, bound, measure)
    return trials, memory


def _memory(instances: Instances, cores: list[list[int]], seq_len: int) -> dict[str, Any]:
    """Start instances on `cores`, the first alone; what it occupies, and what each further one adds."""

    def occupied() -> list[Memory]:
        instances.measure(len(instances.pids), 1, seq_len, 0.0)  # touch the weights
        found: list[Memory] = instances.memory()
        return found

    instances.start(cores[:1])
    (alone,) = occupied()
    instances.start(cores[1:])
    together = occupied()
    further = len(together) - 1
    grown = sum(memory.proportional for memory in together) - alone.proportional
    return {
        "instances": len(together),
        "weights_bytes": max(memory.weights for memory in together),
        "weights_copied_bytes": sum(memory.weights_copied for memory in together),
        "first_instance_bytes": alone.proportional,
        "further_instance_bytes": round(grown / further) if further else None,
        "private_bytes": [memory.private for memory in together],
        "proportional_bytes": [memory.proportional for memory in together],
    }


def _row(trial: Trial) -> dict[str, Any]:
    row = dataclasses.asdict(trial)
    return {**row.pop("setting"), "latency_ms": row.pop("latency"), **row}


def _print(result: dict[str, Any]) -> None:
    console, name = stdout(), f"p{result['percentile']:g}"
    bound, best, least = result["latency_bound_ms"], result["best"], result["smallest_latency"]
    size = f"{result['seq_len']} tokens, {result['cores']} core(s), {name} within {bound:g} ms"
    console.print(f"{result['artifact']}: {size}", markup=False)
    grid = table("threads", "instances", "batch", f"{name} ms", "sequences/s", "within", left=0)
    for row in result["trials"]:
        values = (str(row[key]) for key in ("threads", "instances", "batch"))
        mark = (
            "best"
            if row["within_bound"] and best == {key: row[key] for key in best}
            else ("yes" if row["within_bound"] else "no")
        )
        grid.add_row(*values, f"{row['latency_ms']:.2f}", f"{row['throughput']:.1f}", mark)
    console.print(grid)
    if best is None:
        console.print(f"nothing keeps {bound:g} ms; the smallest {name} is {least['latency_ms']:.2f} ms, with {_name(least)}")
    else:
        console.print(f"best: {best['throughput']:.1f} sequences/s, {name} {best['latency_ms']:.2f} ms, with {_name(best)}")
    memory = result["memory"]
    line = f"memory: {_mb(memory['first_instance_bytes'])} for one instance, of which weights {_mb(memory['weights_bytes'])}"
    if memory["further_instance_bytes"] is not None:
        line += f"; {_mb(memory['further_instance_bytes'])} for each further one, which shares the weights"
    console.print(line)


def _name(row: dict[str, Any]) -> str:
    return f"{row['instances']} instance(s) of {row['threads']} thread(s) and batch {row['batch']}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
