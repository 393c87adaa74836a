"""ONNX Runtime as an instance of Tilewright's server loads it, for `benchmarks/onnx_server.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tilewright.artifact import read_manifest
from tilewright.baseline import OnnxRuntime
from tilewright.errors import InvalidInput
from tilewright.instances import Launch


class OnnxEngine:
    """Called as an Engine is; an embedding model's `last_hidden_state` is pooled here where the graph does not pool."""

    def __init__(self, launch: Launch, model: Path) -> None:
        self.manifest = read_manifest(launch.artifact)
        self._head = self.manifest.head
        self._session = OnnxRuntime(model, launch.threads)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Outputs by name."""
        outputs = self._session(**inputs)
        if self._head.kind == "embedding" and "sentence_embedding" not in outputs:
            outputs["sentence_embedding"] = self._pool(outputs["last_hidden_state"], inputs["attention_mask"])
        return outputs

    def _pool(self, hidden: Any, mask: Any) -> Any:
        if self._head.pooling == "mean":
            pooled = (hidden * mask[..., None].astype(np.float32)).sum(1) / mask.sum(1, keepdims=True, dtype=np.float32)
        elif self._head.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            raise InvalidInput(f"pooling by {self._head.pooling} is not written here; export a graph that pools")
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True) if self._head.normalized else pooled
