"""Hugging Face encoders as ONNX files, so that ONNX Runtime can run what Tilewright compiles."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class _Positional(torch.nn.Module):
    """Calls an encoder by keyword, which the exporter does not."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: torch.Tensor) -> Any:
        return self.model(**dict(zip(INPUTS, arguments, strict=True))).last_hidden_state


def export(directory: Path, output: Path) -> Path:
    """Write the bare BERT encoder in the Hugging Face `directory` as a float32 ONNX file with any batch and length."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, "last_hidden_state")}
    scratch = output.with_name(f".{os.getpid()}-{output.name}")
    example = tuple(torch.ones(2, 7, dtype=torch.long) for _ in INPUTS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Positional(model),
                example,
                scratch,
                input_names=list(INPUTS),
                output_names=["last_hidden_state"],
                dynamic_axes=axes,
                opset_version=17,
                dynamo=False,
            )
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)
    return output


def quantize_dynamic(model: Path, output: Path) -> Path:
    """Quantise the ONNX file `model` with ONNX Runtime's dynamic INT8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it advises, through the root logger, to preprocess first
    try:
        quantize_dynamic(model, output, weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return output
