"""Probes: small inputs on which a graph is run, to learn what its masks, positions, token types and shapes are.

A graph can compute these in ever so many ways. So their meaning is not matched but evaluated: what the model assumes of a
value is checked on the value itself, for a long sequence and for a ragged batch with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.frontend.onnx_evaluate import FloatGraph
from tilewright.frontend.onnx_graph import Graph
from tilewright.frontend.probe import RAGGED, ROLES, Probe, make_probe

_LONGEST = 192
"""Tokens of the long sequence, where the model takes as many."""

_LARGEST = 1 << 15  # tokens of a batch for which a graph may be fixed
Check = Callable[[Probe, Sequence[NDArray[Any]]], str | None]
"""What is wrong with these values of the graph, or None."""


@dataclass(frozen=True)
class Assumption:
    """What the model takes `values` of the graph to be, as a check of them, and where that is."""

    values: tuple[str, ...]
    check: Check
    where: str


class Prober:
    """Runs parts of a graph on probes."""

    def __init__(self, graph: Graph, vocabulary: int, token_types: int, positions: int) -> None:
        """Make the probes; raises UnsupportedModel for an input that is none of a BERT-like encoder.

        vocabulary, token_types, positions: rows of the tables.
        """
        self._float = FloatGraph(graph)
        inputs = {value.name: value for value in graph.model.graph.input if value.name in graph.inputs}
        self._types = {name: _dtype(value) for name, value in inputs.items()}
        batch, length = _fixed(inputs["input_ids"])
        random = np.random.default_rng(0)
        self.padding = _padding(graph)
        self._batch, self._length, self._rows = batch, length, (vocabulary, token_types, self.padding or 0)
        padded = "attention_mask" in inputs or self.padding is not None
        longest = max(1, min(_LONGEST, positions - 2))
        shapes = [(1, longest)] + [(len(RAGGED), min(RAGGED[0], longest))] * padded
        self.probes: list[Probe] = []
        for rows, columns in shapes:
            rows, columns = batch or rows, length or columns
            ragged = [min(length, columns) for length in RAGGED] if rows > 1 else [max(1, columns // 2)]
            lengths = ragged if self.probes else [columns]
            lengths = [lengths[i % len(lengths)] for i in range(rows)]
            self.probes.append(make_probe(random, lengths, columns, vocabulary, token_types, self.padding or 0))

    def at_length(self, value: str, length: int) -> NDArray[Any]:
        """A value of the graph for one sequence of `length` tokens, or of as many as the graph is fixed at."""
        probe = make_probe(
            np.random.default_rng(1), [self._length or length] * (self._batch or 1), self._length or length, *self._rows
        )
        return self._float.evaluate([self._feed(probe)], [value])[0][value]

    def _feed(self, probe: Probe) -> dict[str, NDArray[Any]]:
        return {name: probe.inputs[name].astype(dtype) for name, dtype in self._types.items()}

    def run(self, values: Sequence[str]) -> list[Mapping[str, NDArray[Any]]]:
        """Values of the graph by name, for each probe; raises InvalidModel where they cannot be computed."""
        return self._float.evaluate([self._feed(probe) for probe in self.probes], values)

    def check(self, assumptions: Sequence[Assumption], found: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Raise UnsupportedModel for the first of `assumptions` that does not hold of the values in `found`."""
        for probe, values in zip(self.probes, found, strict=True):
            for assumption in assumptions:
                wrong = assumption.check(probe, [values[name] for name in assumption.values])
                if wrong is not None:
                    raise UnsupportedModel(f"{assumption.where}: {wrong}")


def fold_scalars(graph: Graph) -> None:
    """Make constants of the scalar factors of `graph` that it computes from constants and extents, such as 1/sqrt(channels).

    Extents of channels are the same for all inputs; what differs between two inputs of other sizes is left as it is.
    """
    depends = set(graph.inputs)
    for node in graph.nodes:
        if node.op != "Shape" and depends.intersection(node.inputs):
            depends.update(node.outputs)
    factors = {name for node in graph.nodes if node.op in ("Mul", "Div") for name in node.inputs}
    open_values = sorted(name for name in factors - depends if name in graph.producers and graph.constant(name) is None)
    if not open_values:
        return
    inputs = {value.name: value for value in graph.model.graph.input if value.name in graph.inputs}
    batch, length = _fixed(inputs["input_ids"])
    shapes = [(batch or 1, length or 2), (batch or 2, length or 3)]
    feeds = [{name: np.ones(shape, _dtype(value)) for name, value in inputs.items()} for shape in shapes]
    try:
        first, second = FloatGraph(graph).evaluate(feeds, open_values)
    except InvalidModel:
        return  # the walk or the probes will say what is wrong
    for name in open_values:
        if first[name].size == second[name].size == 1 and first[name].reshape(()) == second[name].reshape(()):
            graph.constants[name] = first[name].reshape(())


def check_inputs(graph: Graph) -> None:
    """Raise UnsupportedModel unless the graph takes integers [batch, tokens] under the names of a BERT-like encoder."""
    unknown = [name for name in graph.inputs if name not in ROLES]
    if unknown or "input_ids" not in graph.inputs:
        found = ", ".join(unknown or graph.inputs) or "nothing"
        raise UnsupportedModel(f"{graph.where} takes {found}; export it with inputs named {', '.join(ROLES)}")
    for value in graph.model.graph.input:
        if value.name in graph.inputs and len(value.type.tensor_type.shape.dim) not in (0, 2):
            raise UnsupportedModel(f"input {value.name} of {graph.where} is not [batch, tokens]; export it with such inputs")


def _dtype(value: Any) -> np.dtype[Any]:
    from onnx import helper

    return np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _fixed(value: Any) -> tuple[int, int]:
    """Batch and tokens for which a graph was exported, each 0 where any will do."""
    extents = [dim.dim_value if dim.dim_value > 0 else 0 for dim in value.type.tensor_type.shape.dim] or [0, 0]
    if (extents[0] or 1) * (extents[1] or 1) > _LARGEST:
        raise UnsupportedModel(
            f"the inputs are fixed at {extents[0]} x {extents[1]} tokens; export the model with dynamic axes"
        )
    return extents[0], extents[1]


def _padding(graph: Graph) -> int | None:
    """The id that the graph compares its ids with, as it does to find padding; None if it does not."""
    for node in graph.nodes:
        if node.op == "Equal":
            constants = [graph.constants[name] for name in node.inputs if name in graph.constants]
            others = [name for name in node.inputs if name not in graph.constants]
            scalar = len(constants) == 1 and constants[0].size == 1 and constants[0].dtype.kind == "i"
            if scalar and graph.cast_input(others[0]) == "input_ids":
                return int(constants[0].reshape(()))
    return None
