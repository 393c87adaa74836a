"""Running an ONNX graph without its quantised activations: in ONNX Runtime where it is installed, else in ONNX's evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import InvalidModel
from tilewright.frontend.onnx_graph import DEFAULT_DOMAIN, Graph, dequantize

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, NDArray[Any]]


class FloatGraph:
    """The graph in float32: Q/DQ pairs on activations left out, quantised constants dequantised, halves widened.

    Weights stay in bytes until an engine's DequantizeLinear needs them: all of them in float32, and the engine's copy, would
    take several times the memory of the model.
    """

    def __init__(self, graph: Graph) -> None:
        """Build it from `graph`, which stays as it is."""
        self._graph = graph
        self._quantized: set[str] = set()
        with graph.unread():
            self._nodes = [real for node in graph.model.graph.node if (real := self._real(node)) is not None]

    def evaluate(self, feeds: Sequence[Arrays], outputs: Sequence[str]) -> list[Arrays]:
        """Values of `outputs`, any in the graph, by name for each of `feeds`; raises InvalidModel where it cannot run."""
        constants = {name: self._graph.constants[name] for name in outputs if name in self._graph.constants}
        inputs = {name: name for name in outputs if name in self._graph.inputs}
        wanted = [name for name in dict.fromkeys(outputs) if name not in constants and name not in inputs]
        try:
            with self._graph.unread():
                run = _runner(self._part(wanted)) if wanted else lambda feed, names: []
            return [
                constants | {name: feed[name] for name in inputs} | dict(zip(wanted, run(feed, wanted), strict=True))
                for feed in feeds
            ]
        except Exception as error:  # neither engine has a base class of its own errors
            message = " ".join(str(error).split())[:200]
            raise InvalidModel(f"{self._graph.where} cannot be run to check it: {message}; export it again") from None

    def _part(self, outputs: Sequence[str]) -> onnx.ModelProto:
        """What computes `outputs`, as a model of its own."""
        from onnx import helper

        needed, nodes = set(outputs), []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        source = self._graph.model
        inputs = [value for value in source.graph.input if value.name in needed and value.name in self._graph.inputs]
        made = helper.make_graph(nodes[::-1], "float", inputs, [helper.make_empty_tensor_value_info(name) for name in outputs])
        made.initializer.extend(self._real_tensor(tensor) for tensor in source.graph.initializer if tensor.name in needed)
        made.initializer.extend(self._dequantized(name) for name in self._quantized & needed)
        return helper.make_model(made, opset_imports=source.opset_import, ir_version=source.ir_version)

    def _real(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        from onnx import TensorProto, helper

        if node.op_type == "DequantizeLinear":
            if self._runs(node):
                return node
            constant = self._graph.quantized(node.output[0])
            if constant is not None:
                self._quantized.add(node.output[0])
                return None
            quantize = self._graph.producers.get(node.input[0])
            if quantize is not None and quantize.op == "QuantizeLinear":
                return helper.make_node("Identity", [quantize.inputs[0]], node.output)
        elif node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT16 for a in node.attribute):
            return helper.make_node("Cast", node.input, node.output, to=TensorProto.FLOAT)
        elif node.op_type == "Constant" and any(
            a.HasField("t") and a.t.data_type == TensorProto.FLOAT16 for a in node.attribute
        ):
            return helper.make_node("Constant", [], node.output, value=self._real_tensor(node.attribute[0].t))
        return node

    def _runs(self, node: onnx.NodeProto) -> bool:
        """Whether engines dequantise this constant themselves; they take scales of channels since opset 13."""
        values, scale = (self._graph.constants.get(name) for name in node.input[:2])
        opset = max((opset.version for opset in self._graph.model.opset_import if opset.domain in DEFAULT_DOMAIN), default=0)
        stored = node.input[0] in self._graph.initializers and values is not None and values.dtype in (np.int8, np.uint8)
        return stored and scale is not None and (scale.size == 1 or opset >= 13)

    def _dequantized(self, name: str) -> onnx.TensorProto:
        from onnx import numpy_helper

        constant = self._graph.quantized(name)
        assert constant is not None  # it was when its node was left out
        return numpy_helper.from_array(dequantize(constant), name)

    def _real_tensor(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        from onnx import TensorProto, numpy_helper

        if tensor.data_type != TensorProto.FLOAT16:
            return tensor
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _runner(model: onnx.ModelProto) -> Any:
    """What runs `model`: (feeds, names of outputs) to their arrays."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(model)
        return lambda feed, names: evaluator.run(names, {name: feed[name] for name in evaluator.input_names})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    return lambda feed, names: session.run(names, {name: feed[name] for name in inputs})
