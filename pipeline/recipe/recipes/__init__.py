"""The recipes that come along, as YAML files beside this module."""

from __future__ import annotations

from importlib.resources import files


def shipped() -> dict[str, str]:
    """Text of each recipe by its name."""
    found = [file for file in files(__name__).iterdir() if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in sorted(found, key=lambda file: file.name)}
