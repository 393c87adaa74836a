"""EncoderModel to a Relax IRModule of unscheduled TIR kernels, with the packed parameters it is called with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray

from tilewright.codegen.coding import code_table
from tilewright.codegen.kernels.attention import attention
from tilewright.codegen.kernels.common import shape
from tilewright.codegen.kernels.embedding import embedding
from tilewright.codegen.kernels.epilogue import Activate, AddNorm, Epilogue, Qkv
from tilewright.codegen.kernels.head import VECTOR, padded_width, pool, sequence_head, token_head
from tilewright.codegen.kernels.linear import linear
from tilewright.codegen.kernels.norm import Norm
from tilewright.codegen.model import EncoderModel, Layer, LayerNorm, Linear, Quantization
from tilewright.codegen.packing import pack_linear
from tilewright.codegen.plan import LayerPlan, LinearPlan, Plan
from tilewright.codegen.program import Array, Program, Value
from tilewright.codegen.workload import GROUP, Layout, Workload
from tilewright.errors import InvalidModel, ScheduleMismatch, UnsupportedModel


@dataclass(frozen=True)
class Output:
    """One output of the module: f32[G, 16, width] per token or f32[B, width] per sequence; squeeze drops a width of 1."""

    name: str
    per: str
    width: int
    squeeze: bool = False


@dataclass(frozen=True)
class KernelReport:
    """One linear kernel: the block stored, the share of weights in stored blocks, and why it is not stored as found."""

    name: str
    shape: tuple[int, int]
    block: tuple[int, int] | None
    density: float
    reason: str
    workload: Workload


@dataclass(frozen=True)
class Lowered:
    """A module ready for scheduling. `parameters` are in the order of the main function's `params` tuple."""

    module: tvm.IRModule
    parameters: dict[str, Array]
    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    kernels: tuple[KernelReport, ...]
    max_tokens: int


