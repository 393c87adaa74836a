"""JSON files of a checkpoint, read and validated with pydantic models: what is wrong ends in one line that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from tilewright.errors import InvalidModel
from tilewright.files import parse_json, read_text

T = TypeVar("T")


def read_json(path: Path, kind: type[Any] | None = None) -> Any:
    """The value of the JSON file at `path`; raises InvalidModel where it cannot be read, or is no `kind` (dict or list)."""
    try:
        value = parse_json(read_text(path))
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read: {error.strerror}; copy the whole directory of the model") from None
    except ValueError as error:
        raise InvalidModel(f"{path} cannot be read as JSON: {error}; copy the whole directory of the model") from None
    if kind is not None and not isinstance(value, kind):
        raise InvalidModel(f"{path} does not hold a JSON object; copy the whole directory of the model")
    return value


def validated(schema: TypeAdapter[T], value: Any, name: str, field: str = "") -> T:
    """`value` as `schema` says; raises InvalidModel that names the file `name`, the first field that is wrong and its value.

    field: what `value` itself is called, if it is not all of the file.
    """
    try:
        return schema.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(filter(None, (field, *map(str, first["loc"]))))
        found = repr(first["input"])
        found = found if len(found) <= 60 else found[:57] + "..."
        reason = first["msg"].removeprefix("Value error, ")
        raise InvalidModel(f"{name}: {place + ' is ' if place else ''}{found}; {reason}") from None
