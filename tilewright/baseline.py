"""ONNX Runtime as the yardstick: the same inputs to both, timed in turns within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.errors import InvalidInput, InvalidModel

_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_TURN = 3  # timed calls before the other engine's turn


class OnnxRuntime:
    """An ONNX encoder in ONNX Runtime's CPU provider on `threads` threads; called as an Engine is."""

    def __init__(self, model: Path, threads: int, unfused: bool = False) -> None:
        """Raises InvalidInput for a missing file, InvalidModel for what ONNX Runtime cannot load or is no encoder.

        unfused: compute a QDQ graph as it is written, its products in float32 between Q/DQ pairs, which is slow but the
        same on every CPU. The integer kernels that ONNX Runtime makes of such a graph saturate on CPUs without VNNI.
        """
        import onnxruntime

        if not model.is_file():
            raise InvalidInput(f"{model} does not exist; give the ONNX file to compare with")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if unfused:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # threads that wait busily would take the cores from the engine whose turn it is
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no base class of its own errors
            raise InvalidModel(f"ONNX Runtime cannot load {model}: {error}") from None
        self._inputs = {node.name: _DTYPES.get(node.type) for node in self._session.get_inputs()}
        known = ("input_ids", "attention_mask", "token_type_ids")
        if "input_ids" not in self._inputs or any(name not in known or not self._inputs[name] for name in self._inputs):
            raise InvalidModel(f"{model} takes {', '.join(self._inputs)}; expected integers named {', '.join(known)}")
        self._outputs = [node.name for node in self._session.get_outputs()]

    def __call__(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, token_type_ids: ArrayLike | None = None
    ) -> dict[str, NDArray[Any]]:
        """Outputs by name; a missing mask is all ones, missing token types all zero."""
        ids = np.asarray(input_ids)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids) if attention_mask is None else attention_mask,
            "token_type_ids": np.zeros_like(ids) if token_type_ids is None else token_type_ids,
        }
        feed = {name: np.asarray(given[name], dtype) for name, dtype in self._inputs.items()}
        return dict(zip(self._outputs, self._session.run(None, feed), strict=True))


def time_in_turns(calls: Mapping[str, Callable[[], object]], duration: float) -> dict[str, list[float]]:
    """Seconds of each call by name, over about `duration` seconds for each.

    The calls take turns, so that a change of the machine's speed meets all of them. Each turn starts with an untimed
    call, which brings the engine's weights back into the caches.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + duration * len(calls)
    while not all(samples.values()) or time.perf_counter() < end:
        for name, call in calls.items():
            call()
            for _ in range(_TURN):
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
    return samples
