"""Packing a quantised checkpoint for shipping: only the non-zero blocks, word embeddings as s8."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from tilewright.errors import InvalidInput
from tilewright.frontend import load
from tilewright.pipeline.checkpoint import write_checkpoint
from tilewright.pipeline.disk import scratch_directory
from tilewright.pipeline.provenance import append_step


def pack(model: str | PathLike[str], output: str | PathLike[str]) -> Path:
    """Write the quantised checkpoint `model` packed into the new directory `output`, which `tilewright.frontend.load` reads.

    Weights keep their values; word embeddings are rounded to s8, symmetric, with a scale for each word. provenance.json
    gains a step.

    Raises InvalidInput for a float model or an output that exists or cannot be written, and what `load` raises.
    """
    target = Path(output)
    if target.exists():
        raise InvalidInput(f"output {target} exists; remove it or choose another")
    source = load(model)
    if not source.quantized:
        raise InvalidInput("the model is not quantised; only s8 weights are packed: quantise it first")
    with scratch_directory(target) as scratch:
        write_checkpoint(source, scratch, packed=True)
        append_step("pack", {}, Path(model), scratch)
    return target
