"""ONNX Runtime behind Tilewright's server code.

python -m benchmarks.onnx_server ARTIFACT MODEL.onnx [--instances N] [--threads N] [--port PORT]

ARTIFACT is the same model as compiled: it says what the head means and holds the tokenizer; only the engine of the instances is
another. Batches are padded to their longest sequence, as ONNX Runtime takes them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from functools import partial
from pathlib import Path

from benchmarks.onnx_engine import OnnxEngine
from tilewright.instances import Launch
from tilewright.serving import process
from tilewright.serving.settings import Service, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # where instances find OnnxEngine
    launch = Launch(given.artifact, threads=given.threads, load=partial(OnnxEngine, model=given.model.resolve()))
    service = Service(given.artifact.stem, launch, given.instances, given.batch_tokens)
    listening = process.bind("127.0.0.1", given.port)
    asyncio.run(
        process.serve([service], Settings(), listening, lambda url: print(f"listening on {url}", file=sys.stderr, flush=True))
    )


if __name__ == "__main__":
    main()
