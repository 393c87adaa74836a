"""`tilewright check-hardware`: what a CPU can run, what sparsity pays on it, and what a model would take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilewright.commands.output import Json, block_name, print_json, print_note, stdout, table

if TYPE_CHECKING:
    from tilewright.hardware import Hardware
    from tilewright.predict import Sizes

_KERNELS = ("qkv", "attention", "output", "up", "down")


def check_hardware(
    target: Annotated[
        str, typer.Option(help="native, an ISA level, an LLVM CPU, an instance type or a CPU model name.")
    ] = "native",
    model: Annotated[
        Path | None, typer.Option(help="Predict for this model: a directory with config.json, that file, or ONNX.")
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=0.99, help="Share of zero blocks to predict for; repeatable.", show_default="0.7, 0.8, 0.9"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a call.")] = 1,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 128,
    ghz: Annotated[
        float | None, typer.Option(min=0.1, help="Clock to predict at.", show_default="as the rates were measured, else 3.0")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a CPU, its ISA levels and the sparsity that pays on each; with --model, predict its times per block shape."""
    from tilewright.hardware import named
    from tilewright.predict import BERT_BASE, read_sizes

    cpu = named(target)
    sizes = BERT_BASE if model is None else read_sizes(model)
    result = _describe(cpu, sizes)
    if model is not None:
        result["prediction"] = _predict(cpu, sizes, sparsity or [0.7, 0.8, 0.9], batch, seq_len, ghz)
    if as_json:
        print_json(result)
    else:
        _print(result, model)


def _describe(cpu: Hardware, sizes: Sizes) -> dict[str, Any]:
    """The CPU; with each level the rates that stand for it and the share of zeros from which each block shape pays."""
    from tilewright.predict import blocks_for, break_even
    from tilewright.schedules import rates
    from tilewright.schedules.isa import ISAS

    result = dataclasses.asdict(cpu)
    for level in result["levels"]:
        isa, known = ISAS[level["name"]], rates.find(level["name"], cpu.llvm_cpu)
        level["lanes"] = isa.lanes
        level["rates"] = known and {"source": known.source, "cpu": known.cpu, "about": known.about, "ghz": known.ghz}
        level["break_even"] = known and {block_name(b): break_even(sizes, isa, known, b) for b in blocks_for(sizes)}
    result["break_even_for"] = dataclasses.asdict(sizes)
    return result


def _predict(
    cpu: Hardware, sizes: Sizes, sparsities: list[float], batch: int, seq_len: int, ghz: float | None
) -> dict[str, Any] | None:
    """Dense and every block shape at each sparsity, at the best level that has rates; None if none has."""
    from tilewright.predict import ASSUMED_GHZ, blocks_for, predict, ranking
    from tilewright.schedules import rates
    from tilewright.schedules.isa import ISAS

    runs = [level.name for level in cpu.levels if not level.missing]
    known = next((entry for name in reversed(runs) if (entry := rates.find(name, cpu.llvm_cpu))), None)
    if known is None:
        return None
    measured = known.ghz if known.cpu == cpu.llvm_cpu else None
    clock = ghz or measured or ASSUMED_GHZ

    def made(block: tuple[int, int] | None, share: float) -> Any:
        return predict(sizes, ISAS[known.isa], known, block, share, batch=batch, seq_len=seq_len, ghz=clock)

    dense = made(None, 0.0)
    sparse = [made(block, share) for share in sparsities for block in blocks_for(sizes)]
    rows = [dense, *ranking(row for row in sparse if row is not None)]
    return {
        "level": known.isa,
        "without_rates": runs[runs.index(known.isa) + 1 :],
        "rates": {"source": known.source, "cpu": known.cpu},
        "ghz": clock,
        "ghz_source": "given" if ghz else "measured" if measured else "assumed",
        "batch": batch,
        "seq_len": seq_len,
        "threads": 1,
        "rows": [
            {
                "block": block_name(row.block),
                "sparsity": row.sparsity,
                "stored": " / ".join(dict.fromkeys(f"{s.family} {block_name(s.block)}" for s in row.stored.values())),
                "microseconds": dict(row.kernels),
                "milliseconds": row.milliseconds,
                "speedup": dense.milliseconds / row.milliseconds,
            }
            for row in rows
        ],
    }


