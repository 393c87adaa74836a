"""Tuning logs: reading, joining and pruning them, and compiling by them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilewright
from benchmarks.random_encoder import random_encoder
from tests.test_cli import ok, ok_json, refused
from tilewright.codegen.decisions import LinearDecisions
from tilewright.codegen.formats import Format
from tilewright.codegen.layer_kernels import Decisions, LayerKernel, layer_kernels
from tilewright.codegen.lower import lower
from tilewright.codegen.model import EncoderModel
from tilewright.codegen.plan import Plan
from tilewright.codegen.workload import Workload
from tilewright.errors import InvalidInput
from tilewright.predict import Sizes
from tilewright.schedules.choice import plan
from tilewright.schedules.isa import ISAS
from tilewright.tuning.candidates import candidates
from tilewright.tuning.rebuilt import rebuilt
from tilewright.tuning.records import Log, Machine, Record, Trial, encode, find_log, read_log
from tilewright.tuning.replay import Stale, check, kernel_hash, replay
from tilewright.tuning.statistics import gain

SIZES = Sizes("tuned", 2, 64, 4, 128)
MACHINE = Machine({"cpu": "made up", "hypervisor": "none"})
KEY = Workload("linear", 64, 64, "avx2", "gelu>u8.columns", (4, 1), 20, 128, 1).key()


@pytest.fixture(scope="module")
def model() -> EncoderModel:
    """Both layers are the same, so that so are their kernels' decisions."""
    made = random_encoder(SIZES, (4, 1), 0.8)
    return dataclasses.replace(made, layers=made.layers[:1] * 2)


@pytest.fixture(scope="module")
def default(model: EncoderModel) -> Plan:
    return plan(model, ISAS["avx2"])


def record(kernel: LayerKernel, tokens: int = 128, faster: float = 1.5, **changes: Any) -> Record:
    """A made-up record of the last candidate of a kernel that reads and writes as the default does."""
    default = kernel.spec.decisions
    assert default is not None
    alike = [made for made in candidates(kernel) if _as_before(made) == _as_before(default)]
    best = alike[1]
    assert best != default
    values: dict[str, Any] = {
        "key": kernel.workload.at(tokens, 1).key(),
        "decisions": encode(best),
        "default": encode(default),
        "hash": kernel_hash(kernel.decided(best), kernel.detail),
        "default_hash": kernel_hash(kernel.spec, kernel.detail),
        "best_seconds": (1.0,) * 9,
        "default_seconds": (faster,) * 9,
        "peak": (0.6, 0.4),
        "machine": MACHINE.name,
    }
    return Record(**(values | changes))


def _as_before(made: Decisions) -> Any:
    """What neighbouring kernels see of a kernel's decisions."""
    return (made.storage, made.input) if isinstance(made, LinearDecisions) else None


# what is compiled, as data


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni", "amx"])
def test_layer_kernels_are_those_that_lowering_builds(model: EncoderModel, isa: str) -> None:
    planned = plan(model, ISAS[isa])
    lowered = lower(model, planned)
    kernels = layer_kernels(model, planned)
    linears = [kernel for kernel in kernels if kernel.parts]
    assert [(kernel.name, kernel.spec, kernel.workload) for kernel in linears] == [
        (kernel.name, kernel.spec, kernel.workload) for kernel in lowered.kernels
    ]
    assert {kernel.spec for kernel in kernels} == {spec for spec in lowered.specs.values() if spec.decisions}


def test_keys_and_labels_are_read_back(model: EncoderModel) -> None:
    for isa in ISAS.values():
        for kernel in layer_kernels(model, plan(model, isa)):
            task = kernel.workload.at(64, 2)
            assert Workload.parse(task.key()) == task
            if kernel.slot != "attention":
                assert Format.parse(kernel.spec.linear.input.label) == kernel.spec.linear.input
    for wrong in ("v1:linear", KEY.replace("v2", "v1"), KEY + ":x"):
        with pytest.raises(ValueError, match="key"):
            Workload.parse(wrong)
    with pytest.raises(ValueError, match="format"):
        Format.parse("u9.rows")


# statistics


