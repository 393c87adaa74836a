"""Linears of an ONNX graph: the sum of a product with a constant, a bias and what is added to them, to `Linear`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.block_sparse import detect_block
from tilewright.codegen.model import Float, LayerNorm, Linear, Quantization
from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.frontend.onnx_graph import Graph, Pair, QuantizedConstant
from tilewright.frontend.onnx_patterns import LAYER_NORM, Match, match
from tilewright.frontend.onnx_probe import Assumption

_KINDS = {
    "LayerNormalization": "LayerNorm outputs (the residual stream stays float32)",
    "Gather": "embeddings (they stay float32)",
    "MatMul": "MatMul outputs (they stay float32)",
    "Softmax": "Softmax outputs (probabilities are quantised relative to their row's largest)",
}
"""What a dropped Q/DQ pair was on, by the operator that produced it, and what becomes of the value."""


@dataclass(frozen=True)
class Product:
    """`x` times a constant, not yet read: the value names, and whether the constant is [N, K] rather than [K, N]."""

    x: str
    weight: str
    transposed: bool
    bias: Float | None


@dataclass
class Notes:
    """What the walk over a graph changed: Q/DQ pairs by the kind of value they were on and the place, and free text."""

    dropped: dict[str, dict[str, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    lines: list[str] = field(default_factory=list)

    def drop(self, pairs: tuple[Pair, ...], where: str) -> None:
        """Record that the values at `where`, such as "layer 0 query", stay float32 although `pairs` quantise them."""
        for pair in pairs:
            self.dropped[_KINDS.get(pair.producer, f"{pair.producer} outputs (they stay float32)")][where].add(pair.output)

    def report(self) -> tuple[str, ...]:
        """One line per kind of value, then the free text."""
        lines = []
        for kind, places in self.dropped.items():
            count = sum(len(outputs) for outputs in places.values())
            plural = "pair" if count == 1 else "pairs"
            lines.append(f"dropped {count} Q/DQ {plural} on {kind}: {_grouped(places)}")
        return (*lines, *self.lines)


class Walker:
    """Reads Linears and LayerNorms backwards from values of a graph."""

    def __init__(self, graph: Graph) -> None:
        """Start without notes."""
        self.graph = graph
        self.notes = Notes()
        self.assumptions: list[Assumption] = []
        self.exact: dict[str, Float] = {}  # real weights [N, K] of the Linears whose integers had to be changed
        self._norms: dict[str, Match | None] = {}

    def norm(self, value: str) -> Match | None:
        """Match a LayerNorm that ends in `value`, Q/DQ pairs on it ignored."""
        source, _ = self.graph.source(value)
        if source not in self._norms:
            self._norms[source] = match(self.graph, source, LAYER_NORM)
        return self._norms[source]

    def layer_norm(self, found: Match) -> LayerNorm:
        """Parameters of a matched LayerNorm."""
        weight, bias = (self.graph.constant(found.values[name]) for name in ("weight", "bias"))
        eps = self.graph.scalar(found.values["eps"]) if "eps" in found.values else found.attributes.get("epsilon", 1e-5)
        assert weight is not None and bias is not None and eps is not None  # the pattern matched them as constants
        if not 0 <= eps < np.inf:
            raise InvalidModel(f"a LayerNorm has eps {eps}; it is a small positive number")
        return LayerNorm(weight.astype(np.float32), bias.astype(np.float32), float(eps))

    def terms(self, value: str, where: str | None = None) -> list[str]:
        """Terms of the sum that ends in `value`, however it is bracketed; a LayerNorm counts as one term.

        The Q/DQ pairs on the sums are recorded as dropped at `where`, if given.
        """
        source, pairs = self.graph.source(value)
        node = self.graph.producers.get(source)
        if node is None or node.op != "Add" or self.norm(source) is not None:
            return [value]
        if where is not None:
            self.notes.drop(pairs, where)
        return [term for operand in node.inputs for term in self.terms(operand, where)]

    def product(self, value: str, where: str) -> tuple[Product, list[str]] | None:
        """Product with a constant matrix and its bias in the sum that ends in `value`, and the other terms of the sum.

        None if the sum holds no such product or several.
        """
        products, biases, rest = [], [], []
        for term in self.terms(value, where):
            array = self.graph.constant(term)
            if (product := self._product(term)) is not None:
                self.notes.drop(self.graph.source(term)[1], where)
                products.append(product)
            elif array is not None and array.ndim == 1:
                biases.append(array.astype(np.float32))
            else:
                rest.append(term)
        if len(products) != 1 or len(biases) + (products[0].bias is not None) > 1:
            return None
        found = products[0]
        bias = found.bias if found.bias is not None else biases[0] if biases else None
        return Product(found.x, found.weight, found.transposed, bias), rest

    def linear(self, product: Product, name: str, where: str) -> Linear:
        """Build the encoder's Linear `name`, quantised if its weight is, with its input if that is, too.

        Raises UnsupportedModel if only the input is, or if the quantisation is not per tensor or per output channel.
        """
        pairs = self.graph.source(product.x)[1]
        constant = self.graph.quantized(product.weight)
        if constant is None:
            if pairs:
                raise UnsupportedModel(
                    f"{where}: the input but not the weight is quantised; quantise both statically, or neither"
                )
            return self.float_linear(product, name)
        self.notes.drop(pairs[1:], where)
        weight, scale = self._int8(constant, product.transposed, name, where)
        return Linear(
            name=name,
            weight=weight,
            bias=self._bias(product, len(weight)),
            scale=scale,
            input=Quantization(pairs[0].scale, pairs[0].zero_point) if pairs else None,
            block=detect_block(weight),
        )

    def float_linear(self, product: Product, name: str) -> Linear:
        """Linear `name` in float32, dequantised if need be."""
        array = self.graph.constant(product.weight)
        assert array is not None  # _product matched it as a constant
        weight = np.ascontiguousarray(array if product.transposed else array.T, np.float32)
        return Linear(name, weight, self._bias(product, len(weight)), block=detect_block(weight))

    def _product(self, value: str) -> Product | None:
        node = self.graph.node(value)
        if node is None or node.op not in ("MatMul", "Gemm"):
            return None
        weight = self.graph.constant(node.inputs[1])
        if weight is None or weight.ndim != 2:
            return None
        if node.op == "MatMul":
            return Product(node.inputs[0], node.inputs[1], False, None)
        options = node.attributes
        if options.get("transA", 0) or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
            return None
        bias = self.graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        bias = None if bias is None else bias.reshape(-1).astype(np.float32)
        return Product(node.inputs[0], node.inputs[1], bool(options.get("transB", 0)), bias)

    def _bias(self, product: Product, n: int) -> Float:
        return np.zeros(n, np.float32) if product.bias is None else product.bias

    def _int8(self, constant: QuantizedConstant, transposed: bool, name: str, where: str) -> tuple[NDArray[np.int8], Float]:
        """Weight s8[N, K] in -127..127 and scale f32[N]."""
        values = constant.values if transposed else constant.values.T
        axis = constant.axis if transposed else 1 - constant.axis
        if constant.scale.size > 1 and axis != 0:
            raise UnsupportedModel(f"{where}: the weight is quantised per input channel; use per tensor or per output channel")
        values = values - constant.zero_point.reshape(-1, 1)
        scale = np.ascontiguousarray(np.broadcast_to(constant.scale.reshape(-1), len(values)))
        if values.min() >= -127 and values.max() <= 127:
            return np.ascontiguousarray(values, np.int8), scale
        self.exact[name] = values.astype(np.float32) * scale[:, None]
        if values.min() >= -128 and values.max() <= 127:
            # saturating moves one weight by one step; a new scale would move every weight of the channel
            count = int((values == -128).sum())
            self.notes.lines.append(f"saturated {count} weights of -128 to -127 in {where}")
            return np.ascontiguousarray(np.maximum(values, -127), np.int8), scale
        largest = np.abs(values).max(axis=1).astype(np.float32)
        self.notes.lines.append(f"requantised the asymmetric weight of {where} to symmetric per channel")
        factor = 127.0 / np.maximum(largest, 1.0)
        requantized = np.rint(values * factor[:, None]).astype(np.int8)
        return np.ascontiguousarray(requantized), (scale / factor).astype(np.float32)


def _grouped(places: dict[str, Any]) -> str:
    """Places such as "layer 0 query" grouped by layer, layers with the same places together."""
    layers: dict[str, list[str]] = {}
    for place in places:
        head, _, rest = place.partition(" ")
        if head == "layer":
            number, _, rest = rest.partition(" ")
            layers.setdefault(number, []).append(rest)
    groups: dict[str, list[str]] = {}
    for number, parts in layers.items():
        groups.setdefault(", ".join(parts), []).append(number)
    texts = [f"layer{'s' if len(numbers) > 1 else ''} {_span(numbers)} ({parts})" for parts, numbers in groups.items()]
    return "; ".join([*(place for place in places if not place.startswith("layer ")), *texts])


def _span(numbers: list[str]) -> str:
    consecutive = int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1
    return f"{numbers[0]}-{numbers[-1]}" if consecutive and len(numbers) > 1 else ", ".join(numbers)