def _print(result: dict[str, Any], model: Path | None) -> None:
    console = stdout(at_least=110)
    llvm = f" (LLVM: {result['llvm_cpu']})" if result["llvm_cpu"] else ""
    console.print(f"CPU     {result['cpu']}{llvm}", markup=False)
    if result["cores"] is not None:
        console.print(f"cores   {result['cores']} available to this process")
        caches = (f"L{cache['level']} {cache['kind'].lower()} {cache['size'] >> 10} KiB" for cache in result["caches"])
        console.print(f"caches  {', '.join(caches) or 'unknown'}")
    grid = table("ISA level", "this CPU", "int32 lanes", "kernel rates", left=2)
    for level in result["levels"]:
        status = f"lacks {', '.join(level['missing'])}" if level["missing"] else "supported"
        mark = " (native)" if level["name"] == result["native"] else ""
        known = level["rates"]
        source = f"{known['source']}, {known['cpu']}" if known else "none"
        grid.add_row(level["name"] + mark, status, str(level["lanes"]), source)
    console.print(grid)
    _print_break_even(result)
    if model is not None:
        _print_prediction(result, model)
    used = [level["rates"] for level in result["levels"] if level["rates"] and not level["missing"]]
    for about in dict.fromkeys(f"{known['source']} rates of {known['cpu']}: {known['about']}" for known in used):
        print_note(about)


def _print_break_even(result: dict[str, Any]) -> None:
    """Of the levels that the CPU has and that have rates."""
    levels = [level for level in result["levels"] if level["break_even"] and not level["missing"]]
    if not levels:
        return
    sizes = result["break_even_for"]
    stdout().print(
        f"Zero blocks from which all linears of a layer are stored sparse, hidden {sizes['hidden']}, "
        f"feed-forward {sizes['intermediate']}; with fewer, those that would take longer than dense are computed as dense:"
    )
    grid = table("ISA level", *levels[0]["break_even"])
    for level in levels:
        grid.add_row(level["name"], *("-" if share is None else f"{share:.0%}" for share in level["break_even"].values()))
    stdout(at_least=110).print(grid)


def _print_prediction(result: dict[str, Any], model: Path) -> None:
    sizes, found, console = result["break_even_for"], result["prediction"], stdout(at_least=110)
    if found is None:
        console.print(f"no rates for any level of {result['cpu']}: nothing can be predicted", markup=False)
        return
    console.print(
        f"{model}: {sizes['name']}, {sizes['layers']} layers, hidden {sizes['hidden']}, {sizes['heads']} heads, feed-forward "
        f"{sizes['intermediate']}; predicted for {found['level']}, 1 thread, {found['batch']} x {found['seq_len']} tokens, "
        f"{found['ghz']:.2f} GHz ({found['ghz_source']}), from rates {found['rates']['source']} for {found['rates']['cpu']}",
        markup=False,
    )
    kernels = (f"{name} us" for name in _KERNELS)
    grid = table("zeros", "block", "stored as", *kernels, "encoder ms", "over dense", left=3)
    last = None
    for row in found["rows"]:
        if last not in (None, row["sparsity"]):
            grid.add_section()
        last = row["sparsity"]
        times = (f"{row['microseconds'][name]:.0f}" for name in _KERNELS)
        ends = (f"{row['milliseconds']:.2f}", f"{row['speedup']:.2f}x")
        grid.add_row(f"{row['sparsity']:.0%}", row["block"], row["stored"], *times, *ends)
    console.print(grid)
    for name in found["without_rates"]:
        print_note(f"no rates for {name}, which this CPU has too")
