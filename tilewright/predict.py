"""What a model will take on a CPU, before it is trained or pruned: from its sizes and the table of kernel rates.

Times are of kernels on one thread; the engine's own share of a call is not in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tilewright import frontend
from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import Block, Storage
from tilewright.codegen.formats import GROUP
from tilewright.frontend.huggingface import read_config
from tilewright.schedules.blocks import dense
from tilewright.schedules.choice import choose, sparse_storage
from tilewright.schedules.isa import Isa
from tilewright.schedules.rates import Kind, LevelRates

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

    def linears(self) -> Mapping[str, tuple[int, int, Kind]]:
        """A layer's linear kernels: outputs, inputs, and what follows the product."""
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

    stored: how the level stores each linear. kernels: microseconds of a layer's kernels. milliseconds: the whole encoder.
    """

    block: Block | None
    sparsity: float
    stored: Mapping[str, Storage]
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

    None if the table has no rate for how the level stores a kernel.
    """
    tokens = -(-batch * seq_len // GROUP) * GROUP
    stored, cycles = {}, {}
    for name, (outputs, inputs, kind) in sizes.linears().items():
        storage = choose(outputs, inputs, kind, block, 1.0 - sparsity, isa, rates).storage
        rate = rates.of(storage)
        if rate is None:
            return None
        density = 1.0 if storage.block is None else 1.0 - sparsity
        stored[name], cycles[name] = storage, tokens * rate.cycles(outputs, inputs, density, kind)
    attention = rates.attention
    products, scores = 2 * seq_len * sizes.hidden / attention.macs, seq_len * sizes.heads * attention.softmax
    cycles["attention"] = tokens * (products + scores + sizes.hidden * attention.cost)
    kernels = {name: cycles[name] / ghz / 1e3 for name in ("qkv", "attention", "output", "up", "down")}
    embedding = tokens * sizes.hidden * rates.embedding / ghz / 1e3
    return Prediction(block, sparsity, stored, kernels, (sizes.layers * sum(kernels.values()) + embedding) / 1e3)


def ranking(predictions: Iterable[Prediction]) -> list[Prediction]:
    """By share of zeros, then the fastest first."""
    return sorted(predictions, key=lambda prediction: (prediction.sparsity, prediction.milliseconds))


def break_even(sizes: Sizes, isa: Isa, rates: LevelRates, block: Block) -> float | None:
    """The share of zero blocks from which all of a layer's linears are stored sparse; 1 if never, None if rates are lacking."""
    storage = sparse_storage(block, isa)
    sparse, whole = None if storage is None else rates.of(storage), rates.of(dense(isa))
    if sparse is None or whole is None:
        return None
    densities = [
        sparse.break_even(outputs, inputs, kind, whole.cycles(outputs, inputs, 1.0, kind))
        for outputs, inputs, kind in sizes.linears().values()
    ]
    return min(max(1 - min(densities), 0.0), 1.0)
