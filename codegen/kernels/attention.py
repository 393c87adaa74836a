"""Multi-head attention over packed sequences: one parallel task per (head, token group), in three stages and a store.

A task finds the sequences that overlap its 16 queries and handles each in turn, keeping only the lanes that belong to it,
so no sequence needs padding and no lane sees another sequence. Lanes are queries throughout: scores, softmax and context
need no horizontal reduction, and only the finished context is transposed, as the output kernel reads it, and stored once.

Softmax weights are u8 with their largest equal to 255, and the context is divided by their integer sum: rounding them
after division by the sum would leave long sequences with a handful of distinct small weights.

What a model family adds belongs to one stage: a bias or a window of keys to `_scores`, another exponential to `_softmax`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import xor
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tilewright.codegen.formats import GROUP, Format
from tilewright.codegen.kernels.common import Expr, activation_at, arg, interleaved, prim_func, quantize, scratch, stage, store
from tilewright.codegen.kernels.math import ROUNDED_ABOVE, exp2, rounded_bits
from tilewright.codegen.workload import KernelSpec

LOWEST = -(2**31)


def attention(spec: KernelSpec, consumer: Format, max_positions: int) -> tvm.tirx.PrimFunc:
    """context = softmax(q k^T) v for `n` heads of `k` channels each.

    Arguments: query, key [G, H / pack, 16, pack] and value [G, H, 16] as the Qkv epilogue writes them, offsets
    i32[B + 1], quant f32[3] = (query scale * key scale / sqrt(k), value scale / context scale, context zero point);
    output: context u8 in the format `consumer`, 0 in lanes of no sequence.
    Blocks `score`, `total` and `context` are dot products [16, pack] x [pack] -> s32[16] for tensorize.
    """
    heads, channels, operands, size = spec.n, spec.k, spec.attention.operands, spec.attention.keys
    hidden, pack = heads * channels, operands.pack

    def body() -> None:
        groups, ends = tirx.Var("G", "int32"), tirx.Var("ends", "int32")
        packed = [groups, hidden // pack, GROUP, pack]
        query, key = arg("query", packed, operands.query), arg("key", packed, operands.key)
        value = arg("value", [groups, hidden, GROUP], operands.query)
        offsets, quant = arg("offsets", [ends], "int32"), arg("quant", [3], "float32")
        context = arg("context", consumer.shape(groups, hidden), consumer.dtype)
        with stage("attention", {"h": heads, "g": groups}) as (head, group):
            T.reads(*(buffer[tuple(slice(0, n) for n in buffer.shape)] for buffer in (query, key, value, offsets, quant)))
            T.writes(context[tuple(slice(0, n) for n in context.shape)])
            positions = -(-max_positions // size) * size + size
            task = Task(
                spec, groups, head, group, query, key, value, quant,
                scores=scratch("scores", [positions, GROUP], "int32"),
                weights=scratch("weights", [positions // pack, GROUP, pack], operands.weight),
                tile=scratch("tile", [size, GROUP], "int32"),
                sums=scratch("sums", [spec.attention.channels, GROUP], "int32"),
                largest=scratch("largest", [GROUP], "int32"),
                word=scratch("word", [GROUP], "int32"),
                ones=scratch("ones", [pack], operands.query),
                total=scratch("total", [GROUP], "int32"),
                ratio=scratch("ratio", [GROUP], "float32"),
                mixed=scratch("mixed", [channels, GROUP], consumer.dtype),
            )  # fmt: skip
            with _loop(T.unroll, "p", pack) as p:
                store(task.ones, T.cast(1, operands.query), [p])
            with _loop(T.serial, "c", channels) as c, _lanes() as i:
                store(task.mixed, T.cast(0, consumer.dtype), [c, i])
            with _loop(T.serial, "b", ends - 1) as b:
                overlaps = T.And(offsets[b + 1] > group * GROUP, offsets[b] < group * GROUP + GROUP)
                with T.If(overlaps), T.Then():
                    keys = Keys.between(offsets[b], offsets[b + 1], size)
                    _scores(task, keys)
                    _softmax(task, keys)
                    _context(task, keys)
            _store(task, context, consumer)

    return prim_func(spec, body)


@dataclass(frozen=True)
class Task:
    """What the stages of one (head, group of queries) read and what they hand to each other.

    scores s32[positions, 16] and weights [positions / pack, 16, pack] of the keys from a sequence's `Keys.first` on; largest
    s32[16] score of the sequence's own; total s32[16] of the weights; tile and sums, accumulators of scores and of the context;
    mixed [channels, 16], the context of all sequences so far.
    """

    spec: KernelSpec
    groups: Expr
    head: Expr
    group: Expr
    query: Any
    key: Any
    value: Any
    quant: Any
    scores: Any
    weights: Any
    tile: Any
    sums: Any
    largest: Any
    word: Any
    ones: Any
    total: Any
    ratio: Any
    mixed: Any

    @property
    def pack(self) -> int:
        """Products that a lane sums with one instruction."""
        return self.spec.attention.operands.pack


@dataclass(frozen=True)
class Keys:
    """The tokens of one sequence, `start` to `end`.

    They are taken from the aligned token `first` on, so that no tile or pack straddles two groups.
    """

    start: Expr
    end: Expr
    first: Expr

    @classmethod
    def between(cls, start: Expr, end: Expr, size: int) -> Keys:
        """Bind the tokens, in tiles of `size`."""
        start, end = _bind("start", start), _bind("end", end)
        return cls(start, end, _bind("first", start // size * size))

    def tiles(self, size: int) -> Expr:
        """Tiles of `size` that hold the sequence."""
        return T.ceildiv(self.end - self.first, size)

    def owns(self, token: Expr) -> Expr:
        """Whether `token` is the sequence's."""
        return T.And(token >= self.start, token < self.end)

    def whole(self, token: Expr, count: int) -> Expr:
        """Whether all `count` tokens from `token` on are the sequence's."""
        return T.And(token >= self.start, token + count <= self.end)


