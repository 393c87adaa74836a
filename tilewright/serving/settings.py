"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.instances import Launch


@dataclass(frozen=True)
class Settings:
    """Limits on requests, and the key that they must bring (None: none).

    max_requests: accepted and not yet answered. max_bytes: of a request's body. max_inputs: sequences of a request. max_tokens:
    of a request, all sequences together. timeout: seconds for a request's body to arrive, and from then on to its answer.
    """

    max_requests: int = 512
    max_bytes: int = 2_000_000
    max_inputs: int = 2048
    max_tokens: int = 65_536
    timeout: float = 30.0
    api_key: str | None = None


@dataclass(frozen=True)
class Service:
    """One model: its name in requests, what its instances load, how many of them, and the most tokens of one call."""

    name: str
    launch: Launch
    instances: int
    batch_tokens: int
