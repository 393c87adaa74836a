"""Hugging Face encoders as ONNX files, float32 and INT8, so that others can run what Tilewright compiles."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Signature:
    """A transformers class, and the names of its ONNX file's inputs and outputs."""

    auto_class: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


ENCODER = Signature("AutoModel", ("input_ids", "attention_mask", "token_type_ids"), ("last_hidden_state",))
QUESTION_ANSWERING = Signature("AutoModelForQuestionAnswering", ("input_ids", "attention_mask"), ("start_logits", "end_logits"))


class _Positional(torch.nn.Module):
    """Calls an encoder by keyword, which the exporter does not, and leaves out what is not asked for."""

    def __init__(self, model: torch.nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self.signature = signature

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(**dict(zip(self.signature.inputs, arguments, strict=True)))
        return tuple(found[name] for name in self.signature.outputs)


def export(directory: Path, output: Path, signature: Signature = ENCODER) -> Path:
    """Write the model in the Hugging Face `directory` as a float32 ONNX file that takes any batch and length."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, signature.auto_class).from_pretrained(directory, attn_implementation="eager").eval()
    axes = {name: {0: "batch", 1: "length"} for name in signature.inputs + signature.outputs}
    example = tuple(torch.ones(2, 7, dtype=torch.long) for _ in signature.inputs)
    with _complete(output) as scratch, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Positional(model, signature),
            example,
            scratch,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return output


def fuse_attention(model: Path, output: Path, heads: int, hidden: int) -> Path:
    """Fuse attention, LayerNorm and GELU of the float ONNX file `model` into ONNX Runtime's own operators."""
    from onnxruntime.transformers.optimizer import optimize_model

    with _complete(output) as scratch, _quiet():
        optimize_model(str(model), "bert", num_heads=heads, hidden_size=hidden).save_model_to_file(str(scratch))
    return output


def quantize_dynamic(model: Path, output: Path, reduce_range: bool = False) -> Path:
    """Quantise the ONNX file `model` with ONNX Runtime's dynamic INT8, the weights to 7 bits if `reduce_range`."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _complete(output) as scratch, _quiet():
        # fused operators have no shape inference, so that the quantiser has to be told the type of their outputs
        options = {"DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(model, scratch, weight_type=QuantType.QInt8, reduce_range=reduce_range, extra_options=options)
    return output


def quantize_static(
    model: Path, output: Path, feeds: Iterator[Mapping[str, NDArray[Any]]], per_channel: bool, float_weights: bool
) -> Path:
    """Quantise all matrix products in the ONNX file `model`, attention's too: u8 activations, s8 weights, as QDQ.

    feeds: inputs to calibrate on. float_weights: keep the weights in float32 with a QDQ pair behind them, as training
    with quantisation exports them, rather than as INT8.
    """
    from onnx import TensorProto
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return dict(found) if (found := next(feeds, None)) is not None else None

    with _complete(output) as scratch, _quiet():
        quantize_static(
            model,
            scratch,
            Reader(),
            QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            extra_options={"AddQDQPairToWeight": float_weights, "DefaultTensorType": TensorProto.FLOAT},
        )
    return output


@contextlib.contextmanager
def _complete(output: Path) -> Iterator[Path]:
    """Yield a path beside `output` that takes its place when the work on it succeeded."""
    scratch = output.with_name(f".{os.getpid()}-{output.name}")
    try:
        yield scratch
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without ONNX Runtime's advice through the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