def _scores(task: Task, keys: Keys) -> None:
    """scores = q k^T of whole tiles of keys; largest counts the sequence's own keys only."""
    size, rows = task.spec.attention.keys, task.spec.k // task.pack

    def take_largest(block: Expr, all_own: bool) -> None:
        with _loop(T.unroll, "j", size) as j, _lanes() as i:
            score = task.tile[j, i]
            if not all_own:
                score = T.Select(keys.owns(keys.first + block * size + j), score, LOWEST)
            store(task.largest, T.max(task.largest[i], score), [i])

    with _lanes() as i:
        store(task.largest, LOWEST, [i])
    with _loop(T.serial, "block", keys.tiles(size)) as block:
        _clear(task.tile)
        with _loop(T.serial, "c", rows) as c, _loop(T.unroll, "j", size) as j, T.sblock("score"):
            vj = _axis(T.axis.spatial, "vj", size, j)
            row = _axis(T.axis.reduce, "row", task.spec.n * rows, task.head * rows + c)
            token = _axis(T.axis.spatial, "token", task.groups * GROUP, keys.first + block * size + j)
            place = token // GROUP, row, token % GROUP
            _dot(task.tile, [vj], task.query, [task.group, row], task.key, lambda p: [*place, p])
        with _loop(T.unroll, "j", size) as j, _lanes() as i:
            store(task.scores, task.tile[j, i], [block * size + j, i])
        with T.If(keys.whole(keys.first + block * size, size)):
            with T.Then():
                take_largest(block, all_own=True)
            with T.Else():
                take_largest(block, all_own=False)


def _softmax(task: Task, keys: Keys) -> None:
    """weights = 255 e**(score - largest), and ratio = value scale / context scale / their sum.

    Weights of other sequences' keys are 0, so that whole packs can be multiplied.
    """
    pack, held = task.pack, task.spec.attention.operands.weight

    def words(block: Expr, all_own: bool) -> None:
        with _lanes() as i:
            store(task.word, _weights(task, keys, block * pack, i, all_own), [i])

    with _lanes() as i:
        store(task.total, 0, [i])
    with _loop(T.serial, "block", keys.tiles(pack)) as block:
        with T.If(keys.whole(keys.first + block * pack, pack)):
            with T.Then():
                words(block, all_own=True)
            with T.Else():
                words(block, all_own=False)
        vector = tirx.reinterpret(f"{held}x{GROUP * pack}", task.word.vload([0], f"int32x{GROUP}"))
        store(task.weights, vector, [block, 0, tirx.Ramp(0, 1, GROUP * pack)])
        with T.sblock("total"):
            pair = _axis(T.axis.reduce, "pair", task.weights.shape[0], block)
            _dot(task.total, [], task.weights, [pair], task.ones, lambda p: [p])
    with _lanes() as i:
        store(task.ratio, task.quant[1] / T.cast(task.total[i], "float32"), [i])


