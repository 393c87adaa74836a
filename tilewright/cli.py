"""The `tilewright` command: its verbs, and how errors reach the user."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tilewright.commands import (
    benchmark,
    compile,
    compress,
    data,
    evaluate,
    export,
    hardware,
    inspect,
    logs,
    pack,
    provenance,
    quantize,
    run,
    serve,
    tune,
)
from tilewright.commands.output import fail
from tilewright.errors import TilewrightError

_EXTRAS = (
    {"onnxruntime": "bench"}
    | dict.fromkeys(("pydantic", "safetensors", "tvm", "tvm_ffi"), "compile")
    | dict.fromkeys(("cloudpickle", "psutil", "tornado", "xgboost"), "tune")
    | dict.fromkeys(("accelerate", "matplotlib", "onnx", "torch", "torchmetrics", "transformers", "yaml"), "pipeline")
    | dict.fromkeys(("fastapi", "prometheus_client", "starlette", "uvicorn"), "serve")
)
"""Optional package to the extra that installs it."""


class _Verbs(TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit status; anything else is a bug with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _interrupts():
                return super().invoke(ctx)
        except TilewrightError as error:
            raise fail(str(error), error.exit_code) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                raise
            raise fail(f"this needs the package {package}; pip install 'tilewright[{_EXTRAS[package]}]'", 3) from None
        except BrokenPipeError:  # the reader of our output left, as `head` does
            raise
        except OSError as error:
            raise fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2) from None


@contextmanager
def _interrupts() -> Iterator[None]:
    """Let Ctrl-C surface as KeyboardInterrupt, whatever it is made of on its way out.

    One that strikes in Python code called by the compiler arrives as a RuntimeError, and one that kills the linker as a
    failed link.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


app = typer.Typer(
    name="tilewright",
    cls=_Verbs,
    help="Compile compressed transformer encoders (block-sparse, INT8) into fast modules for x86 CPUs, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect.inspect)
app.command("quantize")(quantize.quantize)
app.command("pack")(pack.pack)
app.command("compress")(compress.compress)
app.command("export")(export.export)
app.command("compile")(compile.compile)
app.command("tune")(tune.tune)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("benchmark")(benchmark.benchmark)
app.command("evaluate")(evaluate.evaluate)
app.command("provenance")(provenance.provenance)
app.command("check-hardware")(hardware.check_hardware)

_recipes = typer.Typer(help="Recipes that come along.", no_args_is_help=True)
_recipes.command("list")(compress.list_recipes)
_recipes.command("show")(compress.show_recipe)
app.add_typer(_recipes, name="recipes")

_logs = typer.Typer(help="Tuning logs.", no_args_is_help=True)
for _verb in (logs.show, logs.merge, logs.diff, logs.prune, logs.verify):
    _logs.command()(_verb)
app.add_typer(_logs, name="logs")

_data = typer.Typer(help="Public data sets.", no_args_is_help=True)
_data.command("squad")(data.squad)
app.add_typer(_data, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tilewright {version('tilewright')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; exits with 0, 2 (usage or bad input), 3 (unsupported), 4 (artifact unusable) or 130 (Ctrl-C)."""
    app()
