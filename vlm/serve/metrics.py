"""What a server tells Prometheus. Knows names and buckets; nothing of what happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

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


class Merged(Collector):
    """The metrics of several servers, each by its number as the label `replica`, behind one that counts the requests.

    texts: what each tells, in Prometheus's text format.
    """

    def __init__(self, front: Metrics, texts: Mapping[int, str]) -> None:
        self._front, self._texts = front, texts

    def collect(self) -> Iterator[Metric]:
        """Every family once; requests as the front has counted them."""
        requests = list(self._front.requests.collect())
        yield from requests
        families: dict[str, Metric] = {}
        for number, text in self._texts.items():
            for told in text_string_to_metric_families(text):
                if told.name.startswith(requests[0].name):
                    continue
                family = families.setdefault(told.name, Metric(told.name, told.documentation, told.type))
                for sample in told.samples:
                    family.add_sample(sample.name, {**sample.labels, "replica": str(number)}, sample.value)
        yield from families.values()

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)
