"""What does a server count, for Prometheus to fetch?"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from gmask.generation.engine import Counts

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)


class Metrics:
    """The counters of one application, in a registry of its own, so that two applications in a process stay apart."""

    def __init__(self, counts: "Callable[[], Counts]") -> None:
        """``counts`` tells the engine's figures, which are read when they are fetched."""
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(counts))

        def histogram(name: str, help_text: str) -> Histogram:
            return Histogram(f"gmask_{name}_seconds", help_text, buckets=SECONDS, registry=self.registry)

        self.first_token = histogram("time_to_first_token", "From a request's submission to its first token")
        self.next_token = histogram("inter_token_latency", "From a token of an answer to the next one")
        self.duration = histogram("request_duration", "From a request's arrival to the end of its answer")
        self.requests = Counter(
            "gmask_http_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=self.registry
        )

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's own figures."""

    def __init__(self, counts: "Callable[[], Counts]") -> None:
        self.counts = counts

    def describe(self) -> Iterator[Metric]:
        """Nothing: what is not described is not asked for at registration, before the engine runs."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Reads the engine."""
        counts = self.counts()
        yield GaugeMetricFamily("gmask_queue_length", "Requests that wait for their turn", counts.waiting)
        yield GaugeMetricFamily("gmask_running_rows", "Answers that are being written: the batch size", counts.running)
        yield GaugeMetricFamily("gmask_cache_places_in_use", "Positions of keys and values taken", counts.places)
        yield GaugeMetricFamily("gmask_cache_places", "Positions of keys and values that there are", counts.max_places)
        yield CounterMetricFamily("gmask_prompt_tokens", "Tokens that were read", counts.prompt_tokens)
        yield CounterMetricFamily("gmask_generated_tokens", "Tokens that were written", counts.answer_tokens)
        yield CounterMetricFamily("gmask_decoding_steps", "Passes that write a token of every row", counts.steps)
        samples = CounterMetricFamily("gmask_samples", "Answers by their end", labels=["end"])
        for end, count in counts.ends.items():
            samples.add_metric([end], count)
        yield samples
