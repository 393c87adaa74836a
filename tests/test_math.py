"""Vector mathematics of the kernels over dense grids, against float64; and no library calls in what is compiled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm.script import tirx as T

from tests.kernel_harness import LEVELS, Array, Kernel, linear_kernel, read_as
from tilewright.codegen.epilogues import Activate, AddNorm, Norm
from tilewright.codegen.kernels import math as kernel_math
from tilewright.codegen.kernels.attention import attention
from tilewright.codegen.workload import KernelSpec
from tilewright.schedules.decide import decide_attention
from tilewright.schedules.isa import ISAS

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "round_to_int": lambda x: T.cast(kernel_math.round_to_int(x), "float32"),
    "exp": kernel_math.exp,
    "exp2": kernel_math.exp2,
    **kernel_math.ACTIVATIONS,
}


@cache
def compiled(isa: str, name: str) -> Any:
    """y[i] = f(x[i]), 16 lanes at a time as kernels do."""
    function = FUNCTIONS[name]

    @T.prim_func(s_tir=True)
    def apply(x_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        count = T.int32()
        x = T.match_buffer(x_, (count, 16), "float32")
        y = T.match_buffer(y_, (count, 16), "float32")
        for i in T.serial(count):
            for lane in T.vectorized(16):
                y[i, lane] = function(x[i, lane])

    return tvm.compile(tvm.IRModule({"main": apply}), target=ISAS[isa].target()).mod


def evaluate(isa: str, name: str, x: Array) -> Array:
    """f(x) in float64, of x rounded to float32."""
    whole = np.zeros(-(-len(x) // 16) * 16, np.float32)
    whole[: len(x)] = x
    result = tvm.runtime.tensor(np.empty((len(whole) // 16, 16), np.float32))
    compiled(isa, name)["main"](tvm.runtime.tensor(whole.reshape(-1, 16)), result)
    return result.numpy().ravel()[: len(x)].astype(np.float64)


def grid(low: float, high: float, count: int = 200_000) -> Array:
    """Evenly spaced float32 values as float64, zero and the ends among them."""
    even = np.linspace(low, high, count).astype(np.float32)
    return np.concatenate([even, np.float32([low, high, 0.0, -0.0, 1e-30, -1e-30])]).astype(np.float64)


@pytest.mark.parametrize("isa", LEVELS)
def test_exp2(isa: str) -> None:
    x = grid(-126, 127)
    np.testing.assert_allclose(evaluate(isa, "exp2", x), np.exp2(x), rtol=4e-7)
    whole = np.arange(-126.0, 128.0)
    np.testing.assert_array_equal(evaluate(isa, "exp2", whole), np.exp2(whole))


@pytest.mark.parametrize("isa", LEVELS)
def test_exp(isa: str) -> None:
    x = grid(-87, 88)
    np.testing.assert_allclose(evaluate(isa, "exp", x), np.exp(x), rtol=5e-6)
    near = grid(-8, 8)
    np.testing.assert_allclose(evaluate(isa, "exp", near), np.exp(near), rtol=1e-6)


@pytest.mark.parametrize("isa", LEVELS)
def test_exp_at_its_ends(isa: str) -> None:
    """Clamped, never infinite or zero; exactly 1 at 0, so that the largest softmax weight is 255."""
    ends = np.array([-1e30, -1000, -88, 89, 1000, 1e30])
    np.testing.assert_allclose(evaluate(isa, "exp", ends), np.exp(np.clip(ends, -87, 88)), rtol=5e-6)
    assert (evaluate(isa, "exp", np.array([0.0, -0.0])) == 1.0).all()


@pytest.mark.parametrize("isa", LEVELS)
def test_tanh(isa: str) -> None:
    x = np.concatenate([grid(-12, 12), [-1e30, -100, 100, 1e30]])
    np.testing.assert_allclose(evaluate(isa, "tanh", x), np.tanh(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(isa: str, approximate: str) -> None:
    """|x| times the error of Phi or half that of tanh, and of float32 itself."""
    x = np.concatenate([grid(-12, 12), grid(-1e-3, 1e-3), [-1e30, -1e4, -100, 100, 1e4, 1e30]])
    exact = torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate).numpy()
    found = evaluate(isa, "gelu" if approximate == "none" else "gelu_tanh", x)
    assert (np.abs(found - exact) <= (5e-7 if approximate == "none" else 1e-6) * (1 + np.abs(x))).all()


@pytest.mark.parametrize("isa", LEVELS)
def test_relu_and_rounding_are_exact(isa: str) -> None:
    x = np.concatenate([grid(-300, 300), np.arange(-1000, 1000) / 2, [-(2.0**22), 2.0**22 - 0.5, 2.0**22]]).astype(np.float32)
    np.testing.assert_array_equal(evaluate(isa, "relu", x), np.maximum(x, 0))
    np.testing.assert_array_equal(evaluate(isa, "round_to_int", x), [float(round(float(value))) for value in x])
    assert math.isclose(evaluate(isa, "round_to_int", np.array([2.5]))[0], 2.0)


def library_calls(assembly: str) -> set[str]:
    """Functions outside the module that are called, without TVM's own runtime and the compiler's memory routines."""
    called = set(re.findall(r"\b(?:call|jmp)q?\s+([a-zA-Z_]\w*)", assembly))
    return {name for name in called if not re.match(r"TVM|__?tvm|main|mem(set|cpy|move)$", name)}


def kernels(isa: str) -> dict[str, Kernel]:
    rows, columns = read_as(isa, "rows"), read_as(isa, "columns")
    own = KernelSpec("attention", 2, 16, isa, rows.label, decide_attention(16, ISAS[isa]))
    norm = Norm(1e-5, "columns", "columns", columns)
    return {
        "attention": Kernel.of(attention(own, rows, 40), own),
        "gelu": linear_kernel(isa, "gather", (4, 1), 96, 64, Activate("gelu", columns)),
        "gelu_tanh": linear_kernel(isa, "row", None, 96, 64, Activate("gelu_tanh", rows)),
        "add_norm": linear_kernel(isa, "gather", (4, 1), 96, 64, AddNorm(norm)),
    }


@pytest.mark.parametrize("isa", ISAS)
def test_no_library_calls(isa: str) -> None:
    for name, kernel in kernels(isa).items():
        assert not library_calls(kernel.assembly), name
        assert "pmadd" in kernel.assembly or "vpdpbusd" in kernel.assembly  # it is the kernel that we look at
