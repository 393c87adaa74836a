"""How often `vpmaddubsw` would saturate on the real DistilBERT tagger, counted from its weights and real activations.

    python -m benchmarks.saturation [--sentences 20] [--json]

Without VNNI, x86 multiplies bytes with `vpmaddubsw`: it adds two neighbouring u8 x s8 products in int16 and saturates (Intel
SDM, volume 2, PMADDUBSW). Counted are, over every token of the sentences, the pair sums that leave int16, where weights and
activations stand in the model's own order, and the results (outputs of a linear) that such a sum is part of. A kernel that lets
them saturate gives another integer there. Tilewright's kernels never do. Weights are taken as the model has them, with one
scale for a tensor, and quantised again with a scale for each output, as most quantisers do today: these use all 8 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, from_numpy, ones_like, zeros_like

from benchmarks import assets
from tilewright.codegen.model import EncoderModel, Linear, Quantization
from tilewright.commands.output import print_json, stderr, stdout, table
from tilewright.frontend import load
from tilewright.pipeline.encoder import Batch, run
from tilewright.pipeline.quantize import quantize_linear

_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Saturation:
    """Of one kind of linear: pair sums and results in all, and those that saturation touches."""

    sums: int = 0
    saturated_sums: int = 0
    results: int = 0
    saturated_results: int = 0

    def __add__(self, other: Saturation) -> Saturation:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Saturation(*(first + second for first, second in pairs))


def count(activations: NDArray[np.uint8], weight: NDArray[np.int8]) -> Saturation:
    """Count for activations u8[T, K] times weight s8[N, K]; inputs 2 i and 2 i + 1 share a pair sum, K is even."""
    tokens, outputs = len(activations), len(weight)
    low, high = weight[:, 0::2].astype(np.int32), weight[:, 1::2].astype(np.int32)
    # 255 times two weights reaches beyond int16 only from these pairs, few of all
    worst = np.maximum(np.maximum(low, 0) + np.maximum(high, 0), np.maximum(-low, 0) + np.maximum(-high, 0)) * 255
    rows, pairs = np.nonzero(worst > _INT16.max)
    even, odd = activations[:, 0::2].astype(np.int32), activations[:, 1::2].astype(np.int32)
    saturated, results = 0, 0
    for token in range(tokens):
        sums = even[token, pairs] * low[rows, pairs] + odd[token, pairs] * high[rows, pairs]
        beyond = (sums > _INT16.max) | (sums < _INT16.min)
        saturated += int(beyond.sum())
        results += len(np.unique(rows[beyond]))
    return Saturation(tokens * weight.size // 2, saturated, tokens * outputs, results)


def count_model(model: EncoderModel, sentences: list[str], per_output: bool) -> Mapping[str, Saturation]:
    """Count by kind of linear over `sentences`; the activations are those of the model without rounded ones.

    per_output: quantise the weights again, with a scale for each output.
    """
    real = dequantized(model)
    linears = _inputs(real, model) if per_output else _inputs(model, model)
    found: dict[str, Saturation] = {}

    def observe(name: str, values: Tensor) -> None:
        for kind, linear in linears.get(name, {}).items():
            assert linear.input is not None
            found[kind] = found.get(kind, Saturation()) + count(_bytes(values.numpy(), linear.input), linear.weight)

    assert model.tokenizer is not None
    for encoding in Tokenizer.from_str(model.tokenizer).encode_batch(sentences):
        mask = np.array(encoding.attention_mask, bool)
        ids = from_numpy(np.array(encoding.ids)[mask])[None]
        run(real, Batch(ids, zeros_like(ids), ones_like(ids).bool()), observe)
    return found


def dequantized(model: EncoderModel) -> EncoderModel:
    """Return the float model that a quantised one stands for."""

    def real(linear: Linear) -> Linear:
        return replace(linear, weight=linear.real_weight, scale=None, input=None)

    return model.map_linears(real)


def _inputs(weights: EncoderModel, inputs: EncoderModel) -> Mapping[str, Mapping[str, Linear]]:
    """The linears by the name under which `pipeline.encoder.run` shows their input, and by kind.

    Float ones of `weights` are quantised for the inputs of the same linear in `inputs`.
    """
    names = ("query", "key", "value", "output", "up", "down")
    places = dict.fromkeys(names[:3], "attention") | {name: name for name in names[3:]}
    found: dict[str, dict[str, Linear]] = {}
    for number, (linear, other) in enumerate(zip(weights.linears(), inputs.linears(), strict=True)):
        index, kind = divmod(number, len(names))
        assert other.input is not None
        taken = linear if linear.quantized else quantize_linear(linear, other.input)
        found.setdefault(f"{index}.{places[names[kind]]}.input", {})[names[kind]] = taken
    return found


def _bytes(values: NDArray[Any], form: Quantization) -> NDArray[np.uint8]:
    return np.clip(np.rint(values / np.float32(form.scale)) + form.zero_point, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the pair sums that vpmaddubsw would saturate in the real DistilBERT.")
    parser.add_argument("--sentences", type=int, default=20, help="sentences of SQuAD's development set")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args()
    model, sentences = load(assets.distilbert_qdq()), assets.squad_sentences(options.sentences)
    results: dict[str, Mapping[str, Saturation]] = {}
    for name, per_output in (("per tensor", False), ("per output", True)):
        with stderr().status(f"counting, weights quantised {name} ..."):
            found = count_model(model, sentences, per_output)
        results[name] = {**found, "all": sum(found.values(), Saturation())}
    if options.json:
        print_json({name: {kind: dataclasses.asdict(n) for kind, n in found.items()} for name, found in results.items()})
        return
    headings = (f"{what}, {name}" for name in results for what in ("sums", "results"))
    grid = table("linear", *headings)
    for kind in results["per tensor"]:
        counts = [found[kind] for found in results.values()]
        shares = (share for n in counts for share in (n.saturated_sums / n.sums, n.saturated_results / n.results))
        grid.add_row(kind, *(f"{share:.4%}" for share in shares))
    stdout().print("Share of pair sums that saturate, and of results that hold one", grid)


if __name__ == "__main__":
    main()
