"""What a model will take on a CPU, before it is trained or pruned: from its sizes and the table of kernel rates.

Times are of kernels on one thread; the engine's own share of a call is not in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tilewright import frontend
from tilewright.codegen.block_sparse import MIN_SPARSITY
from tilewright.codegen.plan import LinearPlan
from tilewright.codegen.workload import GROUP
from tilewright.frontend.huggingface import read_config
from tilewright.schedules.blocks import BLOCKS, Block, choose
from tilewright.schedules.isa import Isa
from tilewright.schedules.rates import LevelRates, LinearRate

ASSUMED_GHZ = 3.0
"""The clock of a CPU on which nothing was measured: about what servers of the last ten years sustain on vector code."""


@dataclass(frozen=True)
class Sizes:
    """What a prediction needs to know of an encoder."""

    name: str
    layers: int
    hidden: int
    heads: int
    intermediate: int

    def linears(self) -> Mapping[str, tuple[int, int, str]]:
        """A layer's linear kernels: outputs, inputs, and the rate that tells its cost per output."""
        hidden, wide = self.hidden, self.intermediate
        return {
            "qkv": (3 * hidden, hidden, "qkv"),
            "output": (hidden, hidden, "add_norm"),
            "up": (wide, hidden, "activate"),
            "down": (hidden, wide, "add_norm"),
        }


BERT_BASE = Sizes("bert-base", 12, 768, 12, 3072)


@dataclass(frozen=True)
class Prediction:
    """An encoder with every linear pruned to `block` (None: dense).

    stored: how the level stores it. kernels: microseconds of a layer's kernels. milliseconds: the whole encoder.
    """

    block: Block | None
    sparsity: float
    stored: LinearPlan
    kernels: Mapping[str, float]
    milliseconds: float


def read_sizes(path: Path) -> Sizes:
    """Sizes of the model at `path`: a config.json, a directory that holds one (its weights are not read), or an ONNX file.

    Raises InvalidModel and UnsupportedModel as `frontend.load` does.
    """
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        config, layers = read_config(file)
    else:
        model = frontend.load(path, self_check=False)  # only sizes matter
        config, layers = model.config, len(model.layers)
    return Sizes(config.architecture, layers, config.hidden_size, config.num_heads, config.intermediate_size)


def blocks_for(sizes: Sizes) -> list[Block]:
    """The block shapes that divide every linear of the encoder."""
    return [(n, k) for n, k in BLOCKS if not any(outs % n or ins % k for outs, ins, _ in sizes.linears().values())]


def predict(
    sizes: Sizes, isa: Isa, rates: LevelRates, block: Block | None, sparsity: float, *, batch: int, seq_len: int, ghz: float
) -> Prediction | None:
    """The time of `batch` sequences of `seq_len` tokens when all linears have the share `sparsity` of zero blocks.

    None if the table lacks the plan that level `isa` would choose.
    """
    plan = choose(block if sparsity >= MIN_SPARSITY else None, isa, 1.0 - sparsity)
    rate = rates.of(plan)
    if rate is None:
        return None
    density = 1.0 if plan.block is None else 1.0 - sparsity
    tokens = -(-batch * seq_len // GROUP) * GROUP
    cycles = {
        name: tokens * (outputs * inputs * density / rate.macs + outputs * getattr(rate, epilogue))
        for name, (outputs, inputs, epilogue) in sizes.linears().items()
    }
    attention = rates.attention
    products, scores = 2 * seq_len * sizes.hidden / attention.macs, seq_len * sizes.heads * attention.softmax
    cycles["attention"] = tokens * (products + scores + sizes.hidden * attention.cost)
    kernels = {name: cycles[name] / ghz / 1e3 for name in ("qkv", "attention", "output", "up", "down")}
    embedding = tokens * sizes.hidden * rates.embedding / ghz / 1e3
    return Prediction(block, sparsity, plan, kernels, (sizes.layers * sum(kernels.values()) + embedding) / 1e3)


def ranking(predictions: Iterable[Prediction]) -> list[Prediction]:
    """By share of zeros, then the fastest first."""
    return sorted(predictions, key=lambda prediction: (prediction.sparsity, prediction.milliseconds))


def break_even(sizes: Sizes, isa: Isa, rates: LevelRates, block: Block) -> float | None:
    """The share of zero blocks from which a layer's sparse linears take less time than dense ones; 1 if never.

    None if the table lacks a plan. Both times are linear in the share: dense = (1 - share) * products + cost. The compiler
    does not ask the rates: on a level with tiles it goes by `PAYS_ON_TILES`.
    """
    sparse, dense = rates.of(choose(block, isa)), rates.of(choose(None, isa))
    if sparse is None or dense is None:
        return None
    macs = sum(outputs * inputs for outputs, inputs, _ in sizes.linears().values())
    share = 1 - (macs / dense.macs + _costs(sizes, dense) - _costs(sizes, sparse)) * sparse.macs / macs
    return min(max(share, 0.0), 1.0)


def _costs(sizes: Sizes, rate: LinearRate) -> float:
    """Cycles per token of a layer's linears that do not depend on the share of zeros."""
    return sum(float(outputs * getattr(rate, epilogue)) for outputs, _, epilogue in sizes.linears().values())
