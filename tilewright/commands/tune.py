"""`tilewright tune`: measures what is best for each kernel of a model on a CPU, and keeps it in that CPU's log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tilewright.commands.output import Json, SelfCheck, print_json, print_note, stderr, stdout, table
from tilewright.errors import InvalidInput

if TYPE_CHECKING:
    from tilewright.codegen.model import EncoderModel
    from tilewright.schedules.isa import Isa
    from tilewright.tuning.host import Connect
    from tilewright.tuning.search import Budget, Settings
    from tilewright.tuning.statistics import Gain
    from tilewright.tuning.tasks import Task
    from tilewright.tuning.tune import Session

TRIAL_SECONDS = 2.0
"""What a trial takes, roughly, on two idle cores: most of it is LLVM's."""

_LAST = 0.3, 120.0
"""Of a time budget the share, and the most seconds, that are kept for comparing whole encoders at the end."""


def tune(
    model: Annotated[Path, typer.Argument(help="Quantised Hugging Face directory or QDQ ONNX file.")],
    target: Annotated[str, typer.Option(help="native, or what compile takes, as far as this CPU can run it.")] = "native",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of logs; that of the CPU is added to.")
    ] = Path("tuning_logs"),
    trials: Annotated[int | None, typer.Option(min=1, help="Candidates to try in all.", show_default="64 a workload")] = None,
    time_budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="When to stop: 90s, 20m or 2h.", show_default="20m unless --trials")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that a kernel runs on.")] = 1,
    tokens: Annotated[str, typer.Option(help="Buckets of tokens, multiples of 16.")] = "16,32,128,256",
    rpc_tracker: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure on servers of this TVM RPC tracker, not here.")
    ] = None,
    rpc_key: Annotated[str, typer.Option(metavar="KEY", help="The servers' key.")] = "tilewright",
    accept_disturbed: Annotated[
        bool, typer.Option("--accept-disturbed", help="Believe what was measured while the machine was busy, too.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the candidates that are drawn at random.")] = 0,
    self_check: SelfCheck = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print workloads and the estimated time only.")] = False,
    as_json: Json = False,
) -> None:
    """Tune a quantised model's kernels for the CPU at hand, or for one behind an RPC tracker."""
    from tilewright import frontend
    from tilewright.codegen.pad import pad
    from tilewright.cpu import cpu_features
    from tilewright.schedules.isa import resolve_all
    from tilewright.tuning.search import Budget, Settings

    seconds = None if time_budget is None and trials is not None else parse_time(time_budget or "20m")
    settings = Settings(tokens=parse_tokens(tokens), threads=threads, seed=seed, accept_disturbed=accept_disturbed)
    loaded = pad(frontend.load(model, self_check))
    isas = resolve_all(target, cpu_features())
    if dry_run:
        _dry_run(loaded, target, isas, settings, trials, seconds, as_json)
        return
    kept = 0.0 if seconds is None or rpc_tracker else min(_LAST[0] * seconds, _LAST[1])
    run = _Run(loaded, target, isas, settings, output, rpc_tracker, rpc_key)
    budget = Budget(trials, None if seconds is None else seconds - kept)
    interrupted = False
    try:
        run.search(budget)
    except KeyboardInterrupt:
        interrupted = True
    run.report(as_json, interrupted)
    if interrupted:
        raise KeyboardInterrupt


def parse_time(text: str) -> float:
    """Seconds of 90s, 20m or 2h; raises InvalidInput."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or not float(found[1]):
        raise InvalidInput(f"--time-budget is {text!r}; expected a time such as 90s, 20m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def parse_tokens(text: str) -> tuple[int, ...]:
    """Buckets in ascending order; raises InvalidInput."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) and int(part) % 16 == 0 and int(part) <= 1 << 16 for part in parts):
        raise InvalidInput(f"--tokens is {text!r}; expected multiples of 16 with commas between them, such as 16,128")
    return tuple(sorted({int(part) for part in parts}))


