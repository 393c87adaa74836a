"""A small module on the calling convention of docs/architecture.md, for tests that need an artifact but no model.

hidden[t] = table[input_ids[t]] + position + 100 * token type; score[t] = hidden[t, 0]; total = the sequence's sum of
hidden, plus the first element of each page of the shift, which is 0.
Also a program: `python -m tests.toy OUT.tw` writes the artifact.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilewright.manifest import Head, LayerRecord, LevelRecord, Limits, Manifest, Output, Parameter
from tilewright.program import KernelCall, Program, Value

WIDTH = 8
LIMITS = Limits(vocab_size=100, max_positions=32, max_tokens=64, token_types=2)
TABLE = np.arange(LIMITS.vocab_size * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
SHIFT = np.arange(3, dtype=np.int8)  # makes the file need a gap before the table; a larger one makes the toy heavy
PAGE = 4096  # bytes


def parameters(shift: int = len(SHIFT), width: int = WIDTH) -> dict[str, Parameter]:
    """The toy's parameters, with so many elements in the shift and columns in the table."""
    return {
        "shift": Parameter("shift", "int8", (shift,)),
        "table": Parameter("table", "float32", (LIMITS.vocab_size, width), "vocab_size"),
    }


def program(width: int = WIDTH) -> Program:
    """What the main function of `build_library` is: three kernels, none of whose results share memory."""
    return Program(
        values=(
            Value(0, "float32", ("groups", 16, width)),
            Value(1, "float32", ("groups", 16, 1)),
            Value(2, "float32", ("sequences", width)),
        ),
        calls=(
            KernelCall("hidden", ("input_ids", "position_ids", "token_type_ids", "table", 0)),
            KernelCall("score", (0, 1)),
            KernelCall("total", (0, "offsets", "shift", 2)),
        ),
        outputs=(0, 1, 2),
    )


MANIFEST = Manifest(
    levels=(
        LevelRecord(
            "portable",
            ("sse2",),
            "model.portable.so",
            parameters(),
            (LayerRecord("toy", (WIDTH, WIDTH), (4, 1), 0.2, "gather", "default"),),
            program=program(),
        ),
    ),
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    outputs=(
        Output("hidden", "token", WIDTH),
        Output("score", "token", 1, squeeze=True),
        Output("total", "sequence", WIDTH),
    ),
    limits=LIMITS,
)

TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
 "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
 "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2, "c": 3}, "unk_token": "[UNK]"}}"""


def expected(ids: list[int], types: list[int] | None = None) -> dict[str, np.ndarray]:
    """What the module must return for one sequence."""
    positions = np.arange(len(ids), dtype=np.float32)[:, None]
    hidden = TABLE[ids] + positions + 100 * np.array(types or [0] * len(ids), np.float32)[:, None]
    return {"hidden": hidden, "score": hidden[:, 0], "total": hidden.sum(0)}


