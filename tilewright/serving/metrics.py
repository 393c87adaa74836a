"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_COUNTS = tuple(2**power for power in range(15))


class Metrics:
    """Metrics of one server; those of models are labelled by their names."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered.", "endpoint", "status")
        self.request_seconds = self._histogram("request_seconds", "From a request to its answer.", _SECONDS, "endpoint")
        self.open_requests = self._gauge("open_requests", "Requests accepted and not yet answered.")
        self.queue_length = self._gauge("queue_length", "Sequences that wait for an instance.", "model")
        self.ready = self._gauge("instances_ready", "Instances that run.", "model")
        self.restarts = self._counter("instance_restarts", "Instances that died and were started again.", "model")
        self.queue_seconds = self._histogram("queue_seconds", "A sequence's wait for an instance.", _SECONDS, "model")
        self.tokenize_seconds = self._histogram("tokenize_seconds", "Tokenising the texts of a request.", _SECONDS, "model")
        self.inference_seconds = self._histogram("inference_seconds", "One call of an engine.", _SECONDS, "model")
        self.batch_tokens = self._histogram("batch_tokens", "Tokens of one call of an engine.", _COUNTS, "model")
        self.batch_sequences = self._histogram("batch_sequences", "Sequences of one call of an engine.", _COUNTS, "model")

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="tilewright", registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="tilewright", registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="tilewright", registry=self._registry, buckets=buckets)
