"""Whole-encoder latency beside ONNX Runtime, all engines interleaved in one process: medians and ratios.

    python -m benchmarks.encoder                            # DistilBERT, 80 % (4, 1), 1 thread, the issue's shapes
    python -m benchmarks.encoder --model minilm-l6 --block 16x4 --shapes 1x128 8x128 --threads 2
    python -m benchmarks.encoder --markdown docs/benchmarks.md

Every engine runs the same pruned model. `--levels` compiles it for several ISA levels (default: avx2 and native).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import re
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import tilewright
from benchmarks import models
from tilewright.baseline import OnnxRuntime, time_in_turns
from tilewright.cpu import cpu_features
from tilewright.schedules.isa import resolve

Engine = tilewright.Engine | OnnxRuntime


def engines(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Engine], dict[str, tilewright.Engine]]:
    """Every engine by name, and ours once more for profiling."""
    import onnx as onnx_format
    from onnxruntime.quantization import QuantType, quantize_dynamic

    block = tuple(int(n) for n in args.block.split("x"))
    source = models.build(models.SIZES[args.model], block, args.sparsity, scratch / "float")
    onnx = models.export_onnx(source, scratch / "float.onnx")
    quantize_dynamic(
        onnx,
        scratch / "dynamic.onnx",
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx_format.TensorProto.FLOAT},
    )
    int8 = models.quantized(source, scratch / "int8")
    found: dict[str, Engine] = {
        "onnxruntime fp32": OnnxRuntime(onnx, args.threads),
        "onnxruntime int8 dynamic": OnnxRuntime(scratch / "dynamic.onnx", args.threads),
    }
    ours: dict[str, tilewright.Engine] = {}
    for level in dict.fromkeys(resolve(level, cpu_features()).name for level in args.levels):
        artifact = tilewright.compile(int8, level, scratch / f"{level}.tw")
        ours[f"tilewright {level}"] = tilewright.load(artifact.path, num_threads=args.threads)
    return {**found, **ours}, ours


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All shapes; the report as plain data."""
    random = np.random.default_rng(0)
    report: dict[str, Any] = {"machine": machine(), "settings": vars(args) | {"json": None, "markdown": None}, "shapes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        found, ours = engines(args, Path(scratch))
        for shape in args.shapes:
            batch, length = (int(n) for n in shape.split("x"))
            ids = random.integers(1000, 30000, (batch, length))
            feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            calls = {name: functools.partial(engine, **feed) for name, engine in found.items()}
            samples = time_in_turns(calls, args.seconds)
            base = samples["onnxruntime fp32"]
            report["shapes"][shape] = {
                name: {
                    "ms": statistics.median(times) * 1e3,
                    "ratio": statistics.median(t / b for t, b in zip(times, base, strict=True)),
                }
                for name, times in samples.items()
            }
            report.setdefault("profile", {})[shape] = {
                name: [(k.name, k.calls, k.microseconds) for k in engine.profile(feed, iterations=20)]
                for name, engine in ours.items()
            }
    return report


def machine() -> dict[str, str]:
    """CPU, versions and date."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    packages = ("tilewright", "apache-tvm", "onnxruntime", "numpy")
    return {
        "cpu": model[1] if model else platform.processor(),
        "levels": ", ".join(
            sorted(f for f in cpu_features() if f in {"avx2", "avxvnni", "avx512bw", "avx512vnni", "amx-int8"})
        ),
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: one table of times and ratios, one of kernels for the longest-profiled shape."""
    settings = report["settings"]
    lines = [
        f"### {settings['model']}, {settings['sparsity']:.0%} zero {settings['block']} blocks, {settings['threads']} thread(s)",
        "",
        *(f"- {key}: {value}" for key, value in report["machine"].items()),
        "",
        "Median milliseconds (median ratio to ONNX Runtime fp32 in the same turns; lower is faster).",
        "",
        "| engine | " + " | ".join(report["shapes"]) + " |",
        "|---" * (len(report["shapes"]) + 1) + "|",
    ]
    for name in next(iter(report["shapes"].values())):
        cells = (f"{rows[name]['ms']:.2f} ({rows[name]['ratio']:.2f})" for rows in report["shapes"].values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for shape, engines_ in report["profile"].items():
        for name, kernels in engines_.items():
            total = sum(us for *_, us in kernels)
            parts = ", ".join(f"{kernel} {us / total:.0%}" for kernel, _, us in kernels if us / total >= 0.005)
            lines += ["", f"{name}, {shape}, by kernel: {parts}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.SIZES, default="distilbert")
    parser.add_argument("--block", default="4x1")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--shapes", nargs="+", default=["1x32", "1x128", "1x384", "8x128"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each engine and shape")
    parser.add_argument("--levels", nargs="+", default=["avx2", "native"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="append the tables to this file")
    args = parser.parse_args()
    report = run(args)
    text = markdown(report)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))
    if args.markdown:
        with args.markdown.open("a") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
