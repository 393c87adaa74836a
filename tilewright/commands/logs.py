"""`tilewright logs`: looking at tuning logs, joining them, and keeping them true."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.commands.output import Json, print_json, stdout, table

if TYPE_CHECKING:
    from tilewright.tuning.records import Record

LogFile = Annotated[Path, typer.Argument(help="Tuning log, a .jsonl file.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", show_default="the log itself")]


def show(log: LogFile, as_json: Json = False) -> None:
    """Show what a log says of each workload and bucket of tokens."""
    from tilewright.tuning.records import read_log

    held = read_log(log)
    if as_json:
        machines = {name: machine.facts for name, machine in held.machines.items()}
        print_json({"machines": machines, "records": [_row(record) for record in held.records.values()]})
        return
    for name, machine in held.machines.items():
        facts = ", ".join(f"{key} {value}" for key, value in machine.facts.items())
        stdout().print(f"machine {name}: {facts}", markup=False, soft_wrap=True)
    grid = table("workload", "gain", "95 %", "peak", "default", "trials", "decides otherwise")
    for row in map(_row, held.records.values()):
        changes = ", ".join(f"{name}={_short(value)}" for name, value in row["changes"].items()) or "-"
        interval = f"{row['low']:.2f}-{row['high']:.2f}"
        cells = f"{row['gain']:.3f}", interval, f"{row['peak']:.0%}", f"{row['default_peak']:.0%}", str(row["trials"])
        grid.add_row(row["key"], *cells, changes)
    stdout(at_least=160).print(grid)
    if held.foreign:
        stdout().print(f"{len(held.foreign)} lines of other versions")


def merge(
    logs: Annotated[list[Path], typer.Argument(help="Tuning logs of one CPU.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; may be one of them.")],
    as_json: Json = False,
) -> None:
    """Join logs: of two records of one workload, that of the larger paired gain is kept."""
    from tilewright.tuning.records import Log, read_log

    merged = Log()
    for path in logs:
        merged = merged.merged(read_log(path))
    merged.write(output)
    _tell({"output": str(output), "records": len(merged.records)}, f"{output}: {len(merged.records)} records", as_json)


def diff(left: LogFile, right: LogFile, as_json: Json = False) -> None:
    """Show which workloads only one of two logs knows, and which they decide otherwise."""
    from tilewright.tuning.records import read_log

    one, other = read_log(left), read_log(right)
    found = {
        "only_left": sorted(one.records.keys() - other.records.keys()),
        "only_right": sorted(other.records.keys() - one.records.keys()),
        "differing": {
            key: {"left": _row(one.records[key]), "right": _row(other.records[key])}
            for key in sorted(one.records.keys() & other.records.keys())
            if one.records[key].decisions != other.records[key].decisions
        },
    }
    if as_json:
        print_json(found)
        return
    for name, keys in (("only in " + str(left), found["only_left"]), ("only in " + str(right), found["only_right"])):
        for key in keys:
            stdout().print(f"{name}: {key}", markup=False, soft_wrap=True)
    for key in found["differing"]:
        a, b = one.records[key], other.records[key]
        text = f"decided otherwise: {key}: {a.gain.median:.3f}x {_changes(a)}, {b.gain.median:.3f}x {_changes(b)}"
        stdout().print(text, markup=False, soft_wrap=True)
    alike = len(one.records.keys() & other.records.keys()) - len(found["differing"])
    stdout().print(f"{alike} alike")


def prune(log: LogFile, output: Output = None, as_json: Json = False) -> None:
    """Remove the records that no compile uses any more, with the reason for each, and lines of other versions."""
    from collections import Counter

    from tilewright.commands.output import progress_bar
    from tilewright.tuning.records import Log, read_log
    from tilewright.tuning.replay import Stale
    from tilewright.tuning.verify import still_valid

    held, kept, reasons = read_log(log), {}, Counter[str]()
    with progress_bar("records") as progress:
        for done, (key, record) in enumerate(held.records.items()):
            progress(done, len(held.records))
            if isinstance(found := still_valid(record), Stale):
                reasons[found.reason] += 1
            else:
                kept[key] = record
    if held.foreign:
        reasons["schema"] += len(held.foreign)
    used = {record.machine for record in kept.values()}
    Log(kept, {name: machine for name, machine in held.machines.items() if name in used}).write(output or log)
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none stale"
    _tell({"kept": len(kept), "removed": dict(reasons)}, f"{output or log}: {len(kept)} records kept; {told}", as_json)


def verify(
    log: LogFile,
    threads: Annotated[int, typer.Option(min=1, help="Verify the records of so many threads.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure the records of a log again on this machine, on random matrices of their density."""
    from tilewright.commands.output import progress_bar
    from tilewright.tuning.builds import builder
    from tilewright.tuning.host import local
    from tilewright.tuning.measure import Live
    from tilewright.tuning.records import read_log
    from tilewright.tuning.verify import verify as measure

    held = read_log(log)
    with local(threads) as connect, builder() as builds, progress_bar("records") as progress:
        verdicts = measure(held, Live(connect, builds), threads, progress)
    rows = [
        {
            "key": one.record.key,
            "recorded": one.record.gain.median,
            "gain": one.now and one.now.median,
            "low": one.now and one.now.low,
            "high": one.now and one.now.high,
            "confirmed": one.confirmed,
            "reason": one.reason,
        }
        for one in verdicts
    ]
    if as_json:
        print_json({"records": rows})
        return
    grid = table("workload", "recorded", "now", "95 %", "")
    for row, one in zip(rows, verdicts, strict=True):
        now = ("", "") if one.now is None else (f"{one.now.median:.3f}", f"{one.now.low:.2f}-{one.now.high:.2f}")
        grid.add_row(str(row["key"]), f"{row['recorded']:.3f}", *now, one.reason or ("" if one.confirmed else "slower"))
    stdout(at_least=140).print(grid)


def _tell(value: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        stdout().print(text, markup=False, soft_wrap=True)


def _row(record: Record) -> dict[str, Any]:
    gain = record.gain
    return {
        "key": record.key,
        "gain": gain.median,
        "low": gain.low,
        "high": gain.high,
        "peak": record.peak[0],
        "default_peak": record.peak[1],
        "trials": len(record.trials),
        "changes": _changes(record),
        "machine": record.machine,
    }


def _changes(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.decisions.items() if record.default.get(name) != value}


def _short(value: Any) -> str:
    return "x".join(map(_short, value)) if isinstance(value, list) else str(value)
