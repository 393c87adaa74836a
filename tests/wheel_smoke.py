"""Run by `make smoke` in an environment that holds the wheel and its base dependencies only, with a toy artifact."""

import importlib.util
import os
import subprocess
import sys

import numpy as np

import tilewright

for absent in ("torch", "transformers", "onnx", "onnxruntime"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed"
assert tilewright.__file__.startswith(sys.prefix), tilewright.__file__
for package in ("codegen", "frontend", "pipeline", "schedules", "tuning_logs"):
    assert importlib.util.find_spec(f"tilewright.{package}"), f"{package} is not in the wheel"

for threads in (1, 2):
    engine = tilewright.load(sys.argv[1], num_threads=threads)
    outputs = engine(input_ids=[[3, 4, 0], [5, 6, 7]], attention_mask=[[1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(outputs["score"], [[24, 33, 0], [40, 49, 58]])
    assert engine(**engine.tokenize(["a b c"]))["score"].shape == (1, 3)
assert "tvm" not in sys.modules

for option in ("--version", "--help"):
    command = [os.path.join(sys.prefix, "bin", "tilewright"), option]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[0])
print("wheel: loads and runs an artifact")
