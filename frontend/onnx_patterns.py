"""LayerNorm and the activation functions as exporters write them: patterns, as data, and their matcher.

A pattern is matched from a value backwards. Q/DQ pairs inside are stepped over; operands of Add and Mul match in any
order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from numpy.typing import NDArray

from tilewright.codegen.model import Activation
from tilewright.frontend.onnx_graph import Graph, Pair


@dataclass(frozen=True)
class Var:
    """Any value; the same name twice must mean the same value."""

    name: str


@dataclass(frozen=True)
class Const:
    """A constant: any, if `equals` is None, else the scalar `equals` to four digits."""

    name: str
    equals: float | None = None


@dataclass(frozen=True)
class Op:
    """An operator over patterns. Inputs beyond `args` are not looked at; each attribute must have one of the given values."""

    op: str
    args: tuple[Pattern, ...]
    attributes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Either:
    """The first of several patterns that matches."""

    patterns: tuple[Pattern, ...]


Pattern = Var | Const | Op | Either


@dataclass(frozen=True)
class Match:
    """Values by name of Var and Const, the last operator's attributes, and the Q/DQ pairs stepped over inside."""

    values: Mapping[str, str]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()


def match(graph: Graph, value: str, pattern: Pattern, found: Match | None = None) -> Match | None:
    """Match the subgraph that computes `value`, or None. What a Var binds still has its Q/DQ pair, if it has one."""
    found = found or Match({})
    if isinstance(pattern, Var):
        bound = found.values.get(pattern.name)
        if bound is not None and graph.source(bound)[0] != graph.source(value)[0]:
            return None
        return Match({pattern.name: value, **found.values}, found.attributes, found.pairs)
    if isinstance(pattern, Const):
        array = graph.constant(value)
        if array is None or not (pattern.equals is None or _is_scalar(array, pattern.equals)):
            return None
        return Match({**found.values, pattern.name: value}, found.attributes, found.pairs)
    if isinstance(pattern, Either):
        return next((m for p in pattern.patterns if (m := match(graph, value, p, found)) is not None), None)
    source, pairs = graph.source(value)
    node = graph.producers.get(source)
    if node is None or node.op != pattern.op or len(node.inputs) < len(pattern.args):
        return None
    if any(node.attributes.get(key) not in allowed for key, allowed in pattern.attributes.items()):
        return None
    start = Match(found.values, found.attributes or node.attributes, found.pairs + pairs)
    orders = permutations(pattern.args) if node.op in ("Add", "Mul") else [pattern.args]
    return next((m for order in orders if (m := _match_all(graph, node.inputs, order, start)) is not None), None)


def _is_scalar(array: NDArray[Any], value: float) -> bool:
    return array.size == 1 and math.isclose(float(array.reshape(())), value, rel_tol=1e-4)


def _match_all(graph: Graph, values: tuple[str, ...], patterns: tuple[Pattern, ...], found: Match) -> Match | None:
    step: Match | None = found
    for value, pattern in zip(values, patterns, strict=False):
        if step is None:
            return None
        step = match(graph, value, pattern, step)
    return step


def op(name: str, *args: Pattern) -> Op:
    """Operator `name` over `args`."""
    return Op(name, args)


def product(*args: Pattern) -> Pattern:
    """Product of two or three factors, however it is bracketed."""
    return _bracketings("Mul", args)


def total(*args: Pattern) -> Pattern:
    """Sum of two or three terms, however it is bracketed."""
    return _bracketings("Add", args)


def _bracketings(name: str, args: tuple[Pattern, ...]) -> Pattern:
    if len(args) == 2:
        return Op(name, args)
    return Either(tuple(Op(name, (arg, _bracketings(name, args[:i] + args[i + 1 :]))) for i, arg in enumerate(args)))


X = Var("x")
_ONE, _HALF, _TWO = Const("one", 1.0), Const("half", 0.5), Const("two", 2.0)
_LAST = (-1, 2)  # of [batch, token, channel]


def _mean(x: Pattern) -> Op:
    return Op("ReduceMean", (x,), {"axes": tuple((axis,) for axis in _LAST), "keepdims": (1,)})


_DEVIATION = op("Sub", X, _mean(X))
_VARIANCE = _mean(Either((op("Pow", _DEVIATION, _TWO), op("Mul", _DEVIATION, _DEVIATION))))
_NORMALIZED = op("Div", _DEVIATION, op("Sqrt", op("Add", _VARIANCE, Const("eps"))))

LAYER_NORM: Pattern = Either(
    (
        Op("LayerNormalization", (X, Const("weight"), Const("bias")), {"axis": _LAST}),
        op("Add", op("Mul", _NORMALIZED, Const("weight")), Const("bias")),
    )
)
"""Binds x, weight, bias and, if decomposed, eps."""

_ERF = op("Erf", Either((op("Div", X, Const("root", math.sqrt(2))), op("Mul", X, Const("root", math.sqrt(0.5))))))
_SLOPE, _CUBIC = Const("slope", math.sqrt(2 / math.pi)), Const("cubic", 0.044715)
_CUBE = Either((op("Pow", X, Const("three", 3.0)), product(X, X, X)))
_POLYNOMIAL = Either(
    (
        product(_SLOPE, total(X, product(_CUBIC, _CUBE))),
        product(_SLOPE, X, total(_ONE, product(_CUBIC, X, X))),
    )
)

ACTIVATIONS: Mapping[Activation, Pattern] = {
    "relu": op("Relu", X),
    "gelu_tanh": Either(
        (Op("Gelu", (X,), {"approximate": (b"tanh",)}), product(X, _HALF, total(_ONE, op("Tanh", _POLYNOMIAL))))
    ),
    "gelu": Either((Op("Gelu", (X,), {"approximate": (None, b"none")}), product(X, _HALF, total(_ONE, _ERF)))),
}
"""Each binds x."""
