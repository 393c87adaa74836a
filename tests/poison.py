"""What an instance loads to die of the token POISON, as of a bug that one input finds."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from tilewright.instances import Launch, load_engine

POISON = 99


class Mortal:
    """An engine, until it is given POISON."""

    def __init__(self, launch: Launch) -> None:
        self._engine = load_engine(launch)
        self.manifest = self._engine.manifest

    def __call__(self, **inputs: Any) -> Any:
        if (np.asarray(inputs["input_ids"]) == POISON).any():
            os._exit(7)
        return self._engine(**inputs)
