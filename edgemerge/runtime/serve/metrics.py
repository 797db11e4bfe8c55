"""What the server counts, for /metrics (Prometheus) and for /health.

All names begin with `edgemerge_` and are in base units: seconds, bytes, degrees Celsius, tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from edgemerge.runtime.serve.active_request import Run

__all__ = ["Gauge", "Metrics"]

_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
_SPEED = (1, 2, 5, 10, 15, 20, 30, 50, 75, 100, 200, 500)  # tokens per second


Gauge = tuple[str, float | dict[str, float]]  # help text, and a value or one for each model


class _Now(Collector):
    """Gauges, read when they are asked for."""

    def __init__(self, read: Callable[[], dict[str, Gauge]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, (text, value) in self._read().items():
            if not isinstance(value, dict):
                yield GaugeMetricFamily(name, text, value=value)
                continue
            family = GaugeMetricFamily(name, text, labels=["model"])
            for model, one in value.items():
                family.add_metric([model], one)
            yield family


class Metrics:
    """Counters since the server's start.

    Parameters
    ----------
    read_gauges : function
        Gives the gauges by name, as they are at the moment.

    Attributes
    ----------
    answered, refused, failed : int
        Requests for a model by how they ended: with an answer, with 4xx or 503, with another 5xx.
    tokens_per_second, time_to_first_token : float or None
        Of the last answer that had them.
    """

    def __init__(self, read_gauges: Callable[[], dict[str, Gauge]]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Now(read_gauges))
        self._requests = Counter(
            "edgemerge_requests", "Requests", ["route", "status"], registry=registry
        )
        self._refused = Counter(
            "edgemerge_requests_refused",
            "Requests that got 4xx or 503: wrong, too large, too many",
            ["status"],
            registry=registry,
        )
        self._prompt = Counter(
            "edgemerge_prompt_tokens", "Tokens of prompts", ["model"], registry=registry
        )
        self._generated = Counter(
            "edgemerge_generated_tokens", "Tokens generated", ["model"], registry=registry
        )
        self._first_token = Histogram(
            "edgemerge_time_to_first_token_seconds",
            "From a request's arrival to its first token, waiting included",
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._speed = Histogram(
            "edgemerge_generation_tokens_per_second",
            "Speed of an answer after its first token",
            buckets=_SPEED,
            registry=registry,
        )
        self.answered = self.refused = self.failed = 0
        self.tokens_per_second: float | None = None
        self.time_to_first_token: float | None = None

    def note_request(self, route: str, status: int, *, uses_model: bool) -> None:
        """Count a request that has ended.

        Parameters
        ----------
        route : str
            Its path, or `other` for one that the server does not have.
        status : int
            Of HTTP; 499 where the client left first.
        uses_model : bool
            Whether it belongs to the three figures of /health.
        """
        self._requests.labels(route, status).inc()
        refused = 400 <= status < 500 or status == 503
        if refused:
            self._refused.labels(status).inc()
        if uses_model:
            self.refused += refused
            self.answered += status < 400
            self.failed += status >= 500 and status != 503

    def note_run(self, run: Run) -> None:
        """Count the tokens of a request that has ended, however it did."""
        model = run.model or ""
        self._prompt.labels(model).inc(run.prompt_tokens)
        self._generated.labels(model).inc(run.generated_tokens)
        if (first := run.time_to_first_token) is not None:
            self._first_token.observe(first)
            self.time_to_first_token = first
        if (speed := run.tokens_per_second) is not None:
            self._speed.observe(speed)
            self.tokens_per_second = speed

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