def test_gain_by_hand() -> None:
    assert gain([2.0] * 9, [1.0] * 9) == gain([4.0] * 9, [2.0] * 9)
    found = gain([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 9.0], [1.0] * 9)
    assert (found.median, found.low, found.high) == (1.4, 1.1, 1.7)  # of nine, the outer one of each end may be left out
    few = gain([2.0] * 5, [1.0] * 5)
    assert (few.low, few.high) == (0.0, float("inf"))


# files


def test_a_log_is_read_as_it_was_written(model: EncoderModel, default: Plan, tmp_path: Path) -> None:
    trial = Trial({"chunks": 2}, 0.9)
    held = [record(kernel, trials=(trial,), versions={"tilewright": "0"}) for kernel in layer_kernels(model, default)[:3]]
    log = Log.of(held, [MACHINE])
    log.write(tmp_path / "deep" / "cpu.jsonl")
    assert read_log(tmp_path / "deep" / "cpu.jsonl") == log
    lines = (tmp_path / "deep" / "cpu.jsonl").read_text().splitlines()
    assert [json.loads(line).get("record", {}).get("key") for line in lines] == [None, *sorted(log.records)]
    assert find_log(tmp_path / "deep", "cpu") == log
    with pytest.raises(InvalidInput, match="--tuned-for"):
        find_log(tmp_path / "deep", None)
    assert find_log(None, "no such cpu") == Log()


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    content = dataclasses.asdict(simple(1.5))
    change(content)
    return json.dumps({"record": content})


def simple(faster: float, key: str = KEY, **changes: Any) -> Record:
    values = {"decisions": {"rows": 1}, "default": {"rows": 2}, "hash": "a", "default_hash": "b", "peak": (0.5, 0.4)}
    samples = {"best_seconds": (1.0,) * 9, "default_seconds": (faster,) * 9}
    return Record(key=key, machine=MACHINE.name, **{**values, **samples, **changes})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a line of a tuning log"),
        ("[]", "expected one object"),
        ('{"song": {}}', "song"),
        (edited(lambda content: content.pop("hash")), "hash"),
        (edited(lambda content: content.update(surprise=1)), "surprise"),
        (edited(lambda content: content.update(peak=[1, "2"])), "peak"),
        (edited(lambda content: content.update(best_seconds=[-1.0] * 9)), "best_seconds"),
        (edited(lambda content: content.update(best_seconds=[1.0] * 8)), "pairs"),
        (edited(lambda content: content.update(key=KEY.replace("t128", "t0"))), "tokens or threads"),
        (simple(1.5).text.replace("0.5", "NaN"), "NaN"),
        ("[" * 100_000, "nested"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "cpu.jsonl"
    path.write_text(f"{MACHINE.text}\n{line}\n")
    with pytest.raises(InvalidInput, match=reason) as caught:
        read_log(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_lines_of_other_versions_are_kept_and_not_read(tmp_path: Path) -> None:
    foreign = [edited(lambda content: content.update(schema=9, more=1)), simple(1.5, KEY.replace("v2", "v1")).text]
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in foreign))
    found = read_log(tmp_path / "a.jsonl")
    assert (found.records, len(found.foreign)) == ({}, 2)
    assert read_log(tmp_path / "a.jsonl").text == found.text


KEYS = [KEY.replace("t128", f"t{tokens}") for tokens in (16, 32, 128)]
LOGS = st.builds(
    lambda records, machines: Log.of(records, [Machine({"cpu": name}) for name in machines]),
    st.lists(st.builds(simple, st.sampled_from([0.5, 1.0, 1.5]), st.sampled_from(KEYS), hash=st.sampled_from("abc"))),
    st.lists(st.sampled_from("xyz")),
)


@given(LOGS, LOGS, LOGS)
def test_merging_is_associative_commutative_and_idempotent(a: Log, b: Log, c: Log) -> None:
    assert a.merged(b) == b.merged(a)
    assert a.merged(b).text == b.merged(a).text
    assert a.merged(b).merged(c) == a.merged(b.merged(c))
    assert a.merged(a) == a
    for key, kept in a.merged(b).records.items():
        both = [log.records[key] for log in (a, b) if key in log.records]
        assert kept.gain.median == max(one.gain.median for one in both)


# compiling


def changed(log: Log, key: str, **fields: Any) -> Log:
    return Log({**log.records, key: dataclasses.replace(log.records[key], **fields)}, log.machines)


