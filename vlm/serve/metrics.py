"""What a server tells Prometheus. Knows names and buckets; nothing of what happens."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The numbers of one server, in a registry of its own; may be counted from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vlm_requests",
            "Requests answered; status 499: the client hung up",
            ["route", "status"],
            registry=self.registry,
        )
        self.running = Gauge("vlm_replies_running", "Replies that are being decoded", registry=self.registry)
        self.waiting = Gauge("vlm_replies_waiting", "Replies that wait for a row", registry=self.registry)
        self.cache_bytes = Gauge("vlm_cache_bytes", "Memory of keys and values", registry=self.registry)
        self.tokens = Counter("vlm_tokens", "Tokens by kind: prompt, reused, new", ["kind"], registry=self.registry)
        self.first_token = Histogram(
            "vlm_first_token_seconds", "From asking to the first token", buckets=SECONDS, registry=self.registry
        )
        self.per_token = Histogram(
            "vlm_token_seconds", "Of one reply, the mean from token to token", buckets=SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self.registry)
