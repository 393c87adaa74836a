"""`load`: the one entry to all frontends, a table of formats and how each is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from tilewright.codegen.model import EncoderModel
from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.frontend.huggingface import load_directory
from tilewright.frontend.onnx_encoder import ONNX_FOLDER, load_onnx
from tilewright.frontend.sentence_transformers import MODULES


@dataclass(frozen=True)
class Format:
    """A checkpoint format: what to call it, the file to read if `path` holds it (else None), and its reader."""

    name: str
    find: Callable[[Path], Path | None]
    load: Callable[[Path, bool], EncoderModel]


def load(path: str | PathLike[str], self_check: bool = True) -> EncoderModel:
    """Read the model at `path`: an ONNX file, a directory with one, or a Hugging Face directory, float or quantised.

    self_check: run an ONNX graph beside the model that was read, and refuse it where they differ.
    Raises InvalidModel for damaged or inconsistent files and UnsupportedModel for what Tilewright cannot run.
    """
    place = Path(path)
    if not place.exists():
        raise InvalidModel(f"{place} does not exist; give {_supported()}")
    for form in FORMATS:
        if (file := form.find(place)) is not None:
            return form.load(file, self_check)
    raise UnsupportedModel(f"{place} is not a model in a supported format; give {_supported()}")


def _find_directory(path: Path) -> Path | None:
    if (path / MODULES).exists():
        weights = next(path.glob("*.safetensors"), None) or next(path.glob("*/*.safetensors"), None)
        return path if weights or not _onnx_files(path) else None
    return path if (path / "config.json").is_file() and any(path.glob("*.safetensors")) else None


def _load_directory(path: Path, self_check: bool) -> EncoderModel:
    return load_directory(path)  # names say what its tensors are


def _find_onnx(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".onnx" else None
    files = _onnx_files(path)
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in files)
        raise UnsupportedModel(f"{path} holds {len(files)} ONNX files; give one of {names}")
    return files[0] if files else None


def _onnx_files(path: Path) -> list[Path]:
    """ONNX files of the directory `path`, or of its folder `onnx`, where hubs put them."""
    return sorted(path.glob("*.onnx")) or sorted(path.glob(f"{ONNX_FOLDER}/*.onnx"))


def _supported() -> str:
    return " or ".join(form.name for form in FORMATS)


FORMATS = (
    Format("a Hugging Face directory (config.json and *.safetensors)", _find_directory, _load_directory),
    Format("an .onnx file or a directory with one", _find_onnx, load_onnx),
)
