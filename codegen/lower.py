"""EncoderModel to a Relax IRModule of unscheduled TIR kernels, with the packed parameters it is called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray

from tilewright.codegen.coding import code_table
from tilewright.codegen.epilogues import Activate, AddNorm, Epilogue, Norm, Qkv
from tilewright.codegen.formats import GROUP, Format
from tilewright.codegen.kernels.attention import attention
from tilewright.codegen.kernels.embedding import embedding
from tilewright.codegen.kernels.head import VECTOR, padded_width, pool, sequence_head, token_head
from tilewright.codegen.kernels.linear import linear
from tilewright.codegen.layer_kernels import attention_spec, consumer, linear_workload, norm
from tilewright.codegen.model import EncoderModel, Layer, LayerNorm, Linear, Quantization
from tilewright.codegen.packing import pack_linear
from tilewright.codegen.pad import is_padded
from tilewright.codegen.plan import LayerPlan, LinearPlan, Plan
from tilewright.codegen.program import Array, Program, Value
from tilewright.codegen.workload import KernelSpec, Workload
from tilewright.errors import InvalidModel, ScheduleMismatch, UnsupportedModel
from tilewright.manifest import Role


@dataclass(frozen=True)
class Output:
    """One output of the module: f32[G, 16, width] per token or f32[B, width] per sequence; squeeze drops a width of 1."""

    name: str
    per: str
    width: int
    squeeze: bool = False


@dataclass(frozen=True)
class KernelReport:
    """One linear kernel as it was compiled.

    density: share of weights in stored blocks. reason: why it is not stored as found. workload: the task, for tuning records.
    """

    name: str
    shape: tuple[int, int]
    density: float
    reason: str
    workload: Workload
    spec: KernelSpec


@dataclass(frozen=True)
class Lowered:
    """A module ready for scheduling, by the specs of its kernels.

    `parameters` are in the order of the main function's `params` tuple; `roles` of some.
    """

    module: tvm.IRModule
    specs: dict[str, KernelSpec]
    parameters: dict[str, Array]
    roles: dict[str, Role]
    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    kernels: tuple[KernelReport, ...]
    max_tokens: int


def lower(model: EncoderModel, plan: Plan, max_tokens: int = 4096) -> Lowered:
    """Lower a quantised, padded `model` as `plan` says; its module takes up to `max_tokens` tokens (at least a sequence).

    Raises InvalidModel for a float model, UnsupportedModel for one that is not padded, ScheduleMismatch for the
    plan of another model.
    """
    config = model.config
    if not model.quantized:
        raise InvalidModel("cannot compile a float model; quantise it first: tilewright quantize MODEL --texts FILE -o OUT")
    if not is_padded(model):
        raise UnsupportedModel(
            f"no kernel divides hidden size {config.hidden_size}, head size {config.head_dim} or intermediate size "
            f"{config.intermediate_size}; plan and lower pad(model) instead"
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
        self.config = model.config
        self.program = Program()
        self.reports: list[KernelReport] = []

    def run(self) -> Lowered:
        inputs = ["input_ids", "position_ids"] + (["token_type_ids"] if self.model.embeddings.token_type is not None else [])
        stream, small = self._embedding(inputs)
        for index, (layer, plan) in enumerate(zip(self.model.layers, self.plan.layers, strict=True)):
            stream, small = self._layer(index, layer, plan, stream, small)
        outputs = self._head(stream)
        module = self.program.to_relax(inputs, [output.name for output in outputs], self.max_tokens)
        program, reports = self.program, tuple(self.reports)
        return Lowered(
            module, program.specs, program.parameters, program.roles, tuple(inputs), tuple(outputs), reports, self.max_tokens
        )

    def _consumer(self, layer: int) -> tuple[Format, Quantization] | None:
        """Format and quantisation that encoder layer `layer` wants its input in; None past the last layer."""
        reader = consumer(self.plan, layer)
        return None if reader is None else (reader, _input(self.model.layers[layer].attention.query))

    def _norm(
        self, name: str, weights: LayerNorm, reader: tuple[Format, Quantization] | None
    ) -> tuple[Norm, list[str], list[Value]]:
        """The norm, its parameter names and its results: the stream (in rows for the head) and the u8 copy if consumed."""
        quant = np.zeros(2, np.float32) if reader is None else _quant(reader[1])
        names = self.program.add_parameters(name, {"gamma": weights.weight, "beta": weights.bias, "quant": quant})
        made = norm(self.model, weights, self.plan, reader and reader[0])
        outputs = made.outputs(self.program.groups, self.model.stored_hidden)
        results = [Value(LAST if reader is None else f"{name}.{output}", shape, dtype) for output, shape, dtype in outputs]
        return made, names, results

    def _embedding(self, inputs: list[str]) -> tuple[str, str]:
        tables = self.model.embeddings
        coded = code_table(tables.word)
        arrays: dict[str, Array] = {"word": tables.word} if coded is None else {"word": coded.codes, "grid": coded.grid}
        arrays["position"] = tables.position
        if tables.token_type is not None:
            arrays["token_type"] = tables.token_type
        roles: dict[str, Role] = {"word": "vocab_size", "position": "max_positions", "token_type": "token_types"}
        names = self.program.add_parameters("embeddings", arrays, {name: roles[name] for name in arrays if name in roles})
        made, norm_names, results = self._norm("embeddings.norm", tables.norm, self._consumer(0))
        words, hidden = tables.word.shape
        types = 0 if tables.token_type is None else len(tables.token_type)
        label = f"{'u8' if coded else 'f32'}@{made.label}"
        spec = KernelSpec("embedding", words, hidden, self.plan.isa, label, residual=made.residual)
        self.program.call(
            "embedding",
            spec,
            made,
            lambda: embedding(spec, made, len(tables.position), types, coded is not None),
            [*inputs, *names, *norm_names],
            results,
        )
        return results[0].name, results[-1].name

    def _layer(self, index: int, layer: Layer, plan: LayerPlan, stream: str, small: str) -> tuple[str, str]:
        program, config, name = self.program, self.config, f"layer{index}"
        attn = layer.attention
        qs, ks, vs = (_known(scale) for scale in (attn.query_scale, attn.key_scale, attn.value_scale))
        linears, epilogue = (attn.query, attn.key, attn.value), Qkv(plan.attention.operands)
        qkv = self._linear(f"{name}.qkv", linears, plan.qkv, epilogue, small, divisors=(qs, ks, vs))

        context_quant = _input(attn.output)
        score = np.float32(qs * ks / config.head_dim**0.5)
        quant = np.array([score, vs / context_quant.scale, context_quant.zero_point], np.float32)
        reader = plan.output.input
        context = Value(f"{name}.context", reader.shape(program.groups, len(attn.value.bias)), reader.dtype)
        spec = attention_spec(self.model, self.plan.isa, plan)
        program.call(
            "attention",
            spec,
            (),
            lambda: attention(spec, reader, config.max_positions),
            [*qkv, "offsets", *program.add_parameters(f"{name}.attention", {"quant": quant})],
            [context],
        )
        stream, small = self._add_norm(
            f"{name}.output",
            attn.output,
            plan.output,
            layer.attention_norm,
            (plan.up.input, _input(layer.up)),
            stream,
            context.name,
        )
        extra = program.add_parameters(f"{name}.activation", {"quant": _quant(_input(layer.down))})
        activate = Activate(config.activation, plan.down.input)
        (activated,) = self._linear(f"{name}.up", (layer.up,), plan.up, activate, small, extra)
        following = self._consumer(index + 1)
        return self._add_norm(f"{name}.down", layer.down, plan.down, layer.output_norm, following, stream, activated)

    def _add_norm(
        self,
        name: str,
        weights: Linear,
        plan: LinearPlan,
        norm_weights: LayerNorm,
        reader: tuple[Format, Quantization] | None,
        stream: str,
        small: str,
    ) -> tuple[str, str]:
        made, names, results = self._norm(f"{name}.norm", norm_weights, reader)
        self._linear(name, (weights,), plan, AddNorm(made), small, [stream, *names], results=results)
        return results[0].name, results[-1].name

    def _linear(
        self,
        name: str,
        parts: tuple[Linear, ...],
        plan: LinearPlan,
        epilogue: Epilogue,
        x: str,
        extra: Sequence[str] = (),
        divisors: Sequence[float] | None = None,
        results: Sequence[Value] | None = None,
    ) -> list[str]:
        """One kernel for `parts`, their outputs concatenated, that reads `x`; returns the names of its results.

        extra: the epilogue's own arguments. divisors: part i's real result is divided by divisors[i], if any. results: under
        which names, if not those of the epilogue's outputs.
        """
        quantization = _input(parts[0])
        divisors = divisors or [1.0] * len(parts)
        if any(part.input != quantization for part in parts):
            raise InvalidModel(
                f"{name}: {', '.join(part.name for part in parts)} read differently quantised inputs; they must share one"
            )
        weight = np.concatenate([part.weight for part in parts]).astype(np.int8)
        # in float64: each constant is rounded once
        scale = np.concatenate([_scale(part) * quantization.scale / d for part, d in zip(parts, divisors, strict=True)])
        bias = np.concatenate([part.bias.astype(np.float64) / d for part, d in zip(parts, divisors, strict=True)])
        n, k = weight.shape
        made = plan.decisions
        packed = pack_linear(made, weight)
        spec = KernelSpec("linear", n, k, self.plan.isa, epilogue.label, made, epilogue.residual, plan.buckets)
        arrays = {
            **packed.arguments(),
            "fold": (-quantization.zero_point * weight.astype(np.int64).sum(axis=1)).astype(np.int32),
            "scale": scale.astype(np.float32),
            "bias": bias.astype(np.float32),
        }
        if results is None:
            outputs = epilogue.outputs(self.program.groups, n, made.storage.lanes)
            results = [Value(f"{name}.{output}", shape, dtype) for output, shape, dtype in outputs]
        self.program.call(
            name.split(".")[-1],
            spec,
            epilogue,
            lambda: linear(spec, epilogue),
            [x, *self.program.add_parameters(name, arrays, packed.roles), *extra],
            results,
        )
        workload = linear_workload(spec, plan)
        self.reports.append(KernelReport(name, (n, k), packed.stored / weight.size, plan.reason, workload, spec))
        return [result.name for result in results]

    def _head(self, stream: str) -> list[Output]:
        """Append the head's kernels; returns the module's outputs."""
        head, program, hidden = self.model.head, self.program, self.config.hidden_size
        groups, sequences = program.groups, program.ends - 1

        def kernel(op: str, width: int, label: str = "") -> KernelSpec:
            return KernelSpec(op, width, hidden, self.plan.isa, label)

        if head.kind == "none":
            pooled = Value("sentence_embedding", (sequences, hidden), "float32")
            pooling, normalize = head.pooling, head.normalize
            own = kernel("pool", hidden, pooling + (">unit" if normalize else ""))
            program.call(f"{pooling}_pool", own, (), lambda: pool(own, pooling, normalize), [stream, "offsets"], [pooled])
            return [Output(stream, "token", hidden), Output(pooled.name, "sequence", hidden)]
        if head.projection is None:
            raise InvalidModel(f"a {head.kind} head needs a projection")
        width = len(head.projection.bias)
        names = program.add_parameters("head", _dense("project", head.projection))
        if head.kind == "sequence_classification":
            before = [] if head.pre is None else program.add_parameters("head", _dense("pre", head.pre))
            activation = None if head.pre is None else head.pre_activation
            logits = Value("logits", (sequences, width), "float32")
            sequence = kernel("sequence_head", width, activation or "")
            program.call(
                "head",
                sequence,
                (),
                lambda: sequence_head(sequence, activation),
                [stream, "offsets", *before, *names],
                [logits],
            )
            return [Output("logits", "sequence", width)]
        split = head.kind == "question_answering"
        labels = ["start_logits", "end_logits"] if split else ["logits"]
        each = 1 if split else width
        token = kernel("token_head", width)
        results = [Value(label, (groups, GROUP, each), "float32") for label in labels]
        program.call("head", token, split, lambda: token_head(token, split), [stream, *names], results)
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