def _weights(task: Task, keys: Keys, first: Expr, query: Expr, all_own: bool) -> Expr:
    """The weights, in one word, of `query` for a pack of keys from the one on whose scores stand at `first`."""
    shifts = range(0, 32, 32 // task.pack)

    def weight(difference: Expr) -> Expr:
        # 255 e**(difference * scale), rounded, in the low bits; as a power of two, below 1/2 all are alike
        power = T.cast(difference, "float32") * (task.quant[0] * T.float32(math.log2(math.e))) + T.float32(math.log2(255))
        return rounded_bits(exp2(T.max(power, T.float32(-8.0))))

    weights = [weight(task.scores[first + p, query] - task.largest[query]) for p in range(task.pack)]
    if not all_own:
        weights = [T.Select(keys.owns(keys.first + first + p), each, ROUNDED_ABOVE) for p, each in enumerate(weights)]
    above = reduce(xor, (ROUNDED_ABOVE << shift & 0xFFFFFFFF for shift in shifts))
    return reduce(tirx.bitwise_xor, (each << shift for each, shift in zip(weights, shifts, strict=True)), T.int32(above))


def _context(task: Task, keys: Keys) -> None:
    """mixed = weights v * ratio, quantised, in the lanes of the sequence's own queries."""
    size, pack, channels = task.spec.attention.channels, task.pack, task.spec.k
    hidden = task.spec.n * channels
    with _loop(T.serial, "block", channels // size) as block:
        _clear(task.sums)
        # group by group, within which addresses are a constant stride apart
        with _loop(T.serial, "k", T.ceildiv(keys.end, GROUP) - keys.first // GROUP) as k:
            origin = _bind("origin", keys.first // GROUP * GROUP + k * GROUP)
            skipped = _bind("skipped", T.max(keys.first - origin, 0) // pack)
            packs = T.ceildiv(T.min(keys.end - origin, GROUP), pack) - skipped
            with _loop(T.serial, "j", packs) as j, _loop(T.unroll, "c", size) as c, T.sblock("context"):
                vc = _axis(T.axis.spatial, "vc", size, c)
                channel = _axis(T.axis.spatial, "channel", hidden, task.head * channels + block * size + c)
                pair = _axis(T.axis.reduce, "pair", task.weights.shape[0], (origin - keys.first) // pack + skipped + j)
                part = _axis(T.axis.reduce, "part", GROUP // pack, skipped + j)
                group = _axis(T.axis.reduce, "group", task.groups, keys.first // GROUP + k)
                _dot(task.sums, [vc], task.weights, [pair], task.value, lambda p: [group, channel, part * pack + p])
        with _loop(T.unroll, "c", size) as c, _lanes() as i:
            real = T.cast(task.sums[c, i], "float32") * task.ratio[i]
            value = quantize(real, 0, 255, task.mixed.dtype, task.quant[2])
            place = [block * size + c, i]
            store(task.mixed, T.Select(keys.owns(task.group * GROUP + i), value, task.mixed[tuple(place)]), place)


def _store(task: Task, context: Any, consumer: Format) -> None:
    """context = mixed, in the format of the consumer: a channel at a time, or the channels of a token that stand together."""
    channels, first = task.spec.k, task.head * task.spec.k

    def place(token: Expr, channel: Expr) -> list[Expr]:
        return activation_at(consumer, task.groups, task.group, token, channel)

    if consumer.layout == "columns":
        with _loop(T.serial, "c", channels) as c, _lanes() as i:
            store(context, task.mixed[c, i], place(i, first + c))
        return
    unit = consumer.pack if consumer.layout == "packed" else task.pack
    packed = scratch("packed", [GROUP, unit], consumer.dtype)
    with _loop(T.serial, "c", channels // unit) as c:
        rows = [task.mixed.vload([c * unit + p, 0], f"{consumer.dtype}x{GROUP}") for p in range(unit)]
        store(packed, interleaved(rows), [0, tirx.Ramp(0, 1, GROUP * unit)])
        with _loop(T.unroll, "i", GROUP) as i, _loop(T.vectorized, "p", unit) as p:
            store(context, packed[i, p], place(i, first + c * unit + p))


def _dot(into: Any, row: list[Expr], vector: Any, at: list[Expr], scalar: Any, place: Callable[[Any], list[Any]]) -> None:
    """A block's body, for tensorize: into[row, i] += sum over a pack of vector[at, i, p] * scalar[place(p)], in all lanes i."""
    pack = int(vector.shape[-1])
    *outer, first = place(0)
    target = into[(*row, slice(0, GROUP))]
    T.reads(target, vector[(*at, slice(0, GROUP), slice(0, pack))], scalar[(*outer, slice(first, first + pack))])
    T.writes(target)
    with stage(f"{into.name}_dot", {"i": GROUP}, {"p": pack}) as (vi, vp):
        product = T.cast(vector[(*at, vi, vp)], "int32") * T.cast(scalar[tuple(place(vp))], "int32")
        store(into, into[(*row, vi)] + product, [*row, vi])


def _clear(tile: Any) -> None:
    with _loop(T.unroll, "j", tile.shape[0]) as j, _lanes() as i:
        store(tile, 0, [j, i])


@contextmanager
def _loop(kind: Callable[[Expr], Any], name: str, extent: Expr) -> Iterator[Expr]:
    """A loop; yields its variable, named `name`."""
    with kind(extent) as variable:
        IRBuilder.name(name, variable)
        yield variable


def _lanes() -> Any:
    """The loop over the lanes of a vector: 16 queries."""
    return _loop(T.vectorized, "i", GROUP)


def _axis(kind: Callable[[Expr, Expr], Any], name: str, extent: Expr, value: Expr) -> Expr:
    """An axis of a block, named `name`."""
    axis = kind(extent, value)
    IRBuilder.name(name, axis)
    return axis


def _bind(name: str, value: Expr) -> Expr:
    variable = T.bind(value)
    IRBuilder.name(name, variable)
    return variable
