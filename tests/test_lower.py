"""Lowering: what it refuses, how many kernels it makes, and that the module's interface is whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from tests import tiny
from tests.kernel_harness import runs_here
from tilewright.codegen.build import build
from tilewright.codegen.decisions import Storage
from tilewright.codegen.lower import Lowered, lower
from tilewright.codegen.model import EncoderModel, Quantization
from tilewright.codegen.passes import FINAL, LOWERING, PROGRAM, dump
from tilewright.codegen.plan import LinearPlan
from tilewright.codegen.workload import ATTRIBUTE, KernelSpec
from tilewright.errors import InvalidModel, ScheduleMismatch
from tilewright.frontend import load
from tilewright.pipeline import quantize
from tilewright.schedules.apply import apply
from tilewright.schedules.choice import plan
from tilewright.schedules.decide import decide_linear
from tilewright.schedules.isa import ISAS

HEADS = {
    "BertModel": ("last_hidden_state", "sentence_embedding"),
    "DistilBertForQuestionAnswering": ("start_logits", "end_logits"),
    "BertForSequenceClassification": ("logits",),
    "DistilBertForTokenClassification": ("logits",),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncoderModel]:
    made = {}
    for name in HEADS:
        directory = tmp_path_factory.mktemp(name)
        source = load(tiny.save(tiny.build(name), directory / "float"))
        made[name] = load(quantize(source, tiny.texts(20), directory / "int8"))
    return made


@pytest.fixture(scope="module")
def bert(models: dict[str, EncoderModel]) -> EncoderModel:
    return models["BertModel"]


def lowered(model: EncoderModel, isa: str = "avx2", **settings: int) -> Lowered:
    return lower(model, plan(model, ISAS[isa]), **settings)


def functions(module: tvm.IRModule) -> dict[str, tvm.tirx.PrimFunc]:
    return {str(symbol.name_hint): func for symbol, func in module.functions.items() if isinstance(func, tvm.tirx.PrimFunc)}


def main(module: tvm.IRModule) -> relax.Function:
    return module["main"]


@pytest.mark.parametrize("name", HEADS)
def test_interface(models: dict[str, EncoderModel], name: str) -> None:
    made = lowered(models[name])
    types = ("token_type_ids",) if name.startswith("Bert") else ()
    assert made.inputs == ("input_ids", "position_ids", *types)
    assert tuple(output.name for output in made.outputs) == HEADS[name]
    assert [str(param.name) for param in main(made.module).params] == [*made.inputs, "offsets", "params"]
    assert all(array.flags.c_contiguous for array in made.parameters.values())
    declared = main(made.module).params[-1].ty.fields
    assert len(declared) == len(made.parameters)
    for field, (parameter, array) in zip(declared, made.parameters.items(), strict=True):
        assert (tuple(int(extent) for extent in field.shape.values), str(field.dtype)) == (array.shape, str(array.dtype)), (
            parameter
        )


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni"])
@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_and_value_is_used(models: dict[str, EncoderModel], name: str, isa: str) -> None:
    """Every weight reaches a kernel, and every kernel's result another kernel or the caller."""
    made = lowered(models[name], isa)
    uses: Counter[relax.Var] = Counter()
    bound: list[relax.Var] = []
    (block,) = [b for b in main(made.module).body.blocks if isinstance(b, relax.DataflowBlock)]
    for binding in block.bindings:
        bound.append(binding.var)
        relax.analysis.post_order_visit(binding.value, lambda e: uses.update([e] if isinstance(e, relax.Var) else []))
    unused = [var.name for var in bound if not uses[var] and not isinstance(var.ty, relax.TupleType)]
    assert unused == []
    read = [
        b
        for b in block.bindings
        if isinstance(b.value, relax.TupleGetItem) and b.value.tuple_value.same_as(main(made.module).params[-1])
    ]
    assert [int(b.value.index) for b in read] == list(range(len(made.parameters)))


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni"])
def test_kernels_do_not_grow_with_depth(bert: EncoderModel, isa: str) -> None:
    shallow, deep = (lowered(replace(bert, layers=bert.layers * count), isa) for count in (1, 3))
    assert functions(shallow.module).keys() == functions(deep.module).keys()
    assert len(deep.kernels) == 3 * len(shallow.kernels)


