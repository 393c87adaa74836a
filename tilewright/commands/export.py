"""`tilewright export`: a quantised checkpoint as a QDQ ONNX file, which other engines run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewright.commands.output import Json, print_json, stdout


def export(
    model: Annotated[Path, typer.Argument(help="Quantised Hugging Face directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    as_json: Json = False,
) -> None:
    """Write a quantised model as model.onnx with Q/DQ pairs, of the same integers."""
    from tilewright.pipeline.qdq import FILE, export_onnx

    file = export_onnx(model, output) / FILE
    size = file.stat().st_size
    if as_json:
        print_json({"model": str(file), "bytes": size})
    else:
        stdout().print(f"{file}: {size / 1e6:.1f} MB", markup=False, soft_wrap=True)
