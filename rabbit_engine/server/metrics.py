"""Prometheus metrics of requests, and of the weights moved."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rabbit_engine.sessions import Reply, Session
from rabbit_engine.streaming import SpeculationProfile

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Requests are counted as they end; the model's own counters are read at each scrape."""

    def __init__(self, session: Session) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ModelCounts(session))
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
    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(self) -> Iterator[Metric]:
        """Once a scrape."""
        session, profile = self._session, self._session.model.profile
        yield GaugeMetricFamily("rabbit_running_requests", "Answers under way.", session.running)
        yield GaugeMetricFamily("rabbit_waiting_requests", "Requests that have not started.", session.waiting)
        yield CounterMetricFamily("rabbit_passes", "Passes over the weights.", value=profile.passes)
        yield CounterMetricFamily("rabbit_pass_seconds", "Seconds of passes.", value=profile.pass_s)
        yield CounterMetricFamily("rabbit_read_bytes", "Bytes of weights read from disk.", value=profile.bytes_read)
        yield CounterMetricFamily("rabbit_copied_bytes", "Bytes of weights copied from host memory.", value=profile.bytes_copied)
        yield CounterMetricFamily("rabbit_wait_seconds", "Seconds that passes waited for weights.", value=profile.wait_s)
        yield from _speculation(profile.speculation)


def _speculation(counts: SpeculationProfile) -> Iterator[Metric]:
    """Tokens a pass is the ratio of the first two."""
    for name, text, value in (
        ("tokens", "Tokens of answers that speculate.", counts.tokens),
        ("passes", "Passes over answers that speculate.", counts.passes),
        ("drafted", "Tokens guessed ahead.", counts.drafted),
        ("verified", "Guesses that a pass verified.", counts.nodes),
        ("accepted", "Guesses that came true.", counts.accepted),
        ("draft_seconds", "Seconds of guessing.", counts.draft_s),
    ):
        yield CounterMetricFamily(f"rabbit_speculation_{name}", text, value=value)
