"""`tilewright quantize`: a float checkpoint to an INT8 one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewright.commands.output import Json, print_json, progress_bar, stdout
from tilewright.errors import InvalidInput


def quantize(
    model: Annotated[Path, typer.Argument(help="Float Hugging Face directory or ONNX file.")],
    texts: Annotated[Path, typer.Option(help="Calibration texts, one a line, UTF-8.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    method: Annotated[str, typer.Option(help="How activation ranges are chosen: minmax or percentile.")] = "minmax",
    percentile: Annotated[float, typer.Option(help="Share of values that a range covers, for --method percentile.")] = 99.999,
    max_length: Annotated[int, typer.Option(help="Tokens to which a text is cut.")] = 128,
    weight_bits: Annotated[
        int,
        typer.Option(help="Bits of a weight: 8, or 7 for models meant for CPUs without VNNI."),
    ] = 8,
    self_check: Annotated[
        bool | None,
        typer.Option(
            "--self-check/--no-self-check",
            help="Run the float model beside its source and refuse differences: an ONNX graph, or transformers.",
            show_default="for ONNX only",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantise a float model to INT8 with ranges seen on calibration texts."""
    lines = _read_lines(texts)
    from tilewright.pipeline import quantize as quantize_model

    with progress_bar("calibrating") as progress:
        path = quantize_model(
            model,
            lines,
            output,
            method,  # type: ignore[arg-type]  # checked there
            percentile,
            max_length,
            progress,
            weight_bits,
            self_check,
        )
    size = sum(file.stat().st_size for file in path.iterdir())
    if as_json:
        print_json(
            {
                "model": str(path),
                "texts": len(lines),
                "method": method,
                "max_length": max_length,
                "weight_bits": weight_bits,
                "bytes": size,
            }
        )
    else:
        stdout().print(f"{path}: INT8, {size / 1e6:.1f} MB, calibrated on {len(lines)} texts ({method})", markup=False)


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read ({error.strerror}); give a text file with one calibration text a line"
        ) from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not UTF-8 text; give a text file with one calibration text a line") from None
    return [line for line in lines if line.strip()]
