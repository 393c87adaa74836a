"""Multi-head attention over packed sequences: one parallel task per (head, token group).

A task finds the sequences that overlap its 16 queries and handles each in turn, keeping only the lanes that belong to it,
so no sequence needs padding and no lane sees another sequence. Lanes are queries throughout: scores, softmax and context
need no horizontal reduction, and only the finished context is transposed, as the output kernel reads it, and stored once.

Softmax weights are u8 with their largest equal to 255, and the context is divided by their integer sum: rounding them
after division by the sum would leave long sequences with a handful of distinct small weights.
"""

from __future__ import annotations

import math
from functools import reduce
from operator import xor
from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as T

from tilewright.codegen.formats import GROUP, Format
from tilewright.codegen.kernels.common import activation_at, interleaved, quantize
from tilewright.codegen.kernels.math import ROUNDED_ABOVE, exp2, rounded_bits
from tilewright.codegen.workload import ATTRIBUTE, KernelSpec

LOWEST = -(2**31)


def attention(spec: KernelSpec, consumer: Format, max_positions: int) -> tvm.tirx.PrimFunc:
    """context = softmax(q k^T) v for `n` heads of `k` channels each.

    Arguments: query, key [G, H / pack, 16, pack] and value [G, H, 16] as the Qkv epilogue writes them, offsets
    i32[B + 1], quant f32[3] = (query scale * key scale / sqrt(k), value scale / context scale, context zero point);
    output: context u8 in the format `consumer`, 0 in lanes of no sequence.
    Blocks `score`, `total` and `context` are dot products [16, pack] x [pack] -> s32[16] for tensorize.
    """
    heads, channels, operands, size = spec.n, spec.k, spec.attention.operands, spec.attention.tile
    pack, hidden, held, stored = operands.pack, spec.n * spec.k, operands.weight, consumer.dtype
    rows = channels // pack
    unit = consumer.pack if consumer.layout == "packed" else pack  # channels of a token that are stored together
    positions = -(-max_positions // size) * size + size
    shifts = range(0, 32, 32 // pack)  # of each weight in the word of a pack
    above = reduce(xor, (ROUNDED_ABOVE << shift & 0xFFFFFFFF for shift in shifts))

    def weight(difference: Any, scale: Any) -> Any:
        """255 e**(difference * scale), rounded, in the low bits; as a power of two, below 1/2 all are alike."""
        power = T.cast(difference, "float32") * (scale * T.float32(math.log2(math.e))) + T.float32(math.log2(255))
        return rounded_bits(exp2(T.max(power, T.float32(-8.0))))

    def weight_word(scores: Any, first: Any, largest: Any, query: Any, scale: Any, *edge: Any) -> Any:
        """Weights of the `pack` keys from `first` on, of one query in one word.

        edge: (token of the first key, start, end) of the sequence, if not all of them are its own; others weigh 0.
        """
        weights = [weight(scores[first + p, query] - largest[query], scale) for p in range(pack)]
        if edge:
            token, *ends = edge
            weights = [T.Select(own(token + p, *ends), each, ROUNDED_ABOVE) for p, each in enumerate(weights)]
        return reduce(tirx.bitwise_xor, (each << shift for each, shift in zip(weights, shifts, strict=True)), T.int32(above))

    def weight_vector(words: Any) -> Any:
        return tirx.reinterpret(f"{held}x{GROUP * pack}", words.vload([0], f"int32x{GROUP}"))

    def place(groups: Any, group: Any, token: Any, channel: Any) -> Any:
        return activation_at(consumer, groups, group, token, channel)

    def own(token: Any, start: Any, end: Any) -> Any:
        return T.And(token >= start, token < end)

    def whole(token: Any, count: int, start: Any, end: Any) -> Any:
        return T.And(token >= start, token + count <= end)

    def channel_rows(mixed: Any, channel: Any) -> Any:
        return interleaved([mixed.vload([channel + p, 0], f"{stored}x{GROUP}") for p in range(unit)])

    def output(accumulator: Any, scale: Any, zero_point: Any) -> Any:
        return quantize(T.cast(accumulator, "float32") * scale, 0, 255, stored, zero_point)

    @T.prim_func(s_tir=True)
    def attention(
        query_: T.handle,
        key_: T.handle,
        value_: T.handle,
        offsets_: T.handle,
        quant: T.Buffer((3,), "float32"),
        context_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, ATTRIBUTE: spec.key()})
        groups = T.int32()
        ends = T.int32()
        query = T.match_buffer(query_, (groups, hidden // pack, GROUP, pack), operands.query)
        key = T.match_buffer(key_, (groups, hidden // pack, GROUP, pack), operands.key)
        value = T.match_buffer(value_, (groups, hidden, GROUP), operands.query)
        offsets = T.match_buffer(offsets_, (ends,), "int32")
        context = T.match_buffer(context_, consumer.shape(groups, hidden), stored)
        for h, g in T.grid(heads, groups):
            with T.sblock("attention"):
                head, group = T.axis.remap("SS", [h, g])
                T.reads(query[:, :, :, :], key[:, :, :, :], value[:, :, :], offsets[:], quant[:])
                T.writes(context[:, :, :])
                scores = T.sblock_alloc_buffer((positions, GROUP), "int32")
                weights = T.sblock_alloc_buffer((positions // pack, GROUP, pack), held)
                tile = T.sblock_alloc_buffer((size, GROUP), "int32")
                largest = T.sblock_alloc_buffer((GROUP,), "int32")
                word = T.sblock_alloc_buffer((GROUP,), "int32")
                ones = T.sblock_alloc_buffer((pack,), operands.query)
                total = T.sblock_alloc_buffer((GROUP,), "int32")
                ratio = T.sblock_alloc_buffer((GROUP,), "float32")
                mixed = T.sblock_alloc_buffer((channels, GROUP), stored)
                packed = T.sblock_alloc_buffer((GROUP, unit), stored)
                for p in T.unroll(pack):
                    ones[p] = T.cast(1, operands.query)
                for c in T.serial(channels):
                    for i in T.vectorized(GROUP):
                        mixed[c, i] = T.cast(0, stored)
                for b in T.serial(ends - 1):
                    if offsets[b + 1] > group * GROUP and offsets[b] < group * GROUP + GROUP:
                        start: T.let = offsets[b]
                        end: T.let = offsets[b + 1]
                        # whole tiles of keys from an aligned one on, so that no tile or pack straddles two groups
                        first: T.let = start // size * size
                        # scores of whole tiles; the largest counts the sequence's own keys only
                        for i in T.vectorized(GROUP):
                            largest[i] = LOWEST
                        for block in T.serial(T.ceildiv(end - first, size)):
                            for j in T.unroll(size):
                                for i in T.vectorized(GROUP):
                                    tile[j, i] = 0
                            for c in T.serial(rows):
                                for j in T.unroll(size):
                                    with T.sblock("score"):
                                        vj = T.axis.spatial(size, j)
                                        row = T.axis.reduce(hidden // pack, head * rows + c)
                                        token = T.axis.spatial(groups * GROUP, first + block * size + j)
                                        T.reads(
                                            tile[vj, 0:GROUP],
                                            query[group, row, 0:GROUP, 0:pack],
                                            key[token // GROUP, row, token % GROUP, 0:pack],
                                        )
                                        T.writes(tile[vj, 0:GROUP])
                                        for i, p in T.grid(GROUP, pack):
                                            with T.sblock("score_dot"):
                                                vi, vp = T.axis.remap("SR", [i, p])
                                                tile[vj, vi] = tile[vj, vi] + T.cast(
                                                    query[group, row, vi, vp], "int32"
                                                ) * T.cast(key[token // GROUP, row, token % GROUP, vp], "int32")
                            for j in T.unroll(size):
                                for i in T.vectorized(GROUP):
                                    scores[block * size + j, i] = tile[j, i]
                            if whole(first + block * size, size, start, end):
                                for j in T.unroll(size):
                                    for i in T.vectorized(GROUP):
                                        largest[i] = T.max(largest[i], tile[j, i])
                            else:
                                for j in T.unroll(size):
                                    for i in T.vectorized(GROUP):
                                        largest[i] = T.max(
                                            largest[i], T.Select(own(first + block * size + j, start, end), tile[j, i], LOWEST)
                                        )
                        # weights, zero for keys of other sequences so that whole packs can be multiplied
                        for i in T.vectorized(GROUP):
                            total[i] = 0
                        for block in T.serial(T.ceildiv(end - first, pack)):
                            if whole(first + block * pack, pack, start, end):
                                for i in T.vectorized(GROUP):
                                    word[i] = weight_word(scores, block * pack, largest, i, quant[0])
                            else:
                                for i in T.vectorized(GROUP):
                                    word[i] = weight_word(
                                        scores, block * pack, largest, i, quant[0], first + block * pack, start, end
                                    )
                            weights[block, 0, T.ramp(0, 1, GROUP * pack)] = weight_vector(word)
                            with T.sblock("total"):
                                pair = T.axis.reduce(positions // pack, block)
                                T.reads(total[0:GROUP], weights[pair, 0:GROUP, 0:pack], ones[0:pack])
                                T.writes(total[0:GROUP])
                                for i, p in T.grid(GROUP, pack):
                                    with T.sblock("total_dot"):
                                        vi, vp = T.axis.remap("SR", [i, p])
                                        total[vi] = total[vi] + T.cast(weights[pair, vi, vp], "int32") * T.cast(
                                            ones[vp], "int32"
                                        )
                        for i in T.vectorized(GROUP):
                            ratio[i] = quant[1] / T.cast(total[i], "float32")
                        for block in T.serial(channels // size):
                            for c in T.unroll(size):
                                for i in T.vectorized(GROUP):
                                    tile[c, i] = 0
                            # group by group, within which addresses are a constant stride apart
                            for k in T.serial(T.ceildiv(end, GROUP) - first // GROUP):
                                origin: T.let = first // GROUP * GROUP + k * GROUP
                                skipped: T.let = T.max(first - origin, 0) // pack
                                for j in T.serial(T.ceildiv(T.min(end - origin, GROUP), pack) - skipped):
                                    for c in T.unroll(size):
                                        with T.sblock("context"):
                                            vc = T.axis.spatial(size, c)
                                            channel = T.axis.spatial(hidden, head * channels + block * size + c)
                                            pair = T.axis.reduce(positions // pack, (origin - first) // pack + skipped + j)
                                            part = T.axis.reduce(GROUP // pack, skipped + j)
                                            keys = T.axis.reduce(groups, first // GROUP + k)
                                            T.reads(
                                                tile[vc, 0:GROUP],
                                                weights[pair, 0:GROUP, 0:pack],
                                                value[keys, channel, part * pack : part * pack + pack],
                                            )
                                            T.writes(tile[vc, 0:GROUP])
                                            for i, p in T.grid(GROUP, pack):
                                                with T.sblock("context_dot"):
                                                    vi, vp = T.axis.remap("SR", [i, p])
                                                    tile[vc, vi] = tile[vc, vi] + T.cast(
                                                        weights[pair, vi, vp], "int32"
                                                    ) * T.cast(value[keys, channel, part * pack + vp], "int32")
                            for c in T.unroll(size):
                                for i in T.vectorized(GROUP):
                                    mixed[block * size + c, i] = T.Select(
                                        own(group * GROUP + i, start, end),
                                        output(tile[c, i], ratio[i], quant[2]),
                                        mixed[block * size + c, i],
                                    )
                if consumer.layout == "columns":
                    for c in T.serial(channels):
                        for i in T.vectorized(GROUP):
                            context[place(groups, group, i, head * channels + c)] = mixed[c, i]
                else:  # `unit` channels of a token at a time
                    for c in T.serial(channels // unit):
                        packed[0, T.ramp(0, 1, GROUP * unit)] = channel_rows(mixed, c * unit)
                        for i in T.unroll(GROUP):
                            for p in T.vectorized(unit):
                                context[place(groups, group, i, head * channels + c * unit + p)] = packed[i, p]

    return attention
