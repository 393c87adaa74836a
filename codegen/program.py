"""A `Program`: the straight-line sequence of kernel calls a model becomes, and its translation to a Relax module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from tilewright.codegen.workload import GROUP, KernelSpec
from tilewright.manifest import Role

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Value:
    """A tensor made by a kernel: its name, shape (numbers and expressions of G and ends) and dtype."""

    name: str
    shape: tuple[Any, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """One kernel call: arguments are names of inputs, parameters or earlier values."""

    kernel: str
    arguments: tuple[str, ...]
    results: tuple[Value, ...]


@dataclass
class Program:
    """Kernel calls in order. Kernels are shared by identity, so compile time does not grow with a model's depth.

    groups: symbolic number of token groups G. ends: symbolic length of offsets, B + 1. specs: of every kernel, by name.
    roles: of the parameters that are not mere values (see `manifest.Parameter`).
    """

    groups: Any = field(default_factory=lambda: tirx.Var("G", "int64"))
    ends: Any = field(default_factory=lambda: tirx.Var("ends", "int64"))
    parameters: dict[str, Array] = field(default_factory=dict)
    specs: dict[str, KernelSpec] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    _kernels: dict[Any, tuple[str, tvm.tirx.PrimFunc]] = field(default_factory=dict)
    _calls: list[Call] = field(default_factory=list)

    def add_parameters(self, prefix: str, arrays: Mapping[str, Array], roles: Mapping[str, Role] | None = None) -> list[str]:
        """Add weights under `prefix.name`, those in `roles` with a role of their own; returns their full names in order."""
        names = [f"{prefix}.{name}" for name in arrays]
        self.roles.update({f"{prefix}.{name}": role for name, role in (roles or {}).items()})
        self.parameters.update(zip(names, arrays.values(), strict=True))
        return names

    def call(
        self,
        hint: str,
        spec: KernelSpec,
        detail: Any,
        make: Callable[[], Any],
        arguments: Sequence[str],
        results: Sequence[Value],
    ) -> None:
        """Call the kernel of `spec` and `detail`, made by `make` on first use and named after `hint`.

        detail: constants that the kernel's code holds and the spec does not name, such as the epsilon of a LayerNorm.
        """
        key = spec, detail
        if key not in self._kernels:
            taken = {name for name, _ in self._kernels.values()}
            name = next(n for n in (hint, *(f"{hint}_{i}" for i in range(2, len(taken) + 2))) if n not in taken)
            self._kernels[key] = (name, make())
            self.specs[name] = spec
        self._calls.append(Call(self._kernels[key][0], tuple(arguments), tuple(results)))

    def to_relax(self, inputs: Sequence[str], outputs: Sequence[str], max_tokens: int) -> tvm.IRModule:
        """The IRModule with main(*inputs, offsets, params) -> tuple of `outputs`; inputs are i32[G, 16]."""
        builder = relax.BlockBuilder()
        symbols = {name: builder.add_func(func, name) for name, func in self._kernels.values()}
        ids = [relax.Var(name, relax.TensorType([self.groups, GROUP], "int32")) for name in inputs]
        offsets = relax.Var("offsets", relax.TensorType([self.ends], "int32"))
        types = [relax.TensorType(list(array.shape), str(array.dtype)) for array in self.parameters.values()]
        params = relax.Var("params", relax.TupleType(types))
        attributes = {"tir_var_upper_bound": {"G": max_tokens // GROUP}}
        with builder.function("main", [*ids, offsets, params], attrs=attributes):
            with builder.dataflow():
                values: dict[str, Any] = {"offsets": offsets, **dict(zip(inputs, ids, strict=True))}
                for index, name in enumerate(self.parameters):
                    values[name] = builder.emit(relax.TupleGetItem(params, index))
                for call in self._calls:
                    self._emit(builder, symbols, values, call)
                results = builder.emit_output(relax.Tuple([values[name] for name in outputs]))
            builder.emit_func_output(results)
        return builder.get()

    def _emit(self, builder: Any, symbols: dict[str, Any], values: dict[str, Any], call: Call) -> None:
        types = [relax.TensorType(list(value.shape), value.dtype) for value in call.results]
        arguments = [values[name] for name in call.arguments]
        made = builder.emit(relax.call_tir(symbols[call.kernel], arguments, types if len(types) > 1 else types[0]))
        for index, value in enumerate(call.results):
            values[value.name] = builder.emit(relax.TupleGetItem(made, index)) if len(types) > 1 else made
