"""The embeddings of an ONNX graph: which table is read by what, told from the indices that the graph computes on probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.model import Embeddings, Float, LayerNorm
from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.frontend.onnx_linear import Walker
from tilewright.frontend.onnx_probe import Prober


def read_embeddings(walker: Walker, value: str, norm: LayerNorm) -> tuple[Embeddings, Prober]:
    """Read the sum of table rows that `value`, its LayerNorm `norm`, normalises; and make the prober for the tables' sizes.

    Rows are chosen by input ids, by token types or one type for all, and by position: counted from any row of the table on.
    Raises UnsupportedModel for another sum or other indices.
    """
    tables = _tables(walker, value)
    by_input = {name: table for index, table in tables if (name := walker.graph.cast_input(index)) is not None}
    others = [(index, table) for index, table in tables if walker.graph.cast_input(index) is None]
    if not by_input.keys() <= {"input_ids", "token_type_ids"} or "input_ids" not in by_input or not others:
        raise UnsupportedModel("the embeddings lack a word or a position table; supported: BERT-like encoders")
    word, types = by_input["input_ids"], by_input.get("token_type_ids")
    for _, table in tables:
        if not len(table) or table.shape[1:] != norm.weight.shape:
            shapes = " and ".join(str(list(table.shape)) for _, table in tables)
            raise InvalidModel(f"the tables of the embeddings are {shapes}, their LayerNorm is over {norm.weight.size} values")
    most = max(len(table) for _, table in others)
    prober = Prober(walker.graph, len(word), 1 if types is None else len(types), most)
    found = prober.run([index for index, _ in others])
    position: Float | None = None
    constant: list[Float] = []
    for index, table in others:
        first, counted = _rows(prober, index, found)
        if not 0 <= first < len(table):
            raise InvalidModel(f"row {first} of a table of {len(table)} rows is read by the embeddings; export the model again")
        if not counted:
            constant.append(table[first])
        elif position is None:
            position = table[first:]
            rows = prober.at_length(index, len(position))
            if (rows != first + np.arange(rows.shape[-1])).any():
                raise UnsupportedModel("positions do not count up to the end of their table; export it with 0, 1, 2, ...")
            if first:
                walker.notes.lines.append(f"positions are counted from row {first} of their table")
        else:
            raise UnsupportedModel("the embeddings add two position tables; supported: BERT-like encoders")
    if position is None or len(constant) > 1:
        raise UnsupportedModel("the embeddings lack a position table; supported: BERT-like encoders")
    if constant:
        position = position + constant[0]
        walker.notes.lines.append("added the only token type in use to the position embeddings")
    return Embeddings(word, np.ascontiguousarray(position), types, norm), prober


def _tables(walker: Walker, value: str) -> list[tuple[str, Float]]:
    """Indices and tables of the rows that are added."""
    graph = walker.graph
    tables = []
    found = walker.norm(value)
    for term in walker.terms(found.values["x"], "embeddings") if found else ():
        node = graph.node(term)
        table = graph.constant(node.inputs[0]) if node is not None and node.op == "Gather" else None
        if node is None or table is None or table.ndim != 2 or node.attributes["axis"] != 0:
            raise UnsupportedModel("the embeddings are not a sum of table rows; supported: word, position and token type")
        walker.notes.drop(graph.source(term)[1], "embeddings")
        tables.append((node.inputs[1], np.ascontiguousarray(table, np.float32)))
        graph.read |= graph.initializers & set(graph.ancestors(node.inputs[1], through_shape=False))
    return tables


def _rows(prober: Prober, index: str, found: Sequence[Mapping[str, NDArray[Any]]]) -> tuple[int, bool]:
    """First row that `index` reads, and whether it counts on from there (else it reads that one for all tokens)."""
    rows = []
    for probe, values in zip(prober.probes, found, strict=True):
        if values[index].ndim > 2 or any(
            a not in (1, b) for a, b in zip(values[index].shape[::-1], probe.ids.shape[::-1], strict=False)
        ):
            raise UnsupportedModel(f"the embeddings' index {index} is not [batch, tokens]; supported: BERT-like encoders")
        rows += probe.sequences(np.broadcast_to(values[index], probe.ids.shape).astype(np.int64))
    first = int(rows[0][0])
    if all((row == first + np.arange(len(row))).all() for row in rows):
        return first, True
    if all((row == first).all() for row in rows):
        return first, False
    raise UnsupportedModel("tokens have other positions or token types than 0, 1, 2, ... or one for all; export such a model")
