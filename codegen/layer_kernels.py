"""The kernels of encoder layers that decisions are made about, as data: what lowering builds and tuning records are about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from tilewright.codegen.decisions import AttentionDecisions, LinearDecisions
from tilewright.codegen.epilogues import Activate, AddNorm, Epilogue, Norm, Qkv
from tilewright.codegen.formats import Format
from tilewright.codegen.kernels.attention import attention
from tilewright.codegen.kernels.linear import linear
from tilewright.codegen.model import EncoderModel, LayerNorm, Linear
from tilewright.codegen.plan import LayerPlan, LinearPlan, Plan
from tilewright.codegen.workload import KernelSpec, Workload

Decisions = LinearDecisions | AttentionDecisions

SLOTS = ("qkv", "attention", "output", "up", "down")
"""The kernels of a layer by their field in `LayerPlan`, in processing order."""


@dataclass(frozen=True)
class Context:
    """What attention is built from besides its spec: the format it writes, and the longest sequence."""

    consumer: Format
    max_positions: int


@dataclass(frozen=True)
class LayerKernel:
    """One kernel of a layer. detail: what its code is made from besides the spec. parts: its linears; none of attention."""

    layer: int
    slot: str
    parts: tuple[Linear, ...]
    spec: KernelSpec
    detail: Epilogue | Context
    workload: Workload

    @property
    def name(self) -> str:
        """As the manifest calls it."""
        return f"layer{self.layer}.{self.slot}"

    @property
    def weight(self) -> NDArray[np.int8]:
        """s8[N, K] of all parts; of attention, none."""
        return np.concatenate([part.weight for part in self.parts]).astype(np.int8)

    def decided(self, decisions: Decisions) -> KernelSpec:
        """The spec with other decisions, for any number of tokens."""
        return replace(self.spec, decisions=decisions, buckets=())


def function(spec: KernelSpec, detail: Epilogue | Context) -> tvm.tirx.PrimFunc:
    """The unscheduled kernel."""
    return MAKERS[spec.op](spec, detail)


MAKERS: dict[str, Callable[[KernelSpec, Any], tvm.tirx.PrimFunc]] = {
    "linear": linear,
    "attention": lambda spec, context: attention(spec, context.consumer, context.max_positions),
}
"""Op of a spec to what makes its function."""


def consumer(plan: Plan, layer: int) -> Format | None:
    """The format in which encoder layer `layer` reads its input; None past the last layer."""
    return plan.layers[layer].qkv.input if layer < len(plan.layers) else None


def norm(model: EncoderModel, weights: LayerNorm, plan: Plan, reader: Format | None) -> Norm:
    """A LayerNorm of the stream, which stands in rows for the head after the last layer."""
    meant, stored = model.config.hidden_size, model.stored_hidden
    return Norm(weights.eps, plan.residual, plan.residual if reader else "rows", reader, meant if meant < stored else None)


def attention_spec(model: EncoderModel, isa: str, layer: LayerPlan) -> KernelSpec:
    """The spec of a layer's attention."""
    written = layer.output.input.label
    return KernelSpec("attention", model.config.num_heads, model.stored_head_dim, isa, written, layer.attention)


def linear_workload(spec: KernelSpec, plan: LinearPlan) -> Workload:
    """The task of a linear kernel."""
    return Workload("linear", spec.n, spec.k, spec.isa, spec.epilogue, plan.found, plan.density)


def layer_kernels(model: EncoderModel, plan: Plan) -> tuple[LayerKernel, ...]:
    """All kernels of the layers of a padded model, in processing order."""
    return tuple(kernel for index in range(len(plan.layers)) for kernel in _layer(model, plan, index))


def _layer(model: EncoderModel, plan: Plan, index: int) -> tuple[LayerKernel, ...]:
    layer, decided, config = model.layers[index], plan.layers[index], model.config

    def one(slot: str, parts: tuple[Linear, ...], epilogue: Epilogue) -> LayerKernel:
        chosen: LinearPlan = getattr(decided, slot)
        n, k = sum(len(part.weight) for part in parts), parts[0].weight.shape[1]
        spec = KernelSpec("linear", n, k, plan.isa, epilogue.label, chosen.decisions, epilogue.residual, chosen.buckets)
        return LayerKernel(index, slot, parts, spec, epilogue, linear_workload(spec, chosen))

    attn, spec = layer.attention, attention_spec(model, plan.isa, decided)
    task = Workload(spec.op, spec.n, spec.k, spec.isa, spec.epilogue)
    return (
        one("qkv", (attn.query, attn.key, attn.value), Qkv(decided.attention.operands)),
        LayerKernel(index, "attention", (), spec, Context(decided.output.input, config.max_positions), task),
        one("output", (attn.output,), AddNorm(norm(model, layer.attention_norm, plan, decided.up.input))),
        one("up", (layer.up,), Activate(config.activation, decided.down.input)),
        one("down", (layer.down,), AddNorm(norm(model, layer.output_norm, plan, consumer(plan, index + 1)))),
    )
