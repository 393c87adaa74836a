"""What a kernel is called: `KernelSpec`, all that changes its code, and `Workload`, the task a tuning record is about."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from tilewright.codegen.decisions import AttentionDecisions, Block, LinearDecisions, TokenBucket
from tilewright.codegen.formats import GROUP, Layout

PARTS = 64
"""Parts of equal work that a sparse matrix's row-blocks are divided into, for schedules to hand to threads."""

SCHEMA = 2
"""Version of `Workload.key()`; part of every tuning record."""

ATTRIBUTE = "tilewright.kernel"
"""PrimFunc attribute that carries the spec's key, for people who read a module."""


@dataclass(frozen=True)
class Workload:
    """The task that a tuning record is about: what is asked of a kernel, and what only guides the choice of its decisions.

    block: the sparse block found (outputs, inputs), None if dense. density: percent of non-zero blocks rounded up to a multiple
    of 5 (`density_bucket`). epilogue: label of what follows the product, with the formats it writes. tokens: bucket of tokens,
    0 for any. threads: 0 for any.
    """

    op: str
    n: int
    k: int
    isa: str
    epilogue: str = ""
    block: Block | None = None
    density: int = 100
    tokens: int = 0
    threads: int = 0

    def at(self, tokens: int, threads: int) -> Workload:
        """The task for a bucket of tokens on so many threads."""
        return replace(self, tokens=tokens, threads=threads)

    def key(self) -> str:
        """The key of tuning records: one line, stable across processes and TVM versions."""
        return (
            f"v{SCHEMA}:{self.op}:{self.n}x{self.k}:{_block(self.block)}:d{self.density}:{self.epilogue or '-'}:"
            f"t{self.tokens}:c{self.threads}:{self.isa}"
        )

    @staticmethod
    def parse(key: str) -> Workload:
        """The workload of a key; raises ValueError, also for one of another version."""
        found = re.fullmatch(_KEY, key)
        if found is None:
            raise ValueError(f"{key!r} is no key of a workload, version {SCHEMA}")
        op, n, k, outputs, inputs, density, epilogue, tokens, threads, isa = found.groups()
        block = None if outputs is None else (int(outputs), int(inputs))
        label = "" if epilogue == "-" else epilogue
        return Workload(op, int(n), int(k), isa, label, block, int(density), int(tokens), int(threads))


_KEY = rf"v{SCHEMA}:(\w+):(\d+)x(\d+):(?:dense|(\d+)x(\d+)):d(\d+):([^:]+):t(\d+):c(\d+):(\w+)"


@dataclass(frozen=True)
class KernelSpec:
    """The identity of a kernel: all that changes its code, free of the weights' values and of the number of tokens.

    Layers whose specs are equal share one compiled kernel.
    op: a key of `RULES` in `schedules/apply.py`. n, k: outputs and inputs (heads and head size for attention, words and
    channels for embedding). epilogue: label of what follows the product, with the formats it writes. residual: layout of the
    float32 stream, where the kernel has a LayerNorm. decisions: what was chosen, for ops that have choices. buckets: what was
    chosen otherwise for calls of few tokens, fewest first, of a linear kernel; `decisions` is for all others.
    """

    op: str
    n: int
    k: int
    isa: str
    epilogue: str = ""
    decisions: LinearDecisions | AttentionDecisions | None = None
    residual: Layout | None = None
    buckets: tuple[TokenBucket, ...] = ()

    def of(self, bucket: TokenBucket) -> KernelSpec:
        """The kernel for the tokens of a bucket alone."""
        return replace(self, decisions=bucket.decisions, buckets=())

    @property
    def linear(self) -> LinearDecisions:
        """The decisions of a linear kernel."""
        assert isinstance(self.decisions, LinearDecisions)
        return self.decisions

    @property
    def attention(self) -> AttentionDecisions:
        """The decisions of an attention kernel."""
        assert isinstance(self.decisions, AttentionDecisions)
        return self.decisions

    @property
    def schedule(self) -> str:
        """All that was decided, for keys, manifests and people."""
        few = (f"up to {bucket.groups * GROUP} tokens: {describe(bucket.decisions)}; else: " for bucket in self.buckets)
        return "".join(few) + describe(self.decisions)

    def key(self) -> str:
        """One line that says it all; equal for equal specs only."""
        return f"{self.op}:{self.n}x{self.k}:{self.epilogue or '-'}:{self.residual or '-'}:{self.isa}:{self.schedule}"


def describe(decisions: LinearDecisions | AttentionDecisions | None) -> str:
    """Every decision as name=value, for keys, manifests and people."""
    if decisions is None:
        return "-"
    words = []
    for field in fields(decisions):
        value = getattr(decisions, field.name)
        if field.name == "storage":
            words += [f"family={value.family}", f"block={_block(value.block)}"]
        elif field.name == "extra":
            words += [f"{name}={decided}" for name, decided in value]
        elif field.name == "operands":
            words.append(f"operands={'x'.join(str(getattr(value, part.name)) for part in fields(value))}")
        else:
            words.append(f"{field.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(words)


def density_bucket(density: float) -> int:
    """`density`, a share of non-zero blocks, in percent rounded up to a multiple of 5."""
    return min(100, -(-round(density * 100) // 5) * 5)


def _block(block: Block | None) -> str:
    return "dense" if block is None else f"{block[0]}x{block[1]}"


__all__ = ["ATTRIBUTE", "GROUP", "PARTS", "SCHEMA", "KernelSpec", "Workload", "density_bucket", "describe"]
