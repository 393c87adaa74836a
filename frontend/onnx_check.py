"""Whether the model that was read is the graph it was read from: its assumptions, and every layer's values, on probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tilewright.codegen.model import EncoderModel, Linear
from tilewright.frontend.onnx_linear import Walker
from tilewright.frontend.onnx_probe import Prober
from tilewright.frontend.probe import check_model
from tilewright.frontend.reference import Array

_REMEDY = "export it with transformers' own classes, or read it all the same with --no-self-check"


def check(
    model: EncoderModel,
    walker: Walker,
    prober: Prober,
    stream: Sequence[str],
    named: Mapping[str, str],
    self_check: bool,
) -> None:
    """Raise UnsupportedModel where an assumption of `walker` is wrong or, with `self_check`, a layer of `model`.

    stream: the graph's residual stream, after the embeddings and after each attention and each feed-forward network.
    named: the graph's outputs by the names that the model's have.
    """
    assumed = [value for assumption in walker.assumptions for value in assumption.values]
    compared = [*stream, *named.values()] if self_check else []
    found = prober.run([*assumed, *compared])
    prober.check(walker.assumptions, found)
    if self_check:
        exact = with_exact_weights(model, walker.exact)
        for probe, values in zip(prober.probes, found, strict=True):
            outputs = {name: values[output] for name, output in named.items()}
            check_model(exact, probe, [values[name] for name in stream], outputs, _REMEDY)


def with_exact_weights(model: EncoderModel, exact: Mapping[str, Array]) -> EncoderModel:
    """`model` with the real weights of the Linears whose integers are not those of the graph."""

    def real(linear: Linear) -> Linear:
        return replace(linear, weight=exact[linear.name], scale=None) if linear.name in exact else linear

    return model.map_linears(real)
