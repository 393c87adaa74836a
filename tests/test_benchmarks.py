"""The benchmark beside peers, as far as it goes without their environments: ONNX Runtime is in this one."""

import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import encoder, exports, real_text, report
from benchmarks.forms import FORMS
from benchmarks.peers.adapters import ADAPTERS
from benchmarks.peers.process import Worker, WorkerError, take_turns
from benchmarks.peers.table import BASELINE, PEERS, Peer
from benchmarks.run import Case, save_work
from tests import tiny
from tilewright.baseline import OnnxRuntime

IDS = tiny.sequences(11)[0][None]
ITEMS = [(IDS, np.ones_like(IDS)), (IDS[:, :5].copy(), np.ones((1, 5), np.int64))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny question-answering model as ONNX."""
    directory = tmp_path_factory.mktemp("tiny")
    saved = tiny.save(tiny.build("DistilBertForQuestionAnswering"), directory / "float")
    return exports.export(saved, directory / "plain.onnx", exports.QUESTION_ANSWERING)


@pytest.fixture
def worker(model: Path) -> Iterator[Worker]:
    started = start(Peer("ort", "onnxruntime", "plain.onnx"), model)
    yield started
    started.close()


def start(peer: Peer, model: Path) -> Worker:
    return Worker(peer, model, (min(os.sched_getaffinity(0)),))


def state(worker: Worker) -> str:
    """T for a stopped process."""
    return Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_worker_runs_the_model_and_is_stopped_between(worker: Worker, model: Path, tmp_path: Path) -> None:
    assert worker.versions.keys() == {"onnxruntime"}
    found = worker.work(save_work(tmp_path / "work.npz", ITEMS))
    expected = OnnxRuntime(model, threads=1)(*ITEMS[0])["start_logits"]
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-5)
    assert state(worker) == "T"
    seconds = worker.run([0, 1, 1])
    assert len(seconds) == 3 and all(0 < time < 10 for time in seconds)
    assert state(worker) == "T"


def test_what_goes_wrong_in_a_worker_is_told(worker: Worker, model: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"nothing\.npz"):
        worker.work(tmp_path / "nothing.npz")
    with pytest.raises(WorkerError, match="exit status 1"):
        worker.run([0])
    with pytest.raises(WorkerError, match="absent"):
        start(worker.peer, model.with_name("absent.onnx"))
    with pytest.raises(FileNotFoundError, match="make peers"):
        start(Peer("peer", "onnxruntime", "plain.onnx", environment="no-such"), model)


def test_killed_worker_names_the_signal(worker: Worker) -> None:
    worker._process.kill()
    with pytest.raises(WorkerError, match="SIGKILL"):
        worker.run([0])


def test_turns_leave_out_who_fails_or_has_had_enough(worker: Worker, model: Path, tmp_path: Path) -> None:
    once, broken = start(Peer("once", "onnxruntime", "plain.onnx", rounds=1), model), start(worker.peer, model)
    try:
        work = save_work(tmp_path / "work.npz", ITEMS)
        for each in (worker, once, broken):
            each.work(work)
        broken._process.kill()
        failures: list[str] = []
        rounds = take_turns({"a": worker, "once": once, "broken": broken}, 0, lambda name, reason: failures.append(name))
        assert {name: len(times) for name, times in rounds.items()} == {"a": 3, "once": 1}
        assert failures == ["broken"]
    finally:
        once.close()
        broken.close()


def test_quantised_forms_agree_with_the_float_model(model: Path, tmp_path: Path) -> None:
    sequences = tiny.sequences(7, 9, 11)
    feeds = [{"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])} for ids in sequences]
    fused = exports.fuse_attention(model, tmp_path / "fused.onnx", tiny.HEADS, tiny.HIDDEN)
    assert "Attention" in {node.op_type for node in onnx.load(fused).graph.node}
    forms = {
        # dynamic INT8 multiplies integers even unfused: 7-bit weights saturate on no CPU
        "dynamic": exports.quantize_dynamic(fused, tmp_path / "dynamic.onnx", reduce_range=True),
        "qdq": exports.quantize_static(model, tmp_path / "qdq.onnx", iter(feeds), per_channel=True, float_weights=False),
        "qat": exports.quantize_static(model, tmp_path / "qat.onnx", iter(feeds), per_channel=False, float_weights=True),
    }
    expected = OnnxRuntime(model, threads=1)(*ITEMS[0])["start_logits"].ravel()
    np.testing.assert_allclose(OnnxRuntime(fused, threads=1)(*ITEMS[0])["start_logits"].ravel(), expected, atol=1e-4)
    for name, path in forms.items():
        found = OnnxRuntime(path, threads=1, unfused=True)(*ITEMS[0])["start_logits"].ravel()
        assert np.corrcoef(found, expected)[0, 1] > 0.97, name
    linears = 6 * tiny.LAYERS + 1
    for name, kind in (("qdq", onnx.TensorProto.INT8), ("qat", onnx.TensorProto.FLOAT)):
        tensors = onnx.load(forms[name]).graph.initializer
        assert (
            sum(tensor.data_type == kind and len(tensor.dims) == 2 and 50 not in tensor.dims for tensor in tensors) >= linears
        )


def test_macs_are_those_of_the_modules() -> None:
    """Against what a model of the same sizes multiplies, counted while it runs."""
    size = encoder.models.SIZES["minilm-l6"]
    layer = torch.nn.TransformerEncoderLayer(size.hidden, size.heads, size.intermediate)
    weights = sum(parameter.numel() for name, parameter in layer.named_parameters() if parameter.ndim == 2)
    batch, length = 3, 20
    products = 2 * batch * size.heads * length * length * (size.hidden // size.heads)
    assert encoder.macs("minilm-l6", 0.0, batch, length) == size.layers * (batch * length * weights + products)
    sparse = encoder.macs("minilm-l6", 0.75, batch, length)
    assert sparse == pytest.approx(size.layers * (batch * length * weights / 4 + products))


def test_tables_of_peers_are_consistent() -> None:
    assert max(Counter(peer.name for peer in PEERS).values()) == 1
    assert {peer.adapter for peer in PEERS} <= ADAPTERS.keys()
    assert {peer.form for peer in PEERS} <= FORMS.keys()
    folder = Path(encoder.__file__).parent / "peers" / "requirements"
    assert {peer.environment for peer in PEERS} - {None} == {path.stem for path in folder.iterdir()}
    for grid in encoder.GRIDS.values():
        assert BASELINE in grid.peers and set(grid.peers) <= {peer.name for peer in PEERS}


def test_options_change_the_grid() -> None:
    none = dict.fromkeys(("models", "sparsities", "threads", "shapes", "engines"))
    ((case, peers),) = encoder.select(Namespace(grid="main", **none))
    assert (case.model, case.sparsity, case.threads, len(peers)) == ("distilbert", 0.8, 1, len(PEERS))
    chosen = none | {"models": ["bert-base"], "threads": [1, 2], "engines": ["int8 4x1"]}
    cases = list(encoder.select(Namespace(grid="main", **chosen)))
    assert [(case.model, case.threads) for case, _ in cases] == [("bert-base", 1), ("bert-base", 2)]
    assert [peer.name for peer in cases[0][1]] == [BASELINE, "deepsparse int8 4x1"]
    assert not encoder.applies(cases[0][1][1], Case(sparsity=0.0)) or cases[0][1][1].block is None


LENGTHS = st.lists(st.integers(1, real_text.LONGEST), min_size=1, max_size=60)


@given(LENGTHS, st.sampled_from([1, 3, 8]), st.sampled_from([real_text.BUCKETS, (real_text.LONGEST,)]))
def test_buckets_hold_every_question_once(lengths: list[int], batch: int, buckets: tuple[int, ...]) -> None:
    sequences = [[i + 1] * length for i, length in enumerate(lengths)]
    batches = list(real_text.bucketed(sequences, batch, buckets))
    held = []
    for (ids, mask), count in batches:
        assert ids.shape[0] == batch and ids.shape[1] in buckets
        rows = [row[row > 0].tolist() for row in ids]
        assert mask.sum(1).tolist() == [max(1, len(row)) for row in rows]
        held += [row for row in rows if row]
        assert count == sum(bool(row) for row in rows)
    assert sorted(held) == sorted(sequences)
    assert all(count == batch for _, count in batches[:-1])
    moved = sum(
        any(len(sequence) <= length < ids.shape[1] for length in buckets)
        for (ids, mask), _ in batches
        for sequence in (row[row > 0] for row in ids)
        if len(sequence)
    )
    assert moved <= (batch - 1) * (len(buckets) - 1)


@given(LENGTHS, st.sampled_from([1, 8]))
def test_packed_batches_are_as_long_as_their_longest(lengths: list[int], batch: int) -> None:
    sequences = [[i + 1] * length for i, length in enumerate(lengths)]
    batches = list(real_text.packed(sequences, batch))
    assert [row[row > 0].tolist() for (ids, _), _ in batches for row in ids] == sequences
    assert all(ids.shape[1] == mask.sum(1).max() for (ids, mask), _ in batches)


def row(engine: str, shape: str, ms: float, **other: object) -> report.Row:
    return {
        "model": "distilbert", "sparsity": 0.8, "threads": 1, "shape": shape, "engine": engine, "ms": ms, "ratio": ms / 100,
        **other,
    }  # fmt: skip


def test_report_from_results(tmp_path: Path) -> None:
    rows = [
        row(engine, shape, ms * factor, cosine=0.5)
        for shape, factor in (("1x32", 1), ("1x128", 4))
        for engine, ms in (("tilewright avx2", 10), ("tvm default", 900), (BASELINE, 100), ("floor avx2", 5))
        if (engine, shape) != ("tvm default", "1x128")
    ]
    profiles = [row("tilewright avx2", "1x32", 0, microseconds={"up": 30.0, "other": 10.0})]
    case = {"model": "distilbert", "sparsity": 0.8, "threads": 1}
    common = {"machine": {"cpu": "C"}, "settings": {"seconds": 1.5}, "versions": {BASELINE: {"onnxruntime": "1"}}}
    latency = common | {"rows": rows, "profiles": profiles, "not_run": [{"case": case, "what": "torch", "reason": "absent"}]}
    throughput = common | {"throughput": [{"engine": "e", "batch": 8, "questions": 2, "per_second": 4.25}], "not_run": []}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(latency))
    text = report.markdown([json.loads(path.read_text()), throughput])
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert table[:5] == [
        "| engine | 1x32 | 1x128 | cosine |",
        f"| {BASELINE} | 100.0 (1.000) | 400.0 (4.000) | 0.500 |",
        "| tvm default | 900.0 (9.000) |  | 0.500 |",
        "| tilewright avx2 | 10.00 (0.100) | 40.00 (0.400) | 0.500 |",
        "| floor avx2 | 5.00 (0.050) | 20.00 (0.200) | 0.500 |",
    ]
    assert "| tilewright avx2 | 1x32 | 75.0% | 25.0% |" in lines
    assert "- distilbert, 80% zero, 1 thread: torch: absent" in lines
    assert "| e | 4.2 |" in lines
    plots = report.plot([latency, throughput], tmp_path / "plots")
    assert [plot.name for plot in plots] == ["time_by_length.png", "time_by_kernel.png", "efficiency.png"]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
