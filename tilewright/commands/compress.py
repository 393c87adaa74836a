"""`tilewright compress` and `tilewright recipes`: recipes, from the dense model to the artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tilewright.commands.output import Json, print_json, print_note, stderr, stdout, table
from tilewright.errors import InvalidInput

if TYPE_CHECKING:
    from tilewright.pipeline.recipe.estimate import Estimate
    from tilewright.pipeline.recipe.run import StepRecord
    from tilewright.pipeline.recipe.schema import Recipe
    from tilewright.pipeline.recipe.steps import Watcher

PLOT = "compress.png"


def compress(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that comes along (tilewright recipes list).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with estimated time and memory.")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: model=DIR, steps.1.sparsity=0.7.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress a model by a recipe: train, prune, distil, quantise, evaluate, compile."""
    parsed, root = _find(recipe, change or [])
    if dry_run:
        _print_plan(parsed, root, output, as_json)
        return
    from tilewright.pipeline.recipe.plot import plot
    from tilewright.pipeline.recipe.run import compress as run

    with _watched() as watcher:
        records = run(parsed, root, output, resume=resume, watcher=watcher)
    picture = plot(records, output / PLOT)
    if as_json:
        print_json({"run": str(output), "plot": str(picture), "steps": [dataclasses.asdict(record) for record in records]})
        return
    _print_records(records)
    stdout().print(f"{output}: plot in {picture}", markup=False, soft_wrap=True)


def list_recipes(as_json: Json = False) -> None:
    """List the recipes that come along."""
    from tilewright.pipeline.recipe.recipes import shipped
    from tilewright.pipeline.recipe.schema import parse_recipe

    found = {name: parse_recipe(text, name) for name, text in shipped().items()}
    if as_json:
        print_json([{"name": name, "task": recipe.task, "description": recipe.description} for name, recipe in found.items()])
        return
    grid = table("recipe", "task", "description", left=3)
    for name, recipe in found.items():
        grid.add_row(name, recipe.task, recipe.description)
    stdout().print(grid)


def show_recipe(name: Annotated[str, typer.Argument(help="Name of a recipe.")]) -> None:
    """Print a recipe, to be changed and given to compress."""
    print(_shipped_text(name), end="")


def _shipped_text(name: str) -> str:
    from tilewright.pipeline.recipe.recipes import shipped

    found = shipped()
    if name not in found:
        raise InvalidInput(f"recipe {name} is no file and does not come along; give a file or one of {', '.join(found)}")
    return found[name]


def _find(recipe: str, changes: Sequence[str]) -> tuple[Recipe, Path]:
    """The recipe, and the directory to which its paths are relative."""
    from tilewright.pipeline.recipe.schema import parse_recipe, read_recipe

    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return read_recipe(path, changes), path.parent
    return parse_recipe(_shipped_text(recipe), recipe, changes), Path()


def _print_plan(recipe: Recipe, root: Path, output: Path, as_json: bool) -> None:
    from tilewright.pipeline.recipe.estimate import estimate

    with _watched() as watcher:
        steps = estimate(recipe, root, output, watcher)
    if as_json:
        print_json({"run": str(output), "steps": [dataclasses.asdict(step) for step in steps]})
        return
    grid = table("step", "does", "estimated", "memory GB", left=2)
    for number, step in enumerate(steps):
        memory = "-" if step.memory is None else f"{step.memory / 1e9:.1f}"
        grid.add_row(f"{number} {step.name}", step.what, _duration(step), memory)
    stdout().print(grid)
    total = sum(step.seconds or 0 for step in steps)
    stdout().print(f"{output}: about {_time(total)}, compiling and evaluating aside", markup=False)


def _duration(step: Estimate) -> str:
    if step.done:
        return "done"
    return "-" if step.seconds is None else _time(step.seconds)


def _time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _print_records(records: Sequence[StepRecord]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    grid = table("step", *names, "zeros", "time")
    for number, record in enumerate(records):
        metrics = (f"{record.metrics[name]:.4g}" if name in record.metrics else "" for name in names)
        zeros = "" if record.sparsity is None else f"{record.sparsity:.1%}"
        grid.add_row(f"{number} {record.name}", *metrics, zeros, _time(record.seconds))
    stdout().print(grid)
    for record in records:
        for note in record.notes:
            print_note(f"{record.name}: {note}")


@contextmanager
def _watched() -> Iterator[Watcher]:
    """A watcher that shows one line of progress on a terminal, and nothing elsewhere."""
    from tilewright.pipeline.recipe.steps import Watcher

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        class Shown(Watcher):
            def training(self, progress: Any) -> None:
                text = f"step {progress.step}/{progress.total}  loss {progress.loss:.4f}  "
                text += f"sparsity {progress.sparsity:.1%}  {_time(progress.seconds_left)} left"
                bar.update(task, description=text, completed=progress.step, total=progress.total)

            def work(self, what: str, done: int, total: int) -> None:
                bar.update(task, description=what, completed=done, total=total)

        yield Shown()
