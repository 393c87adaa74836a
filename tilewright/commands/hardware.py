"""`tilewright check-hardware`: what this machine can run."""

from __future__ import annotations

import dataclasses

from tilewright.commands.output import Json, print_json, stdout, table


def check_hardware(as_json: Json = False) -> None:
    """Show this CPU, its caches and the ISA levels it supports."""
    from tilewright.hardware import detect
    from tilewright.schedules.isa import ISAS

    machine = detect()
    if as_json:
        print_json(dataclasses.asdict(machine))
        return
    console = stdout()
    console.print(f"CPU     {machine.cpu} (LLVM: {machine.llvm_cpu})", markup=False)
    console.print(f"cores   {machine.cores} available to this process")
    caches = (f"L{cache.level} {cache.kind.lower()} {cache.size >> 10} KiB" for cache in machine.caches)
    console.print(f"caches  {', '.join(caches) or 'unknown'}")
    grid = table("ISA level", "this CPU", "int32 lanes", left=2)
    for level in machine.levels:
        status = f"lacks {', '.join(level.missing)}" if level.missing else "supported"
        mark = " (native)" if level.name == machine.native else ""
        grid.add_row(level.name + mark, status, str(ISAS[level.name].lanes))
    console.print(grid)
