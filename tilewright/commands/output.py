"""What all verbs print with: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
IsaLevel = Annotated[
    str | None,
    typer.Option("--isa", help="ISA level of the artifact to run.", show_default="TILEWRIGHT_ISA, else the best here"),
]
SelfCheck = Annotated[
    bool,
    typer.Option("--self-check/--no-self-check", help="Run an ONNX graph beside the model read from it; refuse differences."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to run on.", show_default="the cores available")]

_PIPE_WIDTH = 120  # columns where the output is no terminal, whose width rich would take to be 80


def stdout(at_least: int = 0) -> Console:
    """The console for results; a terminal narrower than `at_least` columns breaks the lines itself."""
    console = Console(highlight=False)
    piped = not console.is_terminal and "COLUMNS" not in os.environ
    console.width = max(_PIPE_WIDTH if piped else console.width, at_least)
    return console


def stderr() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True, highlight=False)


def fail(message: str, code: int) -> typer.Exit:
    """Print `message` on one line of stderr; raise what this returns."""
    printable = message.encode("utf-8", "backslashreplace").decode()  # names from files may hold halves of characters
    stderr().print(f"error: {' '.join(printable.split())}", markup=False, soft_wrap=True)
    return typer.Exit(code)


def print_json(value: Any) -> None:
    """Print `value` on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_note(text: str) -> None:
    """Print one remark below a result, whole words to a line."""
    stdout().print(f"note: {text}", markup=False, style="dim")


def table(*columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns hold text and the others numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right")
    return made


def block_name(block: tuple[int, int] | None) -> str:
    """4x1 for (4, 1); dense for None."""
    return "dense" if block is None else f"{block[0]}x{block[1]}"


@contextmanager
def stages(seconds: dict[str, float]) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with each stage's name as it begins; fills in how long each took in all."""
    console = stderr()
    current: list[tuple[str, float]] = []

    def finish() -> None:
        for name, started in current:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        current.clear()

    with console.status("") as status:

        def begin(name: str) -> None:
            finish()
            current.append((name, time.perf_counter()))
            status.update(f"{name} ...")

        yield begin
    finish()


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with the work done and its total; the bar is gone afterwards."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