def lower(model: EncoderModel, plan: Plan, max_tokens: int = 4096) -> Lowered:
    """Lower a quantised `model` as `plan` says; the module takes up to `max_tokens` tokens a call (at least a sequence).

    Raises InvalidModel for a float model, UnsupportedModel for sizes that no kernel serves, ScheduleMismatch for the
    plan of another model.
    """
    config = model.config
    if not model.quantized:
        raise InvalidModel("cannot compile a float model; quantise it first: tilewright quantize MODEL --texts FILE -o OUT")
    if config.hidden_size % VECTOR or config.intermediate_size % VECTOR or config.head_dim % 4:
        raise UnsupportedModel(
            f"hidden size {config.hidden_size}, intermediate size {config.intermediate_size} and head size "
            f"{config.head_dim} are not multiples of 16, 16 and 4, which the kernels need"
        )
    if len(plan.layers) != len(model.layers):
        raise ScheduleMismatch(f"the plan has {len(plan.layers)} layers, the model {len(model.layers)}; plan this model")
    longest = -(-config.max_positions // GROUP) * GROUP
    return _Lowering(model, plan, max(max_tokens // GROUP * GROUP, longest)).run()


LAST = "last_hidden_state"


class _Lowering:
    """Walks the model once, adding parameters and kernel calls to a Program."""

    def __init__(self, model: EncoderModel, plan: Plan, max_tokens: int):
        self.model, self.plan, self.max_tokens = model, plan, max_tokens
        self.config, self.operands = model.config, plan.operands
        self.program = Program()
        self.reports: list[KernelReport] = []

    def run(self) -> Lowered:
        inputs = ["input_ids", "position_ids"] + (["token_type_ids"] if self.model.embeddings.token_type is not None else [])
        stream, small = self._embedding(inputs)
        for index, (layer, plan) in enumerate(zip(self.model.layers, self.plan.layers, strict=True)):
            stream, small = self._layer(index, layer, plan, stream, small)
        outputs = self._head(stream)
        module = self.program.to_relax(inputs, [output.name for output in outputs], self.max_tokens)
        parameters, reports = self.program.parameters, tuple(self.reports)
        return Lowered(module, parameters, tuple(inputs), tuple(outputs), reports, self.max_tokens)

    def _consumer(self, layer: int) -> tuple[Layout, Quantization] | None:
        """Layout and quantisation that encoder layer `layer` wants its input in; None past the last layer."""
        if layer >= len(self.model.layers):
            return None
        return self.plan.layers[layer].qkv.layout, _input(self.model.layers[layer].attention.query)

    def _activation(self, name: str, layout: Layout, channels: int) -> Value:
        return Value(name, tuple(shape(layout, self.program.groups, channels, self.operands.pack)), self.operands.activation)

    def _norm(
        self, name: str, weights: LayerNorm, consumer: tuple[Layout, Quantization] | None
    ) -> tuple[Norm, list[str], list[Value]]:
        """The norm, its parameter names and its results: the stream (in rows for the head) and the u8 copy if consumed."""
        hidden, groups = self.config.hidden_size, self.program.groups
        stream: Layout = self.plan.residual if consumer else "rows"
        quant = np.zeros(2, np.float32) if consumer is None else _quant(consumer[1])
        names = self.program.add_parameters(name, {"gamma": weights.weight, "beta": weights.bias, "quant": quant})
        stream_name = f"{name}.stream" if consumer else LAST
        results = [Value(stream_name, tuple(shape(stream, groups, hidden)), "float32")]
        if consumer is not None:
            results.append(self._activation(f"{name}.quantized", consumer[0], hidden))
        return Norm(weights.eps, self.plan.residual, stream, consumer[0] if consumer else None), names, results

    def _embedding(self, inputs: list[str]) -> tuple[str, str]:
        tables = self.model.embeddings
        coded = code_table(tables.word)
        arrays: dict[str, Array] = {"word": tables.word} if coded is None else {"word": coded.codes, "grid": coded.grid}
        arrays["position"] = tables.position
        if tables.token_type is not None:
            arrays["token_type"] = tables.token_type
        names = self.program.add_parameters("embeddings", arrays)
        norm, norm_names, results = self._norm("embeddings.norm", tables.norm, self._consumer(0))
        words, hidden = tables.word.shape
        types = 0 if tables.token_type is None else len(tables.token_type)
        workload = Workload(
            "embedding",
            words,
            hidden,
            self.plan.isa,
            self.operands,
            f"{'u8' if coded else 'f32'}>{norm.consumer}",
            residual=norm.residual,
        )
        self.program.call(
            "embedding",
            (workload, norm),
            lambda: embedding(workload, norm, len(tables.position), types, coded is not None),
            [*inputs, *names, *norm_names],
            results,
        )
        return results[0].name, results[-1].name

    def _layer(self, index: int, layer: Layer, plan: LayerPlan, stream: str, small: str) -> tuple[str, str]:
        program, config, name = self.program, self.config, f"layer{index}"
        hidden, attn = config.hidden_size, layer.attention
        qs, ks, vs = (_known(scale) for scale in (attn.query_scale, attn.key_scale, attn.value_scale))
        groups, pack, operands = program.groups, self.operands.pack, self.operands
        qkv = [
            Value(f"{name}.query", (groups, hidden // pack, GROUP, pack), operands.attention),
            Value(f"{name}.key", (groups, hidden // pack, GROUP, pack), operands.key),
            Value(f"{name}.value", (groups, hidden, GROUP), operands.attention),
        ]
        linears = (attn.query, attn.key, attn.value)
        self._linear(f"{name}.qkv", linears, (qs, ks, vs), plan.qkv, Qkv(), "qkv", [small], [], qkv)

        context_quant = _input(attn.output)
        score = np.float32(qs * ks / config.head_dim**0.5)
        quant = np.array([score, vs / context_quant.scale, context_quant.zero_point], np.float32)
        context = self._activation(f"{name}.context", plan.output.layout, hidden)
        workload = Workload("attention", config.num_heads, config.head_dim, self.plan.isa, operands, plan.output.layout)
        program.call(
            "attention",
            (workload,),
            lambda: attention(workload, plan.output.layout, config.max_positions),
            [*(value.name for value in qkv), "offsets", *program.add_parameters(f"{name}.attention", {"quant": quant})],
            [context],
        )
        stream, small = self._add_norm(
            f"{name}.output",
            attn.output,
            plan.output,
            layer.attention_norm,
            (plan.up.layout, _input(layer.up)),
            stream,
            context.name,
        )
        activated = self._activation(f"{name}.activated", plan.down.layout, config.intermediate_size)
        extra = program.add_parameters(f"{name}.activation", {"quant": _quant(_input(layer.down))})
        epilogue = Activate(config.activation, plan.down.layout)
        self._linear(
            f"{name}.up",
            (layer.up,),
            (1.0,),
            plan.up,
            epilogue,
            f"{config.activation}>{plan.down.layout}",
            [small],
            extra,
            [activated],
        )
        consumer = self._consumer(index + 1)
        return self._add_norm(f"{name}.down", layer.down, plan.down, layer.output_norm, consumer, stream, activated.name)

    def _add_norm(
        self,
        name: str,
        weights: Linear,
        plan: LinearPlan,
        norm_weights: LayerNorm,
        consumer: tuple[Layout, Quantization] | None,
        stream: str,
        small: str,
    ) -> tuple[str, str]:
        norm, names, results = self._norm(f"{name}.norm", norm_weights, consumer)
        label = f"add_norm@{norm.residual}" + (f">{norm.consumer}" if norm.consumer else "")
        self._linear(name, (weights,), (1.0,), plan, AddNorm(norm), label, [small], [stream, *names], results)
        return results[0].name, results[-1].name

    def _linear(
        self,
        name: str,
        parts: tuple[Linear, ...],
        divisors: tuple[float, ...],
        plan: LinearPlan,
        epilogue: Epilogue,
        label: str,
        x: list[str],
        extra: list[str],
        results: list[Value],
    ) -> None:
        """One kernel for `parts`, their outputs concatenated; part i's real result is divided by divisors[i]."""
        quantization = _input(parts[0])
        if any(part.input != quantization for part in parts):
            raise InvalidModel(
                f"{name}: {', '.join(part.name for part in parts)} read differently quantised inputs; they must share one"
            )
        weight = np.concatenate([part.weight for part in parts]).astype(np.int8)
        # in float64: each constant is rounded once
        scale = np.concatenate([_scale(part) * quantization.scale / d for part, d in zip(parts, divisors, strict=True)])
        bias = np.concatenate([part.bias.astype(np.float64) / d for part, d in zip(parts, divisors, strict=True)])
        n, k = weight.shape
        base = Workload("linear", n, k, self.plan.isa, self.operands, label, plan.family, plan.block)
        residual = epilogue.norm.residual if isinstance(epilogue, AddNorm) else None
        packed = pack_linear(base, weight)
        density = packed.stored / weight.size
        percent = min(100, -(-round(density * 100) // 5) * 5)
        workload = dataclasses.replace(base, residual=residual, density=percent)
        arrays = {
            **packed.arguments(),
            "fold": (-quantization.zero_point * weight.astype(np.int64).sum(axis=1)).astype(np.int32),
            "scale": scale.astype(np.float32),
            "bias": bias.astype(np.float32),
        }
        self.program.call(
            name.split(".")[-1],
            (dataclasses.replace(workload, density=100), epilogue),
            lambda: linear(workload, epilogue),
            [*x, *self.program.add_parameters(name, arrays), *extra],
            results,
        )
        self.reports.append(KernelReport(name, (n, k), plan.block, density, plan.reason, workload))

    def _head(self, stream: str) -> list[Output]:
        """Append the head's kernels; returns the module's outputs."""
        head, program, hidden = self.model.head, self.program, self.config.hidden_size
        groups, sequences = program.groups, program.ends - 1

        def workload(op: str, width: int, epilogue: str = "") -> Workload:
            return Workload(op, width, hidden, self.plan.isa, self.operands, epilogue)

        if head.kind == "none":
            pooled = Value("sentence_embedding", (sequences, hidden), "float32")
            pooling, normalize = head.pooling, head.normalize
            own = workload("pool", hidden, pooling + (">unit" if normalize else ""))
            program.call(f"{pooling}_pool", (own,), lambda: pool(own, pooling, normalize), [stream, "offsets"], [pooled])
            return [Output(stream, "token", hidden), Output(pooled.name, "sequence", hidden)]
        if head.projection is None:
            raise InvalidModel(f"a {head.kind} head needs a projection")
        width = len(head.projection.bias)
        names = program.add_parameters("head", _dense("project", head.projection))
        if head.kind == "sequence_classification":
            before = [] if head.pre is None else program.add_parameters("head", _dense("pre", head.pre))
            activation = None if head.pre is None else head.pre_activation
            logits = Value("logits", (sequences, width), "float32")
            sequence = workload("sequence_head", width, activation or "")
            program.call(
                "head",
                (sequence,),
                lambda: sequence_head(sequence, activation),
                [stream, "offsets", *before, *names],
                [logits],
            )
            return [Output("logits", "sequence", width)]
        split = head.kind == "question_answering"
        labels = ["start_logits", "end_logits"] if split else ["logits"]
        each = 1 if split else width
        token = workload("token_head", width)
        results = [Value(label, (groups, GROUP, each), "float32") for label in labels]
        program.call("head", (token, split), lambda: token_head(token, split), [stream, *names], results)
        return [Output(label, "token", each, squeeze=split) for label in labels]


def _input(linear: Linear) -> Quantization:
    if linear.input is None:
        raise InvalidModel(f"{linear.name} has no input quantisation")
    return linear.input


def _scale(linear: Linear) -> NDArray[np.float64]:
    if linear.scale is None:
        raise InvalidModel(f"{linear.name} has no weight scale")
    return linear.scale.astype(np.float64)


def _known(scale: float | None) -> float:
    if scale is None:
        raise InvalidModel("an attention scale is missing")
    return scale


def _quant(quantization: Quantization) -> NDArray[np.float32]:
    """f32[2]: what kernels multiply by and add when they quantise."""
    return np.array([1.0 / quantization.scale, quantization.zero_point], np.float32)


def _dense(name: str, linear: Linear) -> dict[str, Array]:
    """A head's float32 weight as [K, blocks, 16], and its bias."""
    n, k = linear.weight.shape
    weight = np.zeros((k, padded_width(n)), np.float32)
    weight[:, :n] = linear.weight.T
    return {f"{name}_weight": weight.reshape(k, -1, VECTOR), f"{name}_bias": linear.bias.astype(np.float32)}
