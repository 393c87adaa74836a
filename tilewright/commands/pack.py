"""`tilewright pack`: a quantised checkpoint to one that stores only its non-zero blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewright.commands.output import Json, print_json, stdout


def pack(
    model: Annotated[Path, typer.Argument(help="Quantised Hugging Face directory or QDQ ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    as_json: Json = False,
) -> None:
    """Store only the non-zero blocks of a quantised model, and its word embeddings in 8 bits, for shipping."""
    from tilewright.pipeline.pack import pack as pack_model

    path = pack_model(model, output)
    size = sum(file.stat().st_size for file in path.iterdir())
    if as_json:
        print_json({"model": str(path), "bytes": size})
    else:
        stdout().print(f"{path}: packed, {size / 1e6:.1f} MB", markup=False)
