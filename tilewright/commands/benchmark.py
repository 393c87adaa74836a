"""`tilewright benchmark`: latency of an artifact, beside ONNX Runtime's if wanted, and where the time goes."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.commands.output import IsaLevel, Json, Threads, print_json, stderr, stdout, table
from tilewright.commands.throughput import Goal, search
from tilewright.errors import InvalidInput

if TYPE_CHECKING:
    from tilewright.engine import Engine

_OURS, _BASELINE = "tilewright", "onnxruntime"


def benchmark(
    artifact: Annotated[Path, typer.Argument(help="Directory that `tilewright compile` wrote.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a call.")] = 1,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 128,
    threads: Threads = None,
    isa: IsaLevel = None,
    duration: Annotated[float, typer.Option(min=0.0, help="Seconds of timed calls, for each engine.")] = 3.0,
    baseline: Annotated[str | None, typer.Option(help="Engine to compare with: onnxruntime.")] = None,
    baseline_model: Annotated[Path | None, typer.Option(help="ONNX file that the baseline runs.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Time every kernel.")] = False,
    latency_bound: Annotated[
        str | None,
        typer.Option(help="Search batch, instances and threads for the highest throughput within this latency, as 10ms."),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="Cores that the search may use.", show_default="the cores available")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch of the search.")] = 8,
    percentile: Annotated[float, typer.Option(min=0, max=100, help="Percentile of latency that must keep the bound.")] = 99,
    as_json: Json = False,
) -> None:
    """Measure an artifact on random token ids; a baseline runs in turns with it.

    With --latency-bound, find the highest throughput of several instances side by side.
    """
    if latency_bound is not None:
        if baseline or baseline_model or profile or threads or batch != 1:
            raise InvalidInput("--latency-bound chooses batch and threads itself and takes no baseline or profile; drop these")
        search(artifact, isa, Goal(latency_bound, percentile, cores, max_batch, seq_len, duration), as_json)
        return
    if cores is not None:
        raise InvalidInput("--cores is for --latency-bound; give --threads to measure one setting")
    reference = _baseline_model(baseline, baseline_model)
    from tilewright.engine import load

    engine = load(artifact, threads, isa)
    with stderr().status("measuring ..."):
        result: dict[str, Any] = {"artifact": str(artifact), "isa": engine.level.name}
        if reference is None:
            result[_OURS] = dataclasses.asdict(engine.benchmark(batch, seq_len, duration=duration))
        else:
            result |= _compare(engine, reference, batch, seq_len, duration)
        if profile:
            result["kernels"] = _profile(engine, batch, seq_len)
    if as_json:
        print_json(result)
    else:
        _print(result)


def _baseline_model(baseline: str | None, model: Path | None) -> Path | None:
    if baseline not in (None, _BASELINE):
        raise InvalidInput(f"baseline {baseline} is unknown; choose {_BASELINE}")
    if baseline and model is None:
        raise InvalidInput(
            f"--baseline {baseline} needs --baseline-model FILE.onnx, the same model as torch.onnx.export writes it"
        )
    return model


def _compare(engine: Engine, model: Path, batch: int, seq_len: int, duration: float) -> dict[str, Any]:
    from tilewright.baseline import OnnxRuntime, time_in_turns
    from tilewright.measure import random_ids, summarize

    ids, session = random_ids(engine.manifest.limits.vocab_size, batch, seq_len), OnnxRuntime(model, engine.num_threads)
    samples = time_in_turns({_OURS: lambda: engine(ids), _BASELINE: lambda: session(ids)}, duration)
    results = {name: dataclasses.asdict(summarize(s, batch, seq_len, engine.num_threads)) for name, s in samples.items()}
    return {
        **results,
        "ratio": results[_OURS]["p50"] / results[_BASELINE]["p50"],
        "baseline_model": str(model),
        "baseline_version": version(_BASELINE),
    }


def _profile(engine: Engine, batch: int, seq_len: int) -> list[dict[str, Any]]:
    from tilewright.measure import random_ids

    times = engine.profile({"input_ids": random_ids(engine.manifest.limits.vocab_size, batch, seq_len)})
    total = sum(kernel.microseconds for kernel in times)
    return [{**dataclasses.asdict(kernel), "share": kernel.microseconds / total} for kernel in times]


def _print(result: dict[str, Any]) -> None:
    console, ours = stdout(), result[_OURS]
    size = f"batch {ours['batch']} x {ours['seq_len']} tokens, {ours['threads']} thread(s)"
    console.print(f"{result['artifact']} ({result['isa']}): {size}", markup=False)
    grid = table("engine", "median ms", "p90", "p99", "sequences/s", "calls")
    for name in (_OURS, _BASELINE):
        if name in result:
            row = result[name]
            values = (f"{row[key]:.2f}" for key in ("p50", "p90", "p99"))
            grid.add_row(name, *values, f"{row['throughput']:.1f}", str(row["iterations"]))
    console.print(grid)
    if "ratio" in result:
        console.print(
            f"{result['ratio']:.3f} of the time of ONNX Runtime {result['baseline_version']} on {result['baseline_model']}",
            markup=False,
        )
    if "kernels" in result:
        grid = table("kernel", "calls", "us", "share")
        for kernel in result["kernels"]:
            grid.add_row(kernel["name"], str(kernel["calls"]), f"{kernel['microseconds']:.0f}", f"{kernel['share']:.1%}")
        console.print(grid)