def test_kernels_of_equal_layers_are_shared_and_of_different_ones_not(bert: EncoderModel) -> None:
    layer = bert.layers[0]
    same = replace(bert, layers=(layer,) * 3)
    assert [name for name in functions(lowered(same).module) if name.startswith("down")] == [
        "down",
        "down_2",
    ]  # the last has no consumer
    weight = layer.down.weight.copy()
    weight[:, 8:] = 0
    sparse = replace(layer, down=replace(layer.down, weight=weight, block=(4, 1)))
    mixed = replace(bert, layers=(layer, sparse, layer, sparse))
    specs = lowered(mixed, "avxvnni").specs  # avx2 keeps dense matrices as columns, too
    assert {spec.linear.block for name, spec in specs.items() if name.startswith("down")} == {None, (4, 1)}


def test_every_kernel_has_a_spec_and_carries_its_key(bert: EncoderModel) -> None:
    made = lowered(bert)
    kernels = functions(made.module)
    assert kernels.keys() == made.specs.keys()
    for name, func in kernels.items():
        assert str(func.attrs[ATTRIBUTE]) == made.specs[name].key()
        assert made.specs[name].isa == "avx2"


def test_what_was_compiled_is_reported(bert: EncoderModel) -> None:
    made = lowered(bert)
    assert {report.spec for report in made.kernels} == {spec for spec in made.specs.values() if spec.op == "linear"}


def test_layers_of_different_density_share_no_kernel_that_was_decided_by_it(bert: EncoderModel) -> None:
    plans = plan(bert, ISAS["avx2"])
    first, second = plans.layers[0], plans.layers[1]
    other = replace(second, up=replace(second.up, decisions=replace(second.up.decisions, chunks=1)))
    made = lower(bert, replace(plans, layers=(first, other)))
    assert {report.spec.linear.chunks for report in made.kernels if report.name.endswith("up")} == {
        first.up.decisions.chunks, 1,
    }  # fmt: skip


def test_keys_tell_workloads_apart(models: dict[str, EncoderModel]) -> None:
    seen: dict[str, KernelSpec] = {}
    for model in (models["BertModel"], models["DistilBertForQuestionAnswering"]):
        for isa in ("avx2", "avx512vnni"):
            for kernel in lowered(model, isa).kernels:
                assert seen.setdefault(kernel.spec.key(), kernel.spec) == kernel.spec
                assert kernel.workload.isa in kernel.workload.key()


