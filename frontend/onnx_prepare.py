"""ONNX graphs in one form for the walk that recognises them: what quantisers write differently, written alike.

- Dynamic INT8 (DynamicQuantizeLinear, MatMulInteger, Cast, Mul) becomes a float MatMul with a dequantised weight.
- A dequantised row of a quantised table becomes a row of the dequantised table.
- A float weight that a Q/DQ pair quantises, as training with quantisation exports it, becomes a quantised weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite the checked `model` in place and return it."""
    if any(node.op_type in ("MatMulInteger", "DequantizeLinear", "Cast") for node in model.graph.node):
        graph = model.graph
        before = {name for node in graph.node for name in node.input}
        nodes = _used(list(_Rewriter(graph).nodes()), [output.name for output in graph.output])
        del graph.node[:]
        graph.node.extend(nodes)
        dropped = before - {name for node in graph.node for name in node.input}
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name in dropped:
                del graph.initializer[index]
    return model


class _Rewriter:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.producers = {output: node for node in graph.node for output in node.output}
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.dequantized: dict[tuple[str, str, str], str] = {}

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """The nodes of the graph in order, rewritten where need be; what nobody reads any more is still among them."""
        for node in self.graph.node:
            if node.op_type == "Mul":
                yield from self._product(node)
            elif node.op_type == "DequantizeLinear":
                yield from self._row(node)
            else:
                if node.op_type == "QuantizeLinear":
                    self._fold(node)
                yield node

    def _product(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Mul(Cast(MatMulInteger(a, b, zero points)), Mul(scales)) as MatMul of the real a and b."""
        from onnx import helper

        for left, right in (node.input, reversed(node.input)):
            if (dequantized := self._scaled(node, left, right)) is not None:
                yield dequantized
                return
            cast, scales = self.producers.get(left), self.producers.get(right)
            product = self.producers.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
            if product is None or product.op_type != "MatMulInteger" or scales is None or scales.op_type != "Mul":
                continue
            for order in (scales.input, reversed(scales.input)):
                zeros = [*product.input[2:], "", ""][:2]
                operands = [self._real(*operand) for operand in zip(product.input, order, zeros, strict=False)]
                if None not in operands:
                    yield from (made for operand in operands if operand is not None for made in operand[1])
                    names = [operand[0] for operand in operands if operand is not None]
                    yield helper.make_node("MatMul", names, node.output, name=node.name)
                    return
        yield node

    def _scaled(self, node: onnx.NodeProto, cast: str, scale: str) -> onnx.NodeProto | None:
        """Mul(Cast(integers), scales) of constants as DequantizeLinear, or None if it is something else."""
        from onnx import TensorProto, helper, numpy_helper

        widened = self.producers.get(cast)
        integers = self.tensors.get(widened.input[0]) if widened is not None and widened.op_type == "Cast" else None
        scales = self.tensors.get(scale)
        if integers is None or scales is None or integers.data_type not in (TensorProto.INT8, TensorProto.UINT8):
            return None
        axes = [axis - len(scales.dims) for axis, extent in enumerate(scales.dims) if extent > 1]
        if len(axes) > 1 or scales.data_type != TensorProto.FLOAT or len(scales.dims) > len(integers.dims):
            return None
        name = f"{scale}/flat"
        if name not in self.tensors:
            flat = numpy_helper.to_array(scales).reshape(-1 if axes else ())
            self.tensors[name] = numpy_helper.from_array(flat, name)
            self.graph.initializer.append(self.tensors[name])
        axis = len(integers.dims) + axes[0] if axes else 0
        return helper.make_node("DequantizeLinear", [integers.name, name], node.output, name=node.name, axis=axis)

    def _real(self, value: str, scale: str, zero_point: str) -> tuple[str, list[onnx.NodeProto]] | None:
        """The real value behind a quantised operand, and the nodes that make it; None where the three are of different ones."""
        from onnx import helper

        made = self.producers.get(value)
        if made is not None and made.op_type == "DynamicQuantizeLinear":
            return (made.input[0], []) if list(made.output) == [value, scale, zero_point] else None
        if value not in self.tensors or scale not in self.tensors:
            return None
        key = (value, scale, zero_point)
        if key in self.dequantized:
            return self.dequantized[key], []
        name = self.dequantized[key] = f"{value}/dequantized"
        inputs = [value, scale, *([zero_point] if zero_point else [])]
        return name, [helper.make_node("DequantizeLinear", inputs, [name], name=name)]

    def _row(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """DequantizeLinear(Gather(table, i)) as Gather(DequantizeLinear(table), i), for a quantisation per tensor."""
        from onnx import helper

        gather = self.producers.get(node.input[0])
        scale = self.tensors.get(node.input[1])
        if gather is None or gather.op_type != "Gather" or scale is None or any(extent > 1 for extent in scale.dims):
            yield node
            return
        found = self._real(gather.input[0], node.input[1], node.input[2] if len(node.input) > 2 else "")
        if found is None:
            yield node
            return
        yield from found[1]
        row = helper.make_node("Gather", [found[0], gather.input[1]], node.output, name=node.name)
        row.attribute.extend(gather.attribute)
        yield row

    def _fold(self, node: onnx.NodeProto) -> None:
        """Store what a QuantizeLinear of a constant gives as an initializer."""
        from onnx import numpy_helper

        if not all(name in self.tensors for name in node.input if name):
            return
        arrays = [numpy_helper.to_array(self.tensors[name]) for name in node.input if name]
        values, scale = arrays[:2]
        zero_point = arrays[2] if len(arrays) > 2 else np.zeros((), np.uint8)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if (
            zero_point.dtype not in (np.int8, np.uint8)
            or values.dtype != np.float32
            or scale.size not in (1, _extent(values, axis))
        ):
            return
        limits = np.iinfo(zero_point.dtype)
        shaped = [array.astype(np.float32).reshape(_shape(array, values, axis)) for array in (scale, zero_point)]
        with np.errstate(all="ignore"):  # a scale that is 0 or NaN is refused by who reads it
            quantized = np.clip(np.rint(values / shaped[0]) + shaped[1], limits.min, limits.max).astype(zero_point.dtype)
        tensor = numpy_helper.from_array(quantized, node.output[0])
        self.graph.initializer.append(tensor)
        self.tensors[tensor.name] = tensor
        del node.output[:]


def _extent(values: NDArray[Any], axis: int) -> int:
    return int(values.shape[axis]) if -values.ndim <= axis < values.ndim else 1


def _shape(array: NDArray[Any], values: NDArray[Any], axis: int) -> tuple[int, ...]:
    if array.size == 1:
        return ()
    shape = [1] * values.ndim
    shape[axis] = -1
    return tuple(shape)


def _used(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """Those of `nodes`, in order, that `outputs` depend on."""
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(name for name in node.input if name)
            kept.append(node)
    return kept[::-1]
