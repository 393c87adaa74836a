"""Which engines are compared, and on what form of the model; another one is an entry here and an adapter."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WORK = ROOT / ".bench"
"""Holds the environments (`make peers`), converted models and results; not under version control."""

ENVIRONMENTS = WORK / "envs"

Block = tuple[int, int]


@dataclass(frozen=True)
class Peer:
    """An engine and the form of the model it runs.

    adapter: a name of `adapters.ADAPTERS`. form: a name of `benchmarks.forms.FORMS`.
    environment: a folder of ENVIRONMENTS; none for the environment of the benchmark.
    block, sparsity: other than what the others run, where given.
    shapes: the only ones it is run at; rounds: turns it takes at most, for engines too slow to take more.
    """

    name: str
    adapter: str
    form: str
    environment: str | None = None
    block: Block | None = None
    sparsity: float | None = None
    shapes: tuple[str, ...] | None = None
    rounds: int | None = None

    def python(self) -> Path:
        """The interpreter of its environment; raises FileNotFoundError, naming the remedy."""
        if self.environment is None:
            return Path(sys.executable)
        python = environment_python(self.environment)
        if not python.exists():
            raise FileNotFoundError(f"there is no environment {python.parent.parent.relative_to(ROOT)}; run make peers")
        return python


def environment_python(name: str) -> Path:
    """The interpreter that `make peers` makes for the environment `name`."""
    return ENVIRONMENTS / name / "bin" / "python"


BASELINE = "onnxruntime fp32"

PEERS = (
    Peer(BASELINE, "onnxruntime", "fused.onnx"),
    Peer("onnxruntime int8 dynamic", "onnxruntime", "dynamic.onnx"),
    Peer("onnxruntime int8 static", "onnxruntime", "qdq.onnx"),
    Peer("openvino fp32", "openvino fp32", "plain.onnx", "openvino"),
    Peer("openvino int8", "openvino int8", "openvino", "openvino"),
    Peer("torch eager", "torch eager", "float", "torch"),
    Peer("torch compile", "torch compile", "float", "torch"),
    Peer("torch int8 pt2e", "torch pt2e", "float", "torch"),
    Peer("deepsparse fp32 1x4", "deepsparse", "plain.onnx", "deepsparse", block=(1, 4)),
    Peer("deepsparse fp32 4x1", "deepsparse", "plain.onnx", "deepsparse"),
    Peer("deepsparse int8 dense", "deepsparse", "deepsparse.onnx", "deepsparse", sparsity=0.0),
    Peer("deepsparse int8 1x4", "deepsparse", "deepsparse.onnx", "deepsparse", block=(1, 4)),
    Peer("deepsparse int8 4x1", "deepsparse", "deepsparse.onnx", "deepsparse"),
    # about a hundred times the others' time: one call at one short shape
    Peer("tvm default", "tvm", "plain.onnx", shapes=("1x32",), rounds=1),
)


def ours(level: str) -> Peer:
    """Tilewright, compiled for an ISA level."""
    return Peer(f"tilewright {level}", "tilewright", f"{level}.tw")
