"""How each peer loads a model and runs it: what differs between engines, and nothing else.

A loader takes the model's path and the number of threads and returns a function from (batch, length) to what runs that
shape, a function of int64 [batch, length] ids and mask. Peers compile for a shape where that makes them faster. Every
loader imports its own engine only, since the environments hold one each.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[Any, Any], Sequence[Any]]
"""(ids, mask) to the logits of answers' starts and ends, each [batch, length]."""

Shaped = Callable[[int, int], Run]


@dataclass(frozen=True)
class Adapter:
    """load: see above. packages: the distributions whose versions a report names."""

    load: Callable[[Path, int], Shaped]
    packages: tuple[str, ...]


def _tilewright(path: Path, threads: int) -> Shaped:
    import tilewright

    engine = tilewright.load(path, num_threads=threads)

    def run(ids: Any, mask: Any) -> Sequence[Any]:
        found = engine(input_ids=ids, attention_mask=mask)
        return found["start_logits"], found["end_logits"]

    return lambda batch, length: run


def _onnxruntime(path: Path, threads: int) -> Shaped:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch, length: lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})


def _openvino(path: Path, threads: int, precision: str | None) -> Shaped:
    import openvino

    core = openvino.Core()
    # the CPU plugin would choose bfloat16 for float models where the CPU has it
    hints = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False, **hints}

    source = path / "model.xml" if path.is_dir() else path

    def shaped(batch: int, length: int) -> Run:
        model = core.read_model(source)
        model.reshape({name: [batch, length] for name in ("input_ids", "attention_mask")})
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def run(ids: Any, mask: Any) -> Sequence[Any]:
            found = request.infer({"input_ids": ids, "attention_mask": mask}, share_inputs=True)
            return [found[0], found[1]]

        return run

    return shaped


def _deepsparse(path: Path, threads: int) -> Shaped:
    import deepsparse

    def shaped(batch: int, length: int) -> Run:
        # it writes the shapes it is asked for into the file it is given
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copy(path, scratch)
            engine = deepsparse.compile_model(copy, batch, num_cores=threads, input_shapes=[[batch, length]] * 2)
        return lambda ids, mask: engine.run([np.ascontiguousarray(ids), np.ascontiguousarray(mask)])

    return shaped


def _torch_model(path: Path, threads: int) -> Any:
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForQuestionAnswering.from_pretrained(path).eval()


def _torch_run(model: Any) -> Run:
    import torch

    def run(ids: Any, mask: Any) -> Sequence[Any]:
        found = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        return found["start_logits"].numpy(), found["end_logits"].numpy()

    return run


def _torch_eager(path: Path, threads: int) -> Shaped:
    run = _torch_run(_torch_model(path, threads))
    return lambda batch, length: run


def _torch_compile(path: Path, threads: int) -> Shaped:
    import torch

    model = _torch_model(path, threads)
    torch._inductor.config.freezing = True  # weights become constants, packed for oneDNN

    def shaped(batch: int, length: int) -> Run:
        torch.compiler.reset()
        return _torch_run(torch.compile(model, dynamic=False))

    return shaped


def _torch_pt2e(path: Path, threads: int) -> Shaped:
    """Post-training static quantisation of the exported graph, compiled by inductor; one export for each shape."""
    import torch
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model = _torch_model(path, threads)
    torch._inductor.config.freezing = True
    with np.load(path / "calibration.npz") as file:
        calibration = {name: torch.from_numpy(file[name]) for name in ("input_ids", "attention_mask")}

    def shaped(batch: int, length: int) -> Run:
        torch.compiler.reset()
        rows = torch.arange(batch) % len(calibration["input_ids"])
        columns = torch.arange(length) % calibration["input_ids"].shape[1]
        example = {name: tensor[rows][:, columns].contiguous() for name, tensor in calibration.items()}
        graph = torch.export.export(model, (), example).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        prepared(**example)
        return _torch_run(torch.compile(convert_pt2e(prepared), dynamic=False))

    return shaped


def _tvm(path: Path, threads: int) -> Shaped:
    """The float model through TVM's own ONNX frontend, default pipeline and default schedules."""
    import onnx
    import onnxruntime
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    del threads  # TVM_NUM_THREADS tells it

    def shaped(batch: int, length: int) -> Run:
        # the frontend cannot follow the arithmetic on shapes that makes masks; for one shape it is constant
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", batch)
        options.add_free_dimension_override_by_name("length", length)
        with tempfile.TemporaryDirectory() as scratch:
            options.optimized_model_filepath = f"{scratch}/folded.onnx"
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            module = from_onnx(onnx.load(options.optimized_model_filepath), keep_params_in_input=False)
        target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")()})
        machine = tvm.relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
        return lambda ids, mask: [part.numpy() for part in machine["main"](tvm.runtime.tensor(ids), tvm.runtime.tensor(mask))]

    return shaped


ADAPTERS = {
    "tilewright": Adapter(_tilewright, ("tilewright", "apache-tvm")),
    "onnxruntime": Adapter(_onnxruntime, ("onnxruntime",)),
    "openvino fp32": Adapter(partial(_openvino, precision="f32"), ("openvino",)),
    "openvino int8": Adapter(partial(_openvino, precision=None), ("openvino", "nncf")),
    "torch eager": Adapter(_torch_eager, ("torch", "transformers")),
    "torch compile": Adapter(_torch_compile, ("torch", "transformers")),
    "torch pt2e": Adapter(_torch_pt2e, ("torch", "torchao", "transformers")),
    "deepsparse": Adapter(_deepsparse, ("deepsparse", "sparseml")),
    "tvm": Adapter(_tvm, ("apache-tvm",)),
}
