"""Self-attention of an ONNX graph, read backwards from the context that enters the output Linear."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import UnsupportedModel
from tilewright.frontend.onnx_graph import Node, Pair
from tilewright.frontend.onnx_linear import Walker
from tilewright.frontend.onnx_probe import Assumption
from tilewright.frontend.probe import Probe

_SPLIT_HEADS = (0, 2, 1, 3)  # [batch, token, head, channel] -> [batch, head, token, channel]
_KEYS = (0, 2, 3, 1)
_SWAPPED = (0, 1, 3, 2)
_MINUS_INFINITY = -1000.0  # a logit this much lower has probability 0 in float32


@dataclass
class Chain:
    """What lies between an operand of an attention product and the Linear that computes it.

    operand = transpose(reshape(value), perm) * factor; `scale` is the symmetric s8 scale of value that covers the range
    of the quantised operand, None if it is not quantised.
    """

    value: str
    factor: float = 1.0
    perm: tuple[int, ...] = (0, 1, 2, 3)
    shape: str | None = None
    scale: float | None = None


@dataclass(frozen=True)
class AttentionValues:
    """The chains down to the query, key and value Linears, and the number of heads."""

    query: Chain
    key: Chain
    value: Chain
    num_heads: int


@dataclass(frozen=True)
class _Mask:
    """What decides over keys: `added` to the logits, or `filled` in where a condition is the value `fills` of it."""

    added: str | None = None
    condition: str | None = None
    fills: bool = False
    filled: str | None = None

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(value for value in (self.added, self.condition, self.filled) if value is not None)


@dataclass
class _Scores:
    product: Node
    factor: float
    masks: list[_Mask] = field(default_factory=list)
    pairs: tuple[Pair, ...] = ()


def read_attention(walker: Walker, context: str, hidden: int, where: str) -> AttentionValues:
    """Read the attention whose context is `context` [batch, token, hidden].

    Raises UnsupportedModel if the graph is not scaled dot-product attention with a mask: other scale, position bias.
    """
    # the pair kept on the context is the input quantisation of the output Linear
    merged = _chain(walker, context, f"{where} context")
    product = walker.graph.producers.get(merged.value)
    if product is None or product.op != "MatMul" or merged.perm != _SPLIT_HEADS or merged.factor != 1.0:
        raise _unsupported(where, "the context is not a product of probabilities and values over heads")
    scores = _softmax_input(walker, product.inputs[0], where)
    query = _chain(walker, scores.product.inputs[0], f"{where} query")
    key = _chain(walker, scores.product.inputs[1], f"{where} key")
    value = _chain(walker, product.inputs[1], f"{where} value")
    if (query.perm, key.perm, value.perm) != (_SPLIT_HEADS, _KEYS, _SPLIT_HEADS) or value.factor != 1.0:
        raise _unsupported(where, "query, key and value are not split into heads as [batch, head, token, channel]")
    heads = _num_heads(walker, query.shape, hidden, where)
    scale = query.factor * key.factor * scores.factor
    if not math.isclose(scale, 1 / math.sqrt(hidden / heads), rel_tol=1e-3):
        raise _unsupported(where, f"the logits are scaled by {scale:.6g}, expected 1/sqrt({hidden // heads})")
    for mask in scores.masks:
        _check_source(walker, mask, where)
    _assume(walker, scores.masks, (query, key, value, merged), (heads, hidden // heads), f"{where} attention")
    return AttentionValues(query, key, value, heads)


def _assume(walker: Walker, masks: list[_Mask], chains: tuple[Chain, ...], sizes: tuple[int, int], where: str) -> None:
    """Assume of the graph's values that masks keep the keys of attention_mask, and that reshapes split and join heads."""

    def keeps(probe: Probe, values: Sequence[NDArray[Any]]) -> str | None:
        return _wrong_mask(probe, masks, iter(values))

    walker.assumptions.append(Assumption(tuple(value for mask in masks for value in mask.values), keeps, where))
    *operands, merged = chains
    for chain, last in (*((operand, sizes) for operand in operands), (merged, (sizes[0] * sizes[1],))):
        if chain.shape is None:
            raise _unsupported(where.removesuffix(" attention"), "heads are not split and joined by one reshape each")
        reshapes = partial(_wrong_shape, last)
        walker.assumptions.append(Assumption((chain.shape,), reshapes, where))


