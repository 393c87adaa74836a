"""`NAME.h` of a library that holds a model: `runtime/tilewright.h` with the library's prefix, less what the library lacks."""

from __future__ import annotations

import re

_OPEN = """\
/* Open the model. On success *engine is to be closed.
 *
 * path: {path} */
"""
_IN_FILE = """NAME.safetensors, whose pages processes share. It must be the file that was made with the library: its sha256 is
 * computed, 0.5 to 1 ms per MB, unless TILEWRIGHT_TRUST_FILES is set."""
_EMBEDDED = "NULL, because the library holds the weights."


def header(text: str, name: str, *, embedded: bool) -> str:
    """The header of library `name` from that of the runtime, `text`; `embedded` weights are in the library."""
    result = "\n\n".join(_blocks(text, _EMBEDDED if embedded else _IN_FILE))
    title = f"{name}, a transformer encoder compiled by Tilewright, and what runs it."
    result = _replaced(result, "Tilewright's runtime: loads compiled transformer encoders and runs them.", title)
    result = _replaced(result, '"model.tw"', "NULL" if embedded else '"NAME.safetensors"')
    result = result.replace("NAME", name).replace("tilewright_", f"{name}_")
    return result.replace("TILEWRIGHT_", f"{name.upper()}_")


def api(text: str) -> list[str]:
    """The functions that a library exports, by their names after the prefix; `text` is the header of the runtime."""
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return [name for name in re.findall(r"\btilewright_(\w+)\(", code) if name != "open_model"]


def _blocks(text: str, path: str) -> list[str]:
    """The header's paragraphs, of which `tilewright_open` is told what its path is."""
    blocks = []
    for block in text.split("\n\n"):
        if "tilewright_status tilewright_open(" in block:
            blocks.append(_OPEN.format(path=path) + block[block.index("TILEWRIGHT_API") :])
        elif "tilewright_model" not in block:  # for models that are linked by other means
            blocks.append(block)
    return blocks


def _replaced(text: str, old: str, new: str) -> str:
    if old not in text:
        raise ValueError(f"the header of the runtime lacks {old!r}")
    return text.replace(old, new)
