"""What config.json must be like for its values to be used: the types of those that every family has, and one number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from tilewright.frontend.config import read_json, validated

NAME = "config.json"
LARGEST = 2**31 - 1
_POSITIVE = TypeAdapter(Annotated[int, Field(gt=0, le=LARGEST, strict=True)])
_EPSILON = TypeAdapter(Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False, strict=True)])


class _Settings(BaseModel):
    """Fields whose types must be right; what their values may be is for those to say who use them."""

    model_config = ConfigDict(strict=True)
    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    id2label: dict[str, str] | None = None
    pad_token_id: int | None = None

    @field_validator("id2label")
    @classmethod
    def _numbered(cls, labels: dict[str, str] | None) -> dict[str, str] | None:
        if labels and sorted(labels) != sorted(str(number) for number in range(len(labels))):
            raise ValueError("expected labels numbered from 0")
        return labels


def read_settings(file: Path) -> dict[str, Any]:
    """The object in the config.json `file`; raises InvalidModel where it cannot be read or a field is of a wrong type."""
    settings = read_json(file, dict)
    validated(TypeAdapter(_Settings), settings, NAME)
    return dict(settings)


def positive_integer(settings: dict[str, Any], key: str) -> int:
    """The size `key`; raises InvalidModel unless it is a positive integer."""
    return validated(_POSITIVE, settings.get(key), NAME, key)


def epsilon(settings: dict[str, Any], key: str | None) -> float:
    """The epsilon of LayerNorms, 1e-12 where `key` is None or not there; raises InvalidModel unless it lies between 0 and 1."""
    return 1e-12 if key is None else validated(_EPSILON, settings.get(key, 1e-12), NAME, key)
