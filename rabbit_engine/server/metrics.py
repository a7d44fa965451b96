"""Prometheus metrics of requests, and of the weights moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rabbit_engine.server.hosting import Host, Served
from rabbit_engine.sessions import Reply

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Requests are counted as they end; the model's own counters are read at each scrape."""

    def __init__(self, host: Host) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ModelCounts(host))
        own = {"registry": self._registry, "namespace": "rabbit"}
        self._requests = Counter("requests", "Requests answered, by path and status.", ["path", "status"], **own)  # type: ignore[arg-type]
        self._tokens = Counter("tokens", "Tokens of prompts and of answers.", ["kind"], **own)  # type: ignore[arg-type]
        self._queued = Histogram("queue_seconds", "Seconds before an answer began.", buckets=_SECONDS, **own)  # type: ignore[arg-type]
        self._first = Histogram("first_token_seconds", "Seconds to the first token.", buckets=_SECONDS, **own)  # type: ignore[arg-type]
        self._whole = Histogram("answer_seconds", "Seconds of an answer.", buckets=_SECONDS, **own)  # type: ignore[arg-type]

    def count_request(self, path: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()

    def count_reply(self, reply: Reply) -> None:
        """Count a finished answer."""
        self._tokens.labels("prompt").inc(reply.prompt_tokens)
        self._tokens.labels("answer").inc(len(reply.tokens))
        self._queued.observe(reply.queued_s)
        self._whole.observe(reply.seconds)
        if reply.tokens:
            self._first.observe(reply.first_token_s)

    def text(self) -> bytes:
        """In Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)


class _ModelCounts(Collector):
    """The counters of the loaded models, each with its name as a label."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterator[Metric]:
        """Once a scrape."""
        loaded = self._host.loaded
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"rabbit_{name}", text, labels=["model"])
            for served in loaded:
                gauge.add_metric([served.name], value(served))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(f"rabbit_{name}", text, labels=["model"])
            for served in loaded:
                counter.add_metric([served.name], value(served))
            yield counter


def _profile(name: str) -> Callable[[Served], float]:
    return lambda served: getattr(served.session.model.profile, name)


def _speculation(name: str) -> Callable[[Served], float]:
    return lambda served: getattr(served.session.model.profile.speculation, name)


_GAUGES: tuple[tuple[str, str, Callable[[Served], float]], ...] = (
    ("running_requests", "Answers under way.", lambda served: served.session.running),
    ("waiting_requests", "Requests that have not started.", lambda served: served.session.waiting),
)

_COUNTERS: tuple[tuple[str, str, Callable[[Served], float]], ...] = (
    ("passes", "Passes over the weights.", _profile("passes")),
    ("pass_seconds", "Seconds of passes.", _profile("pass_s")),
    ("read_bytes", "Bytes of weights read from disk.", _profile("bytes_read")),
    ("copied_bytes", "Bytes of weights copied from host memory.", _profile("bytes_copied")),
    ("wait_seconds", "Seconds that passes waited for weights.", _profile("wait_s")),
    # tokens a pass is the ratio of the next two
    ("speculation_tokens", "Tokens of answers that speculate.", _speculation("tokens")),
    ("speculation_passes", "Passes over answers that speculate.", _speculation("passes")),
    ("speculation_drafted", "Tokens guessed ahead.", _speculation("drafted")),
    ("speculation_verified", "Guesses that a pass verified.", _speculation("nodes")),
    ("speculation_accepted", "Guesses that came true.", _speculation("accepted")),
    ("speculation_draft_seconds", "Seconds of guessing.", _speculation("draft_s")),
)