def build_library(path: Path, shift: int = len(SHIFT), positions: int = 1, width: int = WIDTH) -> Path:
    """Compile the toy module to a shared object: so many elements in the shift, what a position counts, columns of hidden."""
    import tvm
    from tvm.script import ir as I
    from tvm.script import relax as R
    from tvm.script import tirx as T

    from tilewright.codegen.build import build

    step = positions

    # fmt: off
    @I.ir_module
    class Toy:
        @T.prim_func(private=True, s_tir=True)
        def hidden(ids_: T.handle, positions_: T.handle, types_: T.handle, table_: T.handle, out_: T.handle):
            T.func_attr({"tirx.noalias": True})
            G = T.int64()
            ids = T.match_buffer(ids_, (G, 16), "int32")
            positions = T.match_buffer(positions_, (G, 16), "int32")
            types = T.match_buffer(types_, (G, 16), "int32")
            table = T.match_buffer(table_, (100, width), "float32")
            out = T.match_buffer(out_, (G, 16, width), "float32")
            for g in T.parallel(G):
                for t, c in T.grid(16, width):
                    with T.sblock("hidden"):
                        vg, vt, vc = T.axis.remap("SSS", [g, t, c])
                        out[vg, vt, vc] = table[ids[vg, vt], vc] + T.Cast(
                            "float32", step * positions[vg, vt] + 100 * types[vg, vt])

        @T.prim_func(private=True, s_tir=True)
        def score(hidden_: T.handle, out_: T.handle):
            T.func_attr({"tirx.noalias": True})
            G = T.int64()
            hidden = T.match_buffer(hidden_, (G, 16, width), "float32")
            out = T.match_buffer(out_, (G, 16, 1), "float32")
            for g, t, c in T.grid(G, 16, 1):
                with T.sblock("score"):
                    vg, vt, vc = T.axis.remap("SSS", [g, t, c])
                    out[vg, vt, vc] = hidden[vg, vt, vc]

        @T.prim_func(private=True, s_tir=True)
        def total(hidden_: T.handle, offsets_: T.handle, shift_: T.handle, out_: T.handle):
            T.func_attr({"tirx.noalias": True})
            G = T.int64()
            ends = T.int64()
            B = T.int64()
            hidden = T.match_buffer(hidden_, (G, 16, width), "float32")
            offsets = T.match_buffer(offsets_, (ends,), "int32")
            shift_values = T.match_buffer(shift_, (shift,), "int8")
            out = T.match_buffer(out_, (B, width), "float32")
            for b, c in T.grid(B, width):
                with T.sblock("total"):
                    vb, vc = T.axis.remap("SS", [b, c])
                    out[vb, vc] = T.float32(0)
                    for p in range(-(-shift // PAGE)):
                        out[vb, vc] = out[vb, vc] + T.Cast("float32", shift_values[p * PAGE])
                    for t in range(offsets[vb + 1] - offsets[vb]):
                        out[vb, vc] = out[vb, vc] + hidden[(offsets[vb] + t) // 16, (offsets[vb] + t) % 16, vc]

        @R.function
        def main(
            input_ids: R.Tensor(("G", 16), "int32"),
            position_ids: R.Tensor(("G", 16), "int32"),
            token_type_ids: R.Tensor(("G", 16), "int32"),
            offsets: R.Tensor(("ends",), "int32"),
            params: R.Tuple(R.Tensor((shift,), "int8"), R.Tensor((100, width), "float32")),
        ):
            R.func_attr({"tir_var_upper_bound": {"G": 4}})
            G = T.int64()
            ends = T.int64()
            with R.dataflow():
                h = R.call_tir(
                    Toy.hidden, (input_ids, position_ids, token_type_ids, params[1]), R.Tensor((G, 16, width), "float32"))
                score = R.call_tir(Toy.score, (h,), R.Tensor((G, 16, 1), "float32"))
                total = R.call_tir(Toy.total, (h, offsets, params[0]), R.Tensor((ends - 1, width), "float32"))
                R.output(h, score, total)
            return (h, score, total)
    # fmt: on

    built = build(Toy, tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"}), path, tuple(parameters()))
    assert built == program(width)
    return path


def served(head: Head, *outputs: Output, labels: tuple[str, ...] = ()) -> Manifest:
    """The toy as a model with a head; `outputs` name hidden, score and total, the first as wide as the table of its library."""
    (level,) = MANIFEST.levels
    width = outputs[0].width
    levels = (replace(level, parameters=parameters(width=width), program=program(width)),)
    return replace(MANIFEST, levels=levels, outputs=outputs, head=head, labels=labels)


def write(path: Path, library: Path, manifest: Manifest | None = None, shift: NDArray[np.int8] = SHIFT) -> Path:
    """Write the toy's artifact; all its levels have the same code."""
    from tilewright.codegen.artifact import write_artifact

    if manifest is None:
        (level,) = MANIFEST.levels
        manifest = replace(MANIFEST, levels=(replace(level, parameters=parameters(len(shift))),))
    table = manifest.levels[0].parameters.get("table")
    width = table.shape[1] if table is not None else WIDTH
    libraries = {level.name: library for level in manifest.levels}
    weights = {"shift": shift, "table": np.ascontiguousarray(TABLE[:, :width])}
    write_artifact(path, libraries=libraries, weights=weights, manifest=manifest, tokenizer=TOKENIZER)
    return path


if __name__ == "__main__":
    output = Path(sys.argv[1])
    write(output, build_library(output.with_suffix(".so")))