def _wrong_shape(last: tuple[int, ...], probe: Probe, values: Sequence[NDArray[Any]]) -> str | None:
    """Whether a reshape of [batch, token, ...] does not keep the first two axes and end in `last`."""
    expected = (*probe.ids.shape, *last)
    target = tuple(int(extent) for extent in values[0].reshape(-1))
    # 0 keeps an extent, -1 stands for what is left over
    kept = tuple(
        extent if given == 0 and axis < 2 else given for axis, (given, extent) in enumerate(zip(target, expected, strict=False))
    )
    fits = len(target) == len(expected) and target.count(-1) <= 1
    if fits and all(given in (-1, extent) for given, extent in zip(kept, expected, strict=True)):
        return None
    return f"values of {list(probe.ids.shape)} tokens are reshaped to {list(target)}, expected {list(expected)}"


def _wrong_mask(probe: Probe, masks: Sequence[_Mask], values: Iterator[NDArray[Any]]) -> str | None:
    """Whether `masks`, whose values come one after the other, keep other keys than attention_mask does."""
    batch, length = probe.ids.shape
    keep = np.ones((batch, 1, length, length), bool)
    for mask in masks:
        if mask.added is not None:
            added = next(values)
            kept = added == 0
            if not (kept | (added <= _MINUS_INFINITY)).all():
                return "what is added to the logits is neither 0 nor minus infinity: a bias, or a decay by distance"
        else:
            condition, filled = next(values).astype(bool), next(values)
            kept = condition != mask.fills
            if not (filled <= _MINUS_INFINITY).all():
                return "masked logits are not set to minus infinity"
        if not _broadcasts(kept.shape, (batch, kept.shape[-3] if kept.ndim > 2 else 1, length, length)):
            return f"the mask is {list(kept.shape)}, expected [{batch}, 1, 1 or {length}, {length}]"
        keep = keep & kept
    expected = np.broadcast_to(probe.valid[:, None, None, :], keep.shape)
    rows = np.broadcast_to(probe.valid[:, None, :, None], keep.shape)  # what padding attends to matters to nobody
    if (keep != expected)[rows].any():
        return "the mask is another than that of attention_mask's padding: causal, windowed, inverted or learnt"
    return None


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= 4 and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))


def _chain(walker: Walker, value: str, where: str) -> Chain:
    """Walk from an operand to its Linear. The Q/DQ pair nearest to the operand is kept, the others are dropped."""
    chain = Chain(value)
    while True:
        source, pairs = walker.graph.source(chain.value)
        if pairs and chain.scale is None:
            chain.scale = _symmetric_scale(pairs[0]) / abs(chain.factor)
            pairs = pairs[1:]
        walker.notes.drop(pairs, where)
        chain.value = source
        node = walker.graph.producers.get(source)
        if node is None or node.op in ("Add", "Gemm", "MatMul"):
            return chain
        factor = _scalar_factor(walker, node)
        if factor is not None:
            chain.value, chain.factor = factor[0], chain.factor * factor[1]
        elif node.op == "Transpose" and len(node.attributes.get("perm", ())) == 4:
            chain.value, chain.perm = node.inputs[0], tuple(node.attributes["perm"][axis] for axis in chain.perm)
        elif (inner := _last_axes_swapped(walker, node)) is not None:
            walker.assumptions.append(Assumption((source, inner), _not_swapped, where))
            chain.value, chain.perm = inner, tuple(_SWAPPED[axis] for axis in chain.perm)
        elif node.op == "Reshape" and chain.shape is None:
            chain.value, chain.shape = node.inputs[0], node.inputs[1]
        elif node.op == "Reshape":
            walker.assumptions.append(Assumption((source, node.inputs[0]), _reshaped, where))
            chain.value = node.inputs[0]
        else:
            raise _unsupported(where, f"{node.op} between a Linear and its attention product")


def _last_axes_swapped(walker: Walker, node: Node) -> str | None:
    """Match a transpose of the last two of four axes that is done on three: the value [batch, head, ., .] before it."""
    transpose = walker.graph.node(node.inputs[0]) if node.op == "Reshape" else None
    if transpose is None or transpose.op != "Transpose" or tuple(transpose.attributes.get("perm", ())) != (0, 2, 1):
        return None
    reshape = walker.graph.node(transpose.inputs[0])
    return reshape.inputs[0] if reshape is not None and reshape.op == "Reshape" else None


def _not_swapped(probe: Probe, values: Sequence[NDArray[Any]]) -> str | None:
    after, before = values
    if before.ndim == 4 and np.array_equal(after, before.transpose(_SWAPPED)):
        return None
    return f"{list(before.shape)} is reshaped and transposed to {list(after.shape)}; expected a transpose of the last two axes"


