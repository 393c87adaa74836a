"""The main function of a module, after memory planning, as a `Program`: what the runtime walks instead of a virtual machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.sym import Analyzer

from tilewright.manifest import GROUP
from tilewright.program import Extent, KernelCall, Program, Value

_STORAGE, _IN_STORAGE, _OWN = "relax.memory.alloc_storage", "relax.memory.alloc_tensor", "relax.builtin.alloc_tensor"


def flatten(function: relax.Function, parameters: Sequence[str]) -> Program:
    """`function` as a program; `parameters` are the names of the elements of its last argument, a tuple.

    The function is one block of bindings: allocations, elements of tuples and calls of kernels, as CallTIRRewrite and
    StaticPlanBlockMemory leave it. Raises ValueError for anything else, since a program has no place for it.
    """
    return _Flattening(function, parameters).run()


class _Flattening:
    def __init__(self, function: relax.Function, parameters: Sequence[str]) -> None:
        *inputs, weights = function.params
        self._function, self._weights, self._names = function, weights, parameters
        # what a variable stands for: an input's or parameter's name, a value's number, a storage, or a tuple of these
        self._meaning: dict[Any, Any] = {variable: str(variable.name) for variable in inputs}
        self._symbols = _extents(inputs)
        self._values: list[Value] = []
        self._calls: list[KernelCall] = []
        self._storages = 0

    def run(self) -> Program:
        (block,) = self._function.body.blocks
        for binding in block.bindings:
            self._bind(binding.var, binding.value)
        outputs = self._look_up(self._function.body.body)
        return Program(tuple(self._values), tuple(self._calls), outputs if isinstance(outputs, tuple) else (outputs,))

    def _bind(self, variable: relax.Var, value: Any) -> None:
        operator = value.op.name if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else None
        if operator == _STORAGE:
            self._meaning[variable] = self._storage()
        elif operator == _IN_STORAGE:
            storage, offset, shape, dtype = value.args[:4]
            if int(offset) != 0:
                raise ValueError(f"{variable.name} begins at byte {offset} of its storage; only 0 is known")
            self._meaning[variable] = self._value(self._meaning[storage], shape, dtype)
        elif operator == _OWN:
            self._meaning[variable] = self._value(self._storage(), *value.args[:2])
        elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            self._calls.append(KernelCall(str(value.op.name_hint), tuple(self._look_up(argument) for argument in value.args)))
        else:
            self._meaning[variable] = self._look_up(value)

    def _look_up(self, expression: Any) -> Any:
        if isinstance(expression, relax.Tuple):
            return tuple(self._look_up(field) for field in expression.fields)
        if isinstance(expression, relax.TupleGetItem):
            if expression.tuple_value.same_as(self._weights):
                return self._names[expression.index]
            return self._look_up(expression.tuple_value)[expression.index]
        if expression not in self._meaning:
            raise ValueError(f"{expression} has no place in a program")
        return self._meaning[expression]

    def _storage(self) -> int:
        self._storages += 1
        return self._storages - 1

    def _value(self, storage: int, shape: relax.ShapeExpr, dtype: Any) -> int:
        extents = tuple(self._extent(extent) for extent in shape.values)
        self._values.append(Value(storage, str(dtype.value), extents))
        return len(self._values) - 1

    def _extent(self, extent: Any) -> Extent:
        if isinstance(extent, tirx.IntImm):
            return int(extent)
        analyzer = Analyzer()
        for symbol, name in self._symbols:
            if analyzer.can_prove_equal(extent, symbol):
                return name
        raise ValueError(f"an extent is {extent}; programs know groups, sequences and numbers")


def _extents(inputs: Sequence[relax.Var]) -> list[tuple[Any, Extent]]:
    """The expressions that stand for groups and for sequences in the function of `inputs`."""
    groups, group = inputs[0].ty.shape.values
    (ends,) = inputs[-1].ty.shape.values
    if int(group) != GROUP:
        raise ValueError(f"tokens come in groups of {group}; expected {GROUP}")
    return [(groups, "groups"), (ends - 1, "sequences")]
