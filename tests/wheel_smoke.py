"""Run by `make smoke` in an environment that holds the wheel and its base dependencies only, with a toy artifact."""

import importlib.util
import os
import subprocess
import sys

import numpy as np

import tilewright

for absent in ("tvm", "tvm_ffi", "safetensors", "torch", "transformers", "onnx", "onnxruntime"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed"
assert tilewright.__file__.startswith(sys.prefix), tilewright.__file__
for package in ("codegen", "frontend", "pipeline", "schedules", "tuning_logs"):
    assert importlib.util.find_spec(f"tilewright.{package}"), f"{package} is not in the wheel"

for threads in (1, 2):
    engine = tilewright.load(sys.argv[1], num_threads=threads)
    outputs = engine(input_ids=[[3, 4, 0], [5, 6, 7]], attention_mask=[[1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(outputs["score"], [[24, 33, 0], [40, 49, 58]])
    assert engine(**engine.tokenize(["a b c"]))["score"].shape == (1, 3)


def tilewright_says(status: int, *arguments: str) -> str:
    """What the command prints; it must end with `status`."""
    command = [os.path.join(sys.prefix, "bin", "tilewright"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, (arguments, done.returncode, done.stderr)
    return done.stdout + done.stderr


for option in ("--version", "--help"):
    print(tilewright_says(0, option).strip().splitlines()[0])
assert "portable" in tilewright_says(0, "inspect", sys.argv[1])
assert "score" in tilewright_says(0, "run", sys.argv[1], "--text", "a b c")
assert "p50" in tilewright_says(0, "benchmark", sys.argv[1], "--duration", "0", "--seq-len", "8", "--json")
for command in (("compile", "model"), ("check-hardware",)):
    said = tilewright_says(3, *command)
    assert said.count("\n") == 1 and "pip install 'tilewright[compile]'" in said, said
try:
    tilewright.compile("model")
except ModuleNotFoundError as error:
    assert "pip install 'tilewright[compile]'" in str(error)
else:
    raise AssertionError("compiled without a compiler")
print("wheel: loads and runs an artifact, and says what compiling needs")
