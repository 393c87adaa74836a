"""Follows examples/Dockerfile without Docker: `python -m tests.image_smoke DOCKERFILE VENV WHEEL`.

COPY and RUN happen in a temporary directory with the programs of VENV, which stands for the base image; then the server starts
as a container would start it, must become healthy, answer, and end well on SIGTERM.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests import served, toy

_PORT = "8000"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Instruction and arguments of each line, in order."""
    lines = dockerfile.read_text().replace("\\\n", " ").splitlines()
    words = [line.strip().partition(" ") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [(name, arguments.strip()) for name, _, arguments in words]


def build(steps: list[tuple[str, str]], context: Path, root: Path, environment: dict[str, str]) -> None:
    """Follow COPY and RUN in `root`."""
    for name, arguments in steps:
        if name == "RUN":
            subprocess.run(["sh", "-c", arguments], cwd=root, env=environment, check=True)
        elif name == "COPY":
            *sources, target = shlex.split(arguments)
            for source in sources:
                (found,) = context.glob(source)
                place = root / target / found.name if target.endswith("/") else root / target
                shutil.copytree(found, place) if found.is_dir() else shutil.copy(found, place)


def main(dockerfile: Path, venv: Path, wheel: Path) -> None:
    """Build, start, ask and end."""
    environment = os.environ | {"PATH": f"{venv.resolve() / 'bin'}:/usr/bin:/bin"}
    steps = instructions(dockerfile)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as scratch:
        context, root = Path(scratch, "context"), Path(scratch, "root")
        context.mkdir()
        root.mkdir()
        shutil.copy(wheel, context)
        toy.write(context / "model.tw", toy.build_library(Path(scratch, "toy.so")), served.MODELS["embed"])
        build(steps, context, root, environment)
        parts = dict(steps)  # the last of each
        command = [*json.loads(parts["ENTRYPOINT"]), *json.loads(parts["CMD"])]
        command = [port if word == _PORT else word for word in command]
        server = subprocess.Popen(command, cwd=root, env=environment)
        try:
            check = parts["HEALTHCHECK"].removeprefix("CMD ").replace(_PORT, port)
            end = time.monotonic() + 60
            while subprocess.run(["sh", "-c", check], env=environment, stderr=subprocess.DEVNULL).returncode:
                assert server.poll() is None and time.monotonic() < end, "the server does not become healthy"
            body = json.dumps({"inputs": "a b", "normalize": False}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/embed", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request) as reply:
                assert json.load(reply) == [toy.expected([1, 2])["total"].tolist()]
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()
    print(f"{dockerfile}: builds and serves")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