def _reshaped(probe: Probe, values: Sequence[NDArray[Any]]) -> str | None:
    """Whether a second reshape is more than one to the shape that there is, as exporters write them."""
    after, before = values
    return None if after.shape == before.shape else f"{list(before.shape)} is reshaped to {list(after.shape)}"


def _softmax_input(walker: Walker, probabilities: str, where: str) -> _Scores:
    graph = walker.graph
    source, pairs = graph.source(probabilities)
    node = graph.producers.get(source)
    # exporters guard rows that are masked altogether: Where(IsNaN(p), 0, p)
    if node is not None and node.op == "Where" and graph.scalar(node.inputs[1]) == 0:
        guard, (source, more) = graph.node(node.inputs[0]), graph.source(node.inputs[2])
        if guard is not None and guard.op == "IsNaN" and graph.source(guard.inputs[0])[0] == source:
            node, pairs = graph.producers.get(source), pairs + more
    if node is None or node.op != "Softmax" or node.attributes["axis"] not in (-1, 3):
        raise _unsupported(where, "the probabilities are not a softmax over the keys")
    walker.notes.drop(pairs, f"{where} probabilities")
    scores = _scores(walker, node.inputs[0])
    if scores is None:
        raise _unsupported(where, "the softmax is not over a masked product of queries and keys")
    walker.notes.drop(scores.pairs, f"{where} logits")
    return scores


def _scores(walker: Walker, value: str) -> _Scores | None:
    """Walk from the softmax's input over masks and constant factors to the product of queries and keys."""
    source, pairs = walker.graph.source(value)
    node = walker.graph.producers.get(source)
    if node is None:
        return None
    if node.op == "MatMul":
        return _Scores(node, 1.0, [], pairs)
    found = None
    if (factor := _scalar_factor(walker, node)) is not None:
        if (found := _scores(walker, factor[0])) is not None:
            found.factor *= factor[1]
    elif node.op in ("Add", "Where"):
        first, second = node.inputs[-2:]
        for operand, other, fills in ((first, second, False), (second, first, True)):
            if (found := _scores(walker, operand)) is not None:
                filling = _Mask(condition=node.inputs[0], fills=fills, filled=other)
                found.masks.append(_Mask(added=other) if node.op == "Add" else filling)
                break
    if found is not None:
        found.pairs += pairs
    return found


def _scalar_factor(walker: Walker, node: Node) -> tuple[str, float] | None:
    """Match a multiplication with (division by) a constant scalar: the other operand and the factor."""
    if node.op == "Div" and (divisor := walker.graph.scalar(node.inputs[1])):
        return node.inputs[0], 1 / divisor
    if node.op == "Mul":
        for value, other in (node.inputs, node.inputs[::-1]):
            if (factor := walker.graph.scalar(other)) is not None:
                return value, factor
    return None


def _symmetric_scale(pair: Pair) -> float:
    """Scale of the s8 quantisation with zero point 0 that covers the range of `pair`."""
    return max(pair.zero_point, 255 - pair.zero_point) * pair.scale / 127


def _num_heads(walker: Walker, shape: str | None, hidden: int, where: str) -> int:
    """Read the number of heads from the target shape [batch, token, heads, channels] of a Reshape."""
    extents: list[int | None] = []
    constant = walker.graph.constants.get(shape or "")
    node = walker.graph.producers.get(shape or "")
    if constant is not None:
        extents = [int(extent) for extent in constant.reshape(-1)]
    elif node is not None and node.op == "Concat":
        for part in node.inputs:
            known = walker.graph.constants.get(part)
            extents += [None] if known is None else [int(extent) for extent in known.reshape(-1)]
    if len(extents) == 4:
        heads, channels = ((extent if extent and extent > 0 else None) for extent in extents[2:])
        heads = heads or (hidden // channels if channels else None)
        if heads and hidden % heads == 0:
            return heads
    raise _unsupported(where, "the number of heads is not a constant of the graph; simplify the graph first")


def _check_source(walker: Walker, mask: _Mask, where: str) -> None:
    """Raise UnsupportedModel if `mask` holds learnt values or hidden states, and name them; the rest is used by it."""
    graph = walker.graph
    for name in mask.values:
        for value in graph.ancestors(name, through_shape=False):
            array, node = graph.constants.get(value), graph.producers.get(value)
            if (array is not None and array.dtype.kind == "f" and array.size > 1) or (node and node.op == "MatMul"):
                raise _unsupported(where, f"a learnt position bias ({value}) is added to the logits")


def _unsupported(where: str, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{where} attention: {what}; supported: BERT-like scaled dot-product self-attention")
