"""Whether the model that was read is the graph it was read from: its assumptions, and every layer's values, on probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.model import EncoderModel, Linear
from tilewright.frontend.onnx_linear import Walker
from tilewright.frontend.onnx_probe import Prober
from tilewright.frontend.probe import Probe, check_agreement
from tilewright.frontend.reference import Array, forward

_REMEDY = "export it with transformers' own classes, or read it all the same with --no-self-check"


def check(model: EncoderModel, walker: Walker, prober: Prober, stream: Sequence[str], self_check: bool) -> None:
    """Raise UnsupportedModel where an assumption of `walker` is wrong or, with `self_check`, a layer of `model`.

    stream: the graph's residual stream, after the embeddings and after each attention and each feed-forward network.
    """
    assumed = [value for assumption in walker.assumptions for value in assumption.values]
    compared = [*stream, *walker.graph.outputs] if self_check else []
    found = prober.run([*assumed, *compared])
    prober.check(walker.assumptions, found)
    if self_check:
        exact = with_exact_weights(model, walker.exact)
        for probe, values in zip(prober.probes, found, strict=True):
            _compare(exact, probe, values, stream, walker.graph.outputs)


def with_exact_weights(model: EncoderModel, exact: Mapping[str, Array]) -> EncoderModel:
    """`model` with the real weights of the Linears whose integers are not those of the graph."""

    def real(linear: Linear) -> Linear:
        return replace(linear, weight=exact[linear.name], scale=None) if linear.name in exact else linear

    return model.map_linears(real)


def _compare(
    model: EncoderModel, probe: Probe, values: Mapping[str, NDArray[Any]], stream: Sequence[str], outputs: Sequence[str]
) -> None:
    ours: dict[str, Array] = {}
    results = forward(model, probe.sequences(probe.ids), probe.sequences(probe.types), observe=ours.__setitem__)
    for (name, mine), value in zip(ours.items(), stream, strict=True):
        check_agreement(f"{name} of the graph", mine, probe.joined(values[value]), _REMEDY)
    if model.head.kind == "none":
        return  # its output is the stream's last value
    for name, output in zip(results[0], outputs, strict=True):
        parts, theirs = [result[name] for result in results], values[output]
        if model.head.kind == "sequence_classification":
            check_agreement(f"{name} of the graph", np.stack(parts), theirs, _REMEDY)
        else:
            check_agreement(f"{name} of the graph", np.concatenate(parts), probe.joined(theirs), _REMEDY)