@pytest.fixture(scope="module")
def log(model: EncoderModel, default: Plan) -> Log:
    """A record of each kernel of the first layer."""
    return Log.of([record(kernel) for kernel in layer_kernels(model, default)[:5]], [MACHINE])


def test_records_decide_kernels_of_exactly_their_workload(model: EncoderModel, default: Plan, log: Log) -> None:
    found = replay(model, default, log)
    # the last layer's `down` writes another format and so is another workload
    assert set(found.applied) == {kernel.name for kernel in layer_kernels(model, default)} - {"layer1.down"}
    for kernel in layer_kernels(model, found.plan):
        assert kernel.spec.decisions is not None
        wanted = log.records.get(kernel.workload.at(128, 1).key())
        if wanted is not None:
            assert encode(kernel.spec.decisions) == wanted.decisions
    assert found.plan.layers[1].down == default.layers[1].down
    assert "9 kernels tuned, 1 default, 0 records stale" in found.summary
    assert not replay(model, default, log, threads=2).applied


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hash": "0" * 16}, "kernel changed"),
        ({"default_hash": "0" * 16}, "default kernel changed"),
        ({"decisions": {"chunks": 7}}, "illegal decision"),
        ({"decisions": {"surprise": 7}}, "illegal decision"),
        ({"default": {"chunks": 7}}, "default decided otherwise"),
    ],
)
def test_stale_records_are_skipped_by_name(
    model: EncoderModel, default: Plan, log: Log, fields: dict[str, Any], reason: str
) -> None:
    key = layer_kernels(model, default)[3].workload.at(128, 1).key()
    found = replay(model, default, changed(log, key, **fields))
    assert dict(found.stale) == {reason: 1}
    assert f"1 records stale (1 {reason})" in found.summary
    assert found.plan.layers[0].up == default.layers[0].up
    assert "layer0.up" not in found.applied


def test_what_is_not_a_decision_does_not_make_records_stale(model: EncoderModel, default: Plan, log: Log) -> None:
    """Another epsilon, longer sequences; and a field that records of earlier versions lack."""
    config = dataclasses.replace(model.config, max_positions=130)
    layers = tuple(
        dataclasses.replace(layer, attention_norm=dataclasses.replace(layer.attention_norm, eps=1e-5)) for layer in model.layers
    )
    other = dataclasses.replace(model, config=config, layers=layers)
    key = layer_kernels(model, default)[3].workload.at(128, 1).key()
    old = log.records[key]
    lacking = {"rows"} & {name for name in old.decisions if old.decisions[name] == old.default[name]}
    assert lacking
    fewer = [{name: value for name, value in one.items() if name not in lacking} for one in (old.decisions, old.default)]
    found = replay(other, default, changed(log, key, decisions=fewer[0], default=fewer[1]))
    assert len(found.applied) == 9
    assert not found.stale


def test_a_record_may_store_a_matrix_otherwise(model: EncoderModel, default: Plan) -> None:
    """What its consumer reads then is another format, and the producer another workload, whose record is found in turn."""
    up, down = layer_kernels(model, default)[3:5]
    stored = next(made for made in candidates(down) if made.input != down.spec.linear.input)
    hashes = kernel_hash(down.decided(stored), down.detail)
    second = dataclasses.replace(record(down), decisions=encode(stored), hash=hashes)
    found = replay(model, default, Log.of([second, record(up)]))
    assert set(found.applied) == {"layer0.down", "layer1.up"}  # layer 0's `up` writes what no record is about
    assert found.plan.layers[0].down.input == stored.input
    changed_up = layer_kernels(model, found.plan)[3]
    third = record(changed_up)
    found = replay(model, default, Log.of([second, third]))
    assert set(found.applied) == {"layer0.down", "layer0.up"}