@dataclass
class _Run:
    """What is tuned, and what came of it."""

    model: EncoderModel
    target: str
    isas: tuple[Isa, ...]
    settings: Settings
    output: Path
    tracker: str | None
    key: str
    notes: list[str] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    encoders: dict[str, dict[int, Gain]] = field(default_factory=dict)
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def search(self, budget: Budget) -> None:
        from tilewright.schedules.isa import known_cpu
        from tilewright.tuning.builds import builder
        from tilewright.tuning.cost import samples_of
        from tilewright.tuning.measure import Live
        from tilewright.tuning.records import Log, known_logs, log_name, read_log
        from tilewright.tuning.tune import Session

        with self._connect() as connect, builder() as builds:
            bench = Live(connect, builds, self.notes.append)
            host = bench.reached()
            for isa in self.isas:
                if lacking := sorted(set(isa.features) - host.features):
                    raise InvalidInput(f"{isa.name} cannot be measured on this {host.cpu}, which lacks {', '.join(lacking)}")
            path = self.output / log_name(host.cpu)
            earlier = [sample for log in known_logs(self.output, path) for sample in samples_of(log)]
            cpu = known_cpu(self.target)
            for isa in self.isas:
                base = read_log(path) if path.exists() else Log()
                session = Session(
                    self.model, isa, cpu, host.machine, bench, self.settings, path, base, earlier, self.notes.append
                )  # fmt: skip
                self.sessions.append(session)
                with _progress(session, budget):
                    session.run(budget)
        if self.tracker is None:
            for session in self.sessions:
                self._survive(session)
        else:
            self.notes.append("whole encoders are compared only where the tuner itself runs on the target")

    @contextmanager
    def _connect(self) -> Iterator[Connect]:
        from tilewright.tuning.host import local, remote

        threads = self.settings.threads
        made = local(threads) if self.tracker is None else remote(self.tracker, self.key, threads, self.isas)
        with made as connect:
            yield connect

    def _survive(self, session: Session) -> None:
        """Compare whole encoders; buckets in which the tuned one is not faster get their defaults back."""
        from tilewright.tuning.encoder import compare

        if not any(record.decisions != record.default for record in session.records.values()):
            return
        settings, isa = self.settings, session.isa.name
        target = self.target if len(self.isas) == 1 else isa
        with stderr().status(f"{isa}: comparing whole encoders ..."):
            found = dict(compare(self.model, target, session.path, settings.tokens, settings.threads))
            lost = [tokens for tokens, gain in found.items() if gain.median < 1.0]
            for tokens in lost:
                session.drop(tokens)
                self.notes.append(f"{isa}: at {tokens} tokens the whole encoder was not faster; its records are dropped")
        self.encoders[isa], self.dropped[isa] = found, lost

    def report(self, as_json: bool, interrupted: bool) -> None:
        """Print what came of it."""
        from tilewright.tuning.tune import report

        rows = {session.isa.name: report(session) for session in self.sessions}
        encoders = {
            isa: {
                str(tokens): {"gain": gain.median, "low": gain.low, "high": _finite(gain.high)}
                for tokens, gain in found.items()
            }
            for isa, found in self.encoders.items()
        }
        logs = sorted({str(session.path) for session in self.sessions if session.records})
        if as_json:
            print_json(
                {
                    "logs": logs,
                    "levels": rows,
                    "encoders": encoders,
                    "dropped": self.dropped,
                    "notes": self.notes,
                    "interrupted": interrupted,
                }
            )
            return
        for isa, found in rows.items():
            stdout().print(f"level {isa}")
            _print_rows(found)
            for tokens, gain in encoders.get(isa, {}).items():
                stdout().print(
                    f"whole encoder at {tokens} tokens: {gain['gain']:.3f}x ({gain['low']:.3f}-{gain['high'] or 0:.3f})"
                )
        for note in dict.fromkeys(self.notes):
            print_note(note)
        stdout().print(f"{'interrupted; ' if interrupted else ''}records are in {', '.join(logs) or 'no log'}", markup=False)


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _print_rows(rows: list[dict[str, Any]]) -> None:
    grid = table("workload", "tokens", "share", "trials", "us", "default us", "gain", "95 %", "peak", "default")
    for row in rows:
        grid.add_row(
            row["workload"],
            str(row["tokens"]),
            f"{row['share']:.0%}",
            f"{row['trials']}/{row['candidates'] - 1}",
            f"{row['microseconds']:.1f}",
            f"{row['default_microseconds']:.1f}",
            f"{row['gain']:.3f}",
            f"{row['low']:.2f}-{row['high']:.2f}",
            f"{row['peak']:.0%}",
            f"{row['default_peak']:.0%}",
        )
    stdout(at_least=110).print(grid)


@contextmanager
def _progress(session: Session, budget: Budget) -> Iterator[None]:
    """A line that says which workload is being tuned, what was found for the last, and how long it may take."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("trials"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task(session.isa.name, total=None, left="")
        last = ""

        def begins(task: Task) -> None:
            limit = session.settings.limit * len(session.tasks)
            total = limit if budget.trials is None else min(limit, budget.trials)
            shown.update(bar, completed=budget.spent, total=total, left=_left(budget, total), description=f"{task.name}{last}")

        def found() -> None:
            nonlocal last
            record = list(session.records.values())[-1]
            last = f" (last {record.gain.median:.2f}x default, {record.peak[0]:.0%} of peak)"

        session.progress, session.changed = begins, found
        with suppress(GeneratorExit):
            yield


def _left(budget: Budget, total: int) -> str:
    """Until the trials or the time are spent, whichever is expected to be first."""
    gone = budget.clock() - budget.started
    ends = [] if budget.seconds is None else [budget.seconds - gone]
    if budget.spent:
        ends.append(gone / budget.spent * (total - budget.spent))
    return f"{max(min(ends), 0) / 60:.0f} min left" if ends else ""


def _dry_run(
    model: EncoderModel,
    target: str,
    isas: tuple[Isa, ...],
    settings: Settings,
    trials: int | None,
    seconds: float | None,
    as_json: bool,
) -> None:
    from tilewright.codegen.layer_kernels import layer_kernels
    from tilewright.schedules.choice import plan
    from tilewright.schedules.isa import known_cpu
    from tilewright.tuning.tasks import tasks_of

    levels, wanted = {}, 0
    for isa in isas:
        tasks = tasks_of(layer_kernels(model, plan(model, isa, known_cpu(target))))
        wanted += sum(min(settings.limit, len(task.space) - 1) for task in tasks)
        levels[isa.name] = [
            {"workload": task.name, "key": task.kernel.workload.key(), "calls": task.calls, "candidates": len(task.space)}
            for task in tasks
        ]
    made = wanted if trials is None else min(wanted, trials)
    needed = made * TRIAL_SECONDS
    estimate = needed if seconds is None else min(needed, seconds)
    if as_json:
        print_json({"levels": levels, "tokens": list(settings.tokens), "trials": made, "seconds": estimate})
        return
    for isa_name, rows in levels.items():
        stdout().print(f"level {isa_name}")
        grid = table("workload", "calls", "candidates")
        for row in rows:
            grid.add_row(str(row["workload"]), str(row["calls"]), str(row["candidates"]))
        stdout().print(grid)
    stdout().print(f"{made} trials at {', '.join(map(str, settings.tokens))} tokens: about {estimate / 60:.0f} minutes")
