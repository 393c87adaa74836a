"""Tilewright's server on Ray Serve, which spreads replicas over the machines of a cluster and sends each request to one.

    pip install 'tilewright[serve]' 'ray[serve]'
    python examples/ray_serve.py minilm.tw --replicas 4 --threads 2

or, on a cluster that runs, `serve run ray_serve:build artifact=/models/minilm.tw replicas=4 threads=2`. The artifact must lie
at the same path on every machine. A replica is a whole server with one instance: it has all endpoints of `tilewright serve`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve import Application


def build(arguments: dict[str, str]) -> Application:
    """The application of `artifact`: `replicas` (1) servers with one instance of `threads` (1) each."""
    artifact, threads = Path(arguments["artifact"]).resolve(), int(arguments.get("threads", 1))

    def server() -> FastAPI:
        """Called in each replica: what runs cannot be sent there."""
        from tilewright.instances import Launch
        from tilewright.serving.app import create_app
        from tilewright.serving.settings import Service

        name = artifact.name.removesuffix(".tw")
        return create_app([Service(name, Launch(artifact, threads=threads), instances=1, batch_tokens=512 * threads)])

    deployment = serve.deployment(
        serve.ingress(server)(),
        name=artifact.stem,
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=64,  # a batch forms of what a replica has been sent
    )
    return deployment.bind()


def main() -> None:
    """Serve on this machine until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--replicas", default="1")
    parser.add_argument("--threads", default="1")
    serve.run(build(vars(parser.parse_args())), blocking=True)


if __name__ == "__main__":
    main()
