"""An ONNX graph as the frontend walks it: from a value back to what produced it, with constants folded.

Quantize/Dequantize pairs are transparent to the walk: `Graph.source` steps over them and says which it stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.frontend.onnx_prepare import prepare

if TYPE_CHECKING:
    import onnx

OPSETS = range(11, 23)
"""Versions of the default operator set that are read."""

_CONTROL_FLOW = frozenset(("If", "Loop", "Scan", "SequenceMap"))

_VALUES = frozenset(("value", "value_float", "value_floats", "value_int", "value_ints"))
"""Attributes of Constant that hold numbers."""

_AXES = frozenset(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Squeeze", "Unsqueeze"))
"""Operators whose axes are an attribute or, in later opsets, the second input."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "Gather": {"axis": 0},
    "LayerNormalization": {"axis": -1, "epsilon": 1e-5},
    "ReduceL2": {"keepdims": 1},
    "ReduceMean": {"keepdims": 1},
    "ReduceSum": {"keepdims": 1},
}
"""Attributes that operators have when they are not written; of those that patterns look at."""

DEFAULT_DOMAIN = ("", "ai.onnx")
_FLOATS = (1, 10, 11, 16)  # TensorProto's FLOAT, FLOAT16, DOUBLE, BFLOAT16


@dataclass(frozen=True)
class Node:
    """One operator: its name, inputs ("" where an optional one is left out), outputs and attributes.

    `axes` of reductions, Squeeze and Unsqueeze is an attribute whatever the opset, where it is constant.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """A QuantizeLinear followed by its DequantizeLinear, per tensor; the zero point is of the u8 form, 0..255.

    `output` is the dequantised value's name and `producer` the operator whose result is quantised.
    """

    output: str
    producer: str
    scale: float
    zero_point: int


@dataclass(frozen=True)
class QuantizedConstant:
    """real = scale * (values - zero_point), along `axis` if `scale` is a vector; all integers are s32."""

    name: str
    values: NDArray[np.int32]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int


class Graph:
    """A checked ONNX graph."""

    def __init__(self, model: onnx.ModelProto, where: str) -> None:
        """Index the checked `model`; raises InvalidModel for a damaged tensor."""
        from onnx import numpy_helper

        graph = model.graph
        nodes = [_node(proto, model) for proto in graph.node]
        try:
            self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        except (ValueError, TypeError) as error:
            raise InvalidModel(f"{where} holds a damaged tensor: {error}; export the model again") from None
        self.initializers = frozenset(self.constants)
        self.constants |= {n.outputs[0]: _value(n) for n in nodes if _VALUES & set(n.attributes)}
        nodes = [self._with_axes(node) for node in nodes]
        self.model = model
        self.where = where
        self.producers = {output: node for node in nodes for output in node.outputs}
        self.inputs = tuple(i.name for i in graph.input if i.name not in self.initializers)
        self.outputs = tuple(output.name for output in graph.output)
        self.nodes = tuple(nodes)
        self.read: set[str] = set()  # initializers whose values were used
        for name, array in self.constants.items():
            if array.dtype.kind == "f" and array.size > 1 and not np.isfinite(array).all():
                raise InvalidModel(f"tensor {name} of {where} holds NaN or infinite values; the model is damaged")

    def node(self, value: str) -> Node | None:
        """Operator that produces `value`, operators without effect and Q/DQ pairs stepped over; None for an input."""
        return self.producers.get(self.source(value)[0])

    def source(self, value: str) -> tuple[str, tuple[Pair, ...]]:
        """Step back over Q/DQ pairs and operators without effect: the value before them, and the pairs, last first."""
        pairs = []
        while (node := self.producers.get(value)) is not None:
            if self._passes(node):
                value = node.inputs[0]
            elif node.op == "DequantizeLinear" and (quantize := self._quantize(node.inputs[0])) is not None:
                pairs.append(self._pair(node, quantize))
                value = quantize.inputs[0]
            else:
                break
        return value, tuple(pairs)

    def cast_input(self, value: str) -> str | None:
        """Name of the graph's input that `value` is, whatever its type; None if it is computed."""
        while (node := self.producers.get(value)) is not None and node.op in ("Cast", "Identity"):
            value = node.inputs[0]
        return value if value in self.inputs else None

    def constant(self, value: str) -> NDArray[Any] | None:
        """Value of a constant, dequantised to float32 if it is quantised; None if it depends on an input."""
        if value in self.constants:
            self._mark(value)
            return self.constants[value]
        if (quantized := self.quantized(value)) is not None:
            return dequantize(quantized)
        node = self.producers.get(value)
        if node is None or not (self._passes(node) or node.op == "Transpose"):
            return None
        inner = self.constant(node.inputs[0])
        if inner is None:
            return None
        if node.op == "Transpose":
            return np.transpose(inner, node.attributes.get("perm"))
        return inner.astype(np.float32) if node.op == "Cast" else inner

    def scalar(self, value: str) -> float | None:
        """Value of a constant with one element, or None."""
        array = self.constant(value)
        return float(array.reshape(())) if array is not None and array.size == 1 else None

    def quantized(self, value: str) -> QuantizedConstant | None:
        """Find the 8- or 32-bit integers behind a dequantised constant (possibly transposed), or None."""
        node = self.producers.get(value)
        if node is None:
            return None
        if node.op == "Transpose" and (inner := self.quantized(node.inputs[0])) is not None:
            order = list(node.attributes.get("perm", range(inner.values.ndim)[::-1]))
            return QuantizedConstant(
                inner.name, inner.values.transpose(order), inner.scale, inner.zero_point, order.index(inner.axis)
            )
        if node.op != "DequantizeLinear" or node.inputs[0] not in self.constants:
            return None
        values = self.constants[node.inputs[0]]
        self._mark(*node.inputs)
        scale, zero_point = self._scale(node), self._zero_point(node, values.dtype)
        axis, name = int(node.attributes.get("axis", 1)), node.inputs[0]
        if scale.size != 1 and not -values.ndim <= axis < values.ndim:
            raise InvalidModel(f"{name} is quantised along axis {axis}, but has {values.ndim} axes; export the model again")
        axis %= max(values.ndim, 1)
        if scale.size != 1 and scale.shape != values.shape[axis : axis + 1]:
            found = f"{name} {list(values.shape)} is quantised along axis {axis} by {scale.size} scales"
            raise InvalidModel(f"{found}; there is one for the tensor or for each of its {values.shape[axis]} channels")
        if zero_point.size not in (1, scale.size):
            raise InvalidModel(f"{name} has {scale.size} scales but {zero_point.size} zero points; export the model again")
        return QuantizedConstant(name, values.astype(np.int32), scale.reshape(-1), zero_point.reshape(-1), axis)

    def ancestors(self, value: str, through_shape: bool = True) -> Iterator[str]:
        """Every value that `value` depends on, itself included; `Shape` ends the walk unless `through_shape`."""
        seen, open_values = set(), [value]
        while open_values:
            name = open_values.pop()
            if name in seen or not name:
                continue
            seen.add(name)
            yield name
            node = self.producers.get(name)
            if node is not None and (through_shape or node.op != "Shape"):
                open_values.extend(node.inputs)

    def _quantize(self, value: str) -> Node | None:
        node = self.producers.get(value)
        return node if node is not None and node.op == "QuantizeLinear" else None

    def _pair(self, dequantize: Node, quantize: Node) -> Pair:
        parameters = []
        for node in (quantize, dequantize):
            scale = self._scale(node)
            zero_point = self._zero_point(node, self._quantized_type(quantize))
            if scale.size != 1 or zero_point.size != 1:
                raise UnsupportedModel(f"{node.op} of {quantize.inputs[0]} is per channel; activations are per tensor")
            parameters.append((float(scale.reshape(())), int(zero_point.reshape(()))))
        if parameters[0] != parameters[1]:
            raise InvalidModel(f"QuantizeLinear and DequantizeLinear of {quantize.inputs[0]} differ in scale or zero point")
        scale_value, zero_point_value = parameters[0]
        offset = 128 if self._quantized_type(quantize) == np.int8 else 0
        producer = self.producers.get(quantize.inputs[0])
        return Pair(dequantize.outputs[0], producer.op if producer else "input", scale_value, zero_point_value + offset)

    def _quantized_type(self, quantize: Node) -> np.dtype[Any]:
        name = quantize.inputs[2] if len(quantize.inputs) > 2 else ""
        if name and name not in self.constants:
            raise UnsupportedModel(f"the zero point of {quantize.inputs[0]} is computed at run time; quantise it statically")
        stated = {3: np.int8}.get(quantize.attributes.get("output_dtype", 0), np.uint8)  # 3 is TensorProto's INT8
        dtype = self.constants[name].dtype if name else np.dtype(stated)
        if dtype not in (np.int8, np.uint8):
            raise UnsupportedModel(f"{quantize.inputs[0]} is quantised to {dtype}; supported: int8, uint8")
        return dtype

    def _scale(self, node: Node) -> NDArray[np.float32]:
        scale = self.constants.get(node.inputs[1])
        if scale is None:
            raise UnsupportedModel(f"the scale of {node.inputs[0]} is computed at run time; quantise it statically")
        self._mark(node.inputs[1])
        if scale.dtype.kind != "f" or not np.isfinite(scale).all() or (scale <= 0).any():
            raise InvalidModel(f"scale {node.inputs[1]} holds a value that is NaN, infinite or not positive")
        return scale.astype(np.float32)

    def _zero_point(self, node: Node, dtype: np.dtype[Any]) -> NDArray[np.int32]:
        name = node.inputs[2] if len(node.inputs) > 2 else ""
        self._mark(name)
        zero_point = self.constants.get(name, np.zeros((), dtype))
        if (name and name not in self.constants) or zero_point.dtype != dtype:
            found = zero_point.dtype if name in self.constants else "no constant"
            raise InvalidModel(
                f"the zero point {name} of {node.inputs[0]} is {found}, expected {dtype}; export the model again"
            )
        return zero_point.astype(np.int32)

    def _passes(self, node: Node) -> bool:
        """Whether `node` hands its input on: Cast does between floating-point types, Dropout unless it trains."""
        if node.op == "Cast":
            return node.attributes.get("to") in _FLOATS
        if node.op == "Dropout":
            training = self.constants.get(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.False_
            return training is not None and not training.any()
        return node.op == "Identity"

    def _with_axes(self, node: Node) -> Node:
        """Return `node` with its axes as an attribute and the defaults of what is not written."""
        attributes = {**_DEFAULTS.get(node.op, {}), **node.attributes}
        if node.op in _AXES:
            given = self.constants.get(node.inputs[1]) if len(node.inputs) > 1 else attributes.get("axes")
            attributes["axes"] = None if given is None else tuple(int(axis) for axis in np.reshape(given, -1))
        return Node(node.op, node.inputs, node.outputs, attributes)

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Within it, reading an initializer is no use of it in the model."""
        read = set(self.read)
        yield
        self.read = read

    def _mark(self, *names: str) -> None:
        self.read.update(name for name in names if name in self.initializers)


def dequantize(constant: QuantizedConstant) -> NDArray[np.float32]:
    """Real values of a quantised constant, f32."""
    shape = [1] * constant.values.ndim
    if constant.scale.size > 1:
        shape[constant.axis] = -1
    scale, zero_point = (
        array.reshape(shape) if array.size > 1 else array.reshape(()) for array in (constant.scale, constant.zero_point)
    )
    return (constant.values - zero_point).astype(np.float32) * scale


def read_graph(path: Path) -> Graph:
    """Read the ONNX file at `path`; raises InvalidModel if it is not one, UnsupportedModel for what it uses."""
    try:
        import onnx
    except ImportError:
        raise UnsupportedModel("reading ONNX needs the onnx package; pip install tilewright[pipeline]") from None
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf, the file system and onnx's external data each raise their own
        message = " ".join(str(error).split())
        raise InvalidModel(f"{path} is not a complete ONNX file: {message}; export or copy it again") from None
    check_support(model, path.name)
    check_wiring(model, path.name)
    return Graph(prepare(model), path.name)


def check_support(model: onnx.ModelProto, where: str) -> None:
    """Raise UnsupportedModel for an opset or operators that are not read, InvalidModel for a file without a graph."""
    if not model.graph.node or not model.graph.output:
        raise InvalidModel(f"{where} holds no ONNX graph; export or copy it again")
    if any(isinstance(name, bytes) for name in _names(model.graph)):  # which is how protobuf gives what it cannot decode
        raise InvalidModel(f"{where} holds a name that is not UTF-8; the file is damaged, export or copy it again")
    foreign = sorted({f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain not in DEFAULT_DOMAIN})
    if foreign:
        raise UnsupportedModel(
            f"{where} uses operators of another domain ({', '.join(foreign[:4])}{', ...' if len(foreign) > 4 else ''}); "
            "give the file as it was exported, before an optimizer of some runtime fused it"
        )
    control = sorted({node.op_type for node in model.graph.node} & _CONTROL_FLOW)
    if control:
        raise UnsupportedModel(f"{where} uses {', '.join(control)}; export it again by tracing, which leaves no control flow")
    opsets = [opset.version for opset in model.opset_import if opset.domain in DEFAULT_DOMAIN]
    if not opsets or opsets[0] not in OPSETS:
        found = f"opset {opsets[0]}" if opsets else "no opset"
        raise UnsupportedModel(f"{where} has {found}; export it with one of {OPSETS.start} to {OPSETS.stop - 1}")


def _names(graph: onnx.GraphProto) -> Iterator[str | bytes]:
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))


def check_wiring(model: onnx.ModelProto, where: str) -> None:
    """Every value is produced before it is used, and once: the walk may then rely on inputs and on ending."""
    from onnx import checker

    try:
        checker.check_model(model)
    except Exception as error:  # the checker's own ValidationError, or protobuf's for what it cannot serialise
        message = str(error).strip().splitlines()[0]
        raise InvalidModel(f"{where} is not a valid ONNX model: {message}; export it again") from None


def _node(proto: onnx.NodeProto, model: onnx.ModelProto) -> Node:
    from onnx import AttributeProto, helper, numpy_helper

    attributes = {
        a.name: numpy_helper.to_array(a.t) if a.type == AttributeProto.TENSOR else helper.get_attribute_value(a)
        for a in proto.attribute
    }
    if attributes.get("block_size"):
        raise UnsupportedModel(f"{proto.op_type} of {proto.input[0]} is blocked; supported: per tensor and per channel")
    if proto.op_type == "Softmax" and "axis" not in attributes:
        opset = next(opset.version for opset in model.opset_import if opset.domain in DEFAULT_DOMAIN)
        attributes["axis"] = -1 if opset >= 13 else 1
    return Node(proto.op_type, tuple(proto.input), tuple(proto.output), attributes)


def _value(constant: Node) -> NDArray[Any]:
    (name,) = _VALUES & set(constant.attributes)
    return np.asarray(constant.attributes[name], {"value_float": np.float32, "value_floats": np.float32}.get(name))