def test_buckets_of_tokens_are_compiled_into_one_kernel(model: EncoderModel, default: Plan) -> None:
    """Those that read the same packed weights; the largest one known is for all larger calls."""
    up = layer_kernels(model, default)[3]
    made = up.spec.linear
    alike = [one for one in candidates(up) if isinstance(one, LinearDecisions) and one.packing == made.packing and one != made]
    other = next(one for one in candidates(up) if isinstance(one, LinearDecisions) and one.packing != made.packing)

    def at(tokens: int, decisions: LinearDecisions) -> Record:
        hashed = kernel_hash(up.decided(decisions), up.detail)
        return record(up, tokens, decisions=encode(decisions), hash=hashed)

    first, second = alike[:2]
    found = replay(model, default, Log.of([at(16, first), at(32, other), at(64, second), at(128, second)]))
    plan = found.plan.layers[0].up
    assert plan.decisions == second
    assert [(bucket.groups, bucket.decisions) for bucket in plan.buckets] == [(1, first)]  # 64 is part of what follows
    used = [Workload.parse(one.key).tokens for one in found.applied["layer0.up"]]
    assert used == [16, 64, 128]
    spec = layer_kernels(model, found.plan)[3].spec
    assert spec.buckets == plan.buckets


def test_compiling_by_a_log_changes_kernels_and_no_result(model: EncoderModel, log: Log, tmp_path: Path) -> None:
    log.write(tmp_path / "logs" / "znver3.jsonl")
    plain = tilewright.compile(model, "avx2", tmp_path / "plain.tw")
    assert not plain.manifest.levels[0].tuning
    tuned = tilewright.compile(model, "avx2", tmp_path / "tuned.tw", tuning_records=tmp_path / "logs", tuned_for="Epyc 7R13")
    assert len(tuned.replays["avx2"].applied) == 9
    (used,) = tuned.manifest.levels[0].tuning["layer0.up"]
    assert (used.tokens, used.gain, used.peak) == (128, 1.5, 0.6)
    assert used.key in log.records
    ids = np.arange(200).reshape(4, 50)
    if not tilewright.cpu.cpu_features().issuperset(ISAS["avx2"].features):
        return
    a, b = (tilewright.load(one.path, num_threads=1)(ids) for one in (plain, tuned))
    for name, values in a.items():
        np.testing.assert_allclose(values, b[name], atol=1e-5)


def test_wishes_that_records_cannot_fulfil_are_refused(model: EncoderModel, tmp_path: Path) -> None:
    for settings, reason in (
        ({"tuned_for": "avx2"}, "names no CPU"),
        ({"tuning_records": tmp_path / "none.jsonl"}, "is no tuning log"),
        ({"tuning_records": tmp_path, "sparse": "never"}, "leave one out"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            tilewright.compile(model, "avx2", tmp_path / "model.tw", **settings)
    assert list(tmp_path.iterdir()) == []


# the command line


def test_a_kernel_is_rebuilt_from_its_record(model: EncoderModel, default: Plan) -> None:
    for kernel in layer_kernels(model, default):
        made = record(kernel)
        again = rebuilt(made)
        assert not isinstance(again, Stale)
        assert (again.spec, again.workload) == (kernel.spec, kernel.workload.at(128, 1))
        assert not isinstance(check(made, again), Stale)
    strange = dataclasses.replace(made, key=made.key.replace("add_norm", "add_word"))
    assert rebuilt(strange) == Stale("unknown epilogue")


def test_logs_on_the_command_line(log: Log, tmp_path: Path) -> None:
    a, b, joined = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "joined.jsonl"
    first, second = sorted(log.records)[:2]
    log.write(a)
    changed(log, first, hash="0" * 16, decisions={"chunks": 1}, default_seconds=(3.0,) * 9).write(b)
    shown = ok_json("logs", "show", a)
    assert [row["key"] for row in shown["records"]] == sorted(log.records)
    assert (shown["records"][0]["gain"], shown["machines"]) == (1.5, {MACHINE.name: MACHINE.facts})
    assert "made up" in ok("logs", "show", a)
    assert ok_json("logs", "merge", a, b, "-o", joined)["records"] == len(log.records)
    assert read_log(joined).records[first].hash == "0" * 16  # the larger gain
    assert list(ok_json("logs", "diff", a, b)["differing"]) == [first]
    assert first in ok("logs", "diff", a, b)
    pruned = ok_json("logs", "prune", joined)
    assert pruned == {"kept": len(log.records) - 1, "removed": {"illegal decision": 1}}
    assert second in read_log(joined).records
    a.write_text("nonsense\n")
    assert f"{a}, line 1" in refused(2, "logs", "show", a)
