"""`tilewright inspect`: what is in a model and what would run sparse, or what is in an artifact."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.commands.output import Json, SelfCheck, block_name, print_json, print_note, stdout, table
from tilewright.errors import InvalidInput
from tilewright.manifest import MANIFEST

if TYPE_CHECKING:
    from tilewright.codegen.model import Head
    from tilewright.codegen.plan import LayerPlan, LinearPlan
    from tilewright.frontend import ModelReport


def inspect(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory, ONNX file or artifact.")],
    target: Annotated[str, typer.Option(help="What to plan a model for, as for compile, but one.")] = "native",
    self_check: SelfCheck = True,
    as_json: Json = False,
) -> None:
    """Show a model's layers, their density per block shape, and the kernel each would run with; or an artifact's levels."""
    if (model / MANIFEST).is_file():
        if target != "native":
            raise InvalidInput(f"--target {target} was given; {model} is an artifact, compiled already; leave --target out")
        _inspect_artifact(model, as_json)
        return
    from tilewright import frontend
    from tilewright.codegen.pad import pad
    from tilewright.cpu import cpu_features
    from tilewright.schedules.choice import plan
    from tilewright.schedules.isa import known_cpu, resolve

    isa = resolve(target, cpu_features())
    loaded = frontend.load(model, self_check)
    padded = pad(loaded)
    report = frontend.report(replace(loaded, notes=padded.notes))
    plans = [linear for layer in plan(padded, isa, known_cpu(target)).layers for linear in _per_linear(layer)]
    if as_json:
        print_json(_as_json(model, isa.name, report, plans))
    else:
        _print(model, isa.name, report, plans)


def _inspect_artifact(path: Path, as_json: bool) -> None:
    from tilewright.commands.artifact import print_kernels, print_levels, report, size

    result = report(path)
    if as_json:
        print_json(result)
        return
    outputs = ", ".join(output["name"] for output in result["outputs"])
    text = f"{path}: {result['architecture']}, {size(result)}, up to {result['max_positions']} tokens, gives {outputs}"
    stdout().print(text, markup=False)
    print_levels(result)
    print_kernels(result)


def _per_linear(layer: LayerPlan) -> tuple[LinearPlan, ...]:
    """The plan of each of a layer's six Linears, of which query, key and value share one kernel."""
    return layer.qkv, layer.qkv, layer.qkv, layer.output, layer.up, layer.down


def _as_json(model: Path, isa: str, report: ModelReport, plans: list[LinearPlan]) -> dict[str, Any]:
    config = report.config
    return {
        "model": str(model),
        "architecture": config.architecture,
        "head": report.head.kind,
        "pooling": report.head.pooling if report.head.kind == "none" else None,
        "normalize": report.head.normalize,
        "problem_type": report.head.problem,
        "quantized": report.quantized,
        "layers": report.num_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "activation": config.activation,
        "labels": list(config.labels),
        "isa": isa,
        "linears": [
            {
                "name": linear.name,
                "shape": list(linear.shape),
                "dtype": linear.dtype,
                "density": linear.density,
                "block_density": {block_name(block): density for block, density in linear.block_density.items()},
                "block": linear.block and list(linear.block),
                "kernel": {
                    "family": plan.decisions.family,
                    "block": plan.decisions.block and list(plan.decisions.block),
                    "note": plan.reason,
                },
            }
            for linear, plan in zip(report.linears, plans, strict=True)
        ],
        "notes": list(report.notes),
    }


def _print(model: Path, isa: str, report: ModelReport, plans: list[LinearPlan]) -> None:
    config, console = report.config, stdout(at_least=120)
    console.print(
        f"{model}: {config.architecture}, {report.num_layers} layers, hidden {config.hidden_size}, {config.num_heads} heads, "
        f"feed-forward {config.intermediate_size}, {config.activation}, vocabulary {config.vocab_size}, "
        f"up to {config.max_positions} tokens, head: {_head(report.head)}, {'INT8' if report.quantized else 'float'}",
        markup=False,
    )
    shapes = list(report.linears[0].block_density) if report.linears else []
    parts = zip(*(linear.name.split(".") for linear in report.linears), strict=False)
    prefix = "".join(f"{same[0]}." for same in takewhile(lambda names: len(set(names)) == 1, parts))
    grid = table(prefix or "linear", "block", "kernel", "shape", "non-zero", *map(block_name, shapes), left=3)
    for linear, plan in zip(report.linears, plans, strict=True):
        grid.add_row(
            linear.name.removeprefix(prefix),
            block_name(linear.block),
            f"{plan.decisions.family} {block_name(plan.decisions.block)}",
            "x".join(map(str, linear.shape)),
            _percent(linear.density),
            *(_percent(linear.block_density[shape]) for shape in shapes),
        )
    console.print(grid)
    sparse = sum(plan.found is not None and plan.decisions.block is not None for plan in plans)
    console.print(
        f"{sparse} of {len(plans)} linears would run sparse on {isa}; columns such as 4x1 give the share of non-zero blocks"
    )
    for reason in dict.fromkeys(plan.reason for plan in plans if plan.reason):
        print_note(reason)
    for note in report.notes:
        print_note(note)
    if not report.quantized:
        print_note("the model is float; quantise it before compiling: tilewright quantize MODEL --texts FILE -o DIR")


def _head(head: Head) -> str:
    if head.kind == "none":
        return f"none ({head.pooling} pooling{', normalised' if head.normalize else ''})"
    return head.kind + (f" ({head.problem})" if head.problem else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
