"""Conversions that need a peer's own tools: run by that peer's interpreter, `python -m benchmarks.peers.convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def openvino(source: Path, target: Path) -> None:
    """Quantise a float ONNX file by NNCF for transformers into the directory `target`.

    The float checkpoint beside `source` holds inputs to calibrate on.
    """
    import nncf
    import numpy as np
    import openvino as ov

    with np.load(source.parent / "float" / "calibration.npz") as file:
        arrays = {name: file[name] for name in file.files}
    rows: list[dict[str, Any]] = [
        {name: array[i : i + 1] for name, array in arrays.items()} for i in range(len(next(iter(arrays.values()))))
    ]
    model = nncf.quantize(ov.Core().read_model(source), nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER)
    target.mkdir()
    ov.save_model(model, target / "model.xml", compress_to_fp16=False)


def deepsparse(source: Path, target: Path) -> None:
    """Rewrite QDQ pairs as the integer operators that DeepSparse runs fast; it does not skip zeros in plain QDQ."""
    import logging

    import onnx
    from sparseml.exporters.onnx_to_deepsparse import ONNXToDeepsparse

    logging.disable(logging.INFO)
    ONNXToDeepsparse().export(onnx.load(source), str(target))


if __name__ == "__main__":
    {"openvino": openvino, "deepsparse": deepsparse}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