def test_reports(bert: EncoderModel) -> None:
    random = np.random.default_rng(0)
    layer = bert.layers[0]
    mask = np.kron(random.random((8, 64)) < 0.25, np.ones((4, 1), int))
    down = replace(layer.down, weight=(np.full((32, 64), 5) * mask).astype(np.int8), block=(4, 1))
    up = replace(layer.up, block=(64, 64))
    made = lowered(replace(bert, layers=(replace(layer, down=down, up=up),)))
    reports = {report.name: report for report in made.kernels}
    assert list(reports) == ["layer0.qkv", "layer0.output", "layer0.up", "layer0.down"]
    assert [report.shape for report in made.kernels] == [(96, 32), (32, 32), (64, 32), (32, 64)]
    assert reports["layer0.down"].spec.linear.block == (4, 1)
    assert reports["layer0.down"].density == pytest.approx(mask.mean())
    assert reports["layer0.down"].workload.density == min(100, -(-round(mask.mean() * 100) // 5) * 5)
    assert reports["layer0.down"].reason == ""
    assert reports["layer0.up"].spec.linear.block == (4, 1)  # how avx2 keeps dense matrices
    assert "dense" in reports["layer0.up"].reason


def test_max_tokens_is_whole_groups_and_holds_a_sequence(bert: EncoderModel) -> None:
    assert lowered(bert, max_tokens=1000).max_tokens == 992
    assert lowered(bert, max_tokens=1).max_tokens == 32  # max_positions
    odd = replace(bert, config=replace(bert.config, max_positions=33))
    assert lowered(odd, max_tokens=1).max_tokens == 48
    bound = main(lowered(bert, max_tokens=160).module).attrs["tir_var_upper_bound"]
    assert int(bound["G"]) == 10


def test_float_models_are_refused(tmp_path: Path) -> None:
    model = load(tiny.save(tiny.build("BertModel"), tmp_path))
    with pytest.raises(InvalidModel, match="cannot compile a float model; quantise it first"):
        lowered(model)


def test_the_plan_of_another_model_is_refused(bert: EncoderModel) -> None:
    made = plan(bert, ISAS["avx2"])
    for layers in ((), made.layers[:1], made.layers * 2):
        with pytest.raises(ScheduleMismatch, match=f"the plan has {len(layers)} layers, the model {len(bert.layers)};"):
            lower(bert, replace(made, layers=layers))


def test_inconsistent_quantisation_is_refused(bert: EncoderModel) -> None:
    layer = bert.layers[0]
    attention = layer.attention
    key = replace(attention.key, input=Quantization(123.0, 4))
    cases = {
        "must share one": replace(layer, attention=replace(attention, key=key)),
        "cannot compile a float model": replace(layer, up=replace(layer.up, input=None)),
        "an attention scale is missing": replace(layer, attention=replace(attention, value_scale=None)),
    }
    for message, broken in cases.items():
        with pytest.raises(InvalidModel, match=message):
            lowered(replace(bert, layers=(broken,)))


def test_a_head_without_a_projection_is_refused(bert: EncoderModel) -> None:
    with pytest.raises(InvalidModel, match="question_answering head needs a projection"):
        lowered(replace(bert, head=replace(bert.head, kind="question_answering")))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if not runs_here(isa)])
def test_levels_that_cannot_run_here_build(bert: EncoderModel, isa: str, tmp_path: Path) -> None:
    """With row and gather kernels in one model; the end-to-end tests build the others."""
    mixed = plan(bert, ISAS[isa])
    gather = Storage("gather", (4, 1))
    qkv, down = (LinearPlan(decide_linear(gather, n, k, 100, ISAS[isa])) for n, k in ((96, 32), (32, 64)))
    mixed = replace(mixed, layers=(mixed.layers[0], replace(mixed.layers[1], qkv=qkv, down=down)))
    made = lower(bert, mixed)
    build(apply(made.module, made.specs), ISAS[isa].target(), tmp_path / "model.so", list(made.parameters))
    assert (tmp_path / "model.so").read_bytes()[:4] == b"\x7fELF"


def test_the_module_is_dumped_after_each_pass(bert: EncoderModel, tmp_path: Path) -> None:
    made = lowered(bert)
    with dump(tmp_path / "dump"):
        build(apply(made.module, made.specs), ISAS["avx2"].target(), tmp_path / "model.so", list(made.parameters))
    names = [path.name for path in sorted((tmp_path / "dump").iterdir())]
    assert [int(name[:3]) for name in names] == list(range(len(names)))
    assert names[:3] == ["000_scheduled.py", "001_tilewright.trim.py", "002_tilewright.fetch_ahead.py"]
    passes = {name[4:].removesuffix(".py") for name in names}
    assert {str(each.info.name).replace("/", "_") for each in (*PROGRAM, *LOWERING, *FINAL)} <= passes
    assert "def qkv" in (tmp_path / "dump" / names[0]).read_text()
    with dump(None):
        apply(made.module, made.specs)
