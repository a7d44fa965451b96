"""Prometheus metrics of requests, and of the weights moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rabbit_engine.server.hosting import Host, Served
from rabbit_engine.server.visits import Visit
from rabbit_engine.sessions import Reply

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Requests are counted as they end; the model's own counters are read at each scrape."""

    def __init__(self, host: Host) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ModelCounts(host))
        own = {"registry": self._registry, "namespace": "rabbit"}
        waits = {**own, "labelnames": ["model"], "buckets": _SECONDS}
        self._requests = Counter("requests", "Requests answered, by path and status.", ["path", "status"], **own)  # type: ignore[arg-type]
        self._tokens = Counter("tokens", "Tokens of prompts and of answers.", ["model", "kind"], **own)  # type: ignore[arg-type]
        self._of_keys = Counter("key_requests", "Requests answered, by the key's name.", ["key", "status"], **own)  # type: ignore[arg-type]
        self._key_tokens = Counter("key_tokens", "Tokens of prompts and of answers.", ["key", "kind"], **own)  # type: ignore[arg-type]
        self._queued = Histogram("queue_seconds", "Seconds before an answer began.", **waits)  # type: ignore[arg-type]
        self._first = Histogram("first_token_seconds", "Seconds to the first token.", **waits)  # type: ignore[arg-type]
        self._whole = Histogram("answer_seconds", "Seconds of an answer.", **waits)  # type: ignore[arg-type]

    def count_request(self, route: str, visit: Visit) -> None:
        """Count a request that has ended; `route` is one of a fixed number of paths."""
        self._requests.labels(route, str(visit.status)).inc()
        if visit.key:
            self._of_keys.labels(visit.key, str(visit.status)).inc()

    def count_tokens(self, visit: Visit, prompt: int, answer: int) -> None:
        """Count tokens of a request under way."""
        for kind, count in (("prompt", prompt), ("answer", answer)):
            if count:
                self._tokens.labels(visit.model, kind).inc(count)
                if visit.key:
                    self._key_tokens.labels(visit.key, kind).inc(count)

    def count_reply(self, model: str, reply: Reply) -> None:
        """Count a finished answer."""
        self._queued.labels(model).observe(reply.queued_s)
        self._whole.labels(model).observe(reply.seconds)
        if reply.tokens:
            self._first.labels(model).observe(reply.first_token_s)

    def text(self) -> bytes:
        """In Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)


class _ModelCounts(Collector):
    """The counters of the loaded models, each with its name as a label."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterator[Metric]:
        """Once a scrape."""
        yield from self._loads()
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

    def _loads(self) -> Iterator[Metric]:
        host = self._host
        loaded, loading = {served.name for served in host.loaded}, host.loading
        is_loaded = GaugeMetricFamily("rabbit_loaded", "Whether the model is in memory.", labels=["model"])
        elapsed = GaugeMetricFamily("rabbit_loading_seconds", "Seconds since loading the model began.", labels=["model"])
        counts = CounterMetricFamily("rabbit_loads", "How often the model was loaded for a request.", labels=["model"])
        seconds = CounterMetricFamily("rabbit_load_seconds", "Seconds that loading it took.", labels=["model"])
        for name in host.names:
            is_loaded.add_metric([name], name in loaded)
            elapsed.add_metric([name], 0.0 if loading is None or loading.model != name else loading.elapsed_s)
            counts.add_metric([name], host.loads[name].count)
            seconds.add_metric([name], host.loads[name].seconds)
        yield from (is_loaded, elapsed, counts, seconds)


def _profile(name: str) -> Callable[[Served], float]:
    return lambda served: getattr(served.session.model.profile, name)


def _speculation(name: str) -> Callable[[Served], float]:
    return lambda served: getattr(served.session.model.profile.speculation, name)


_GAUGES: tuple[tuple[str, str, Callable[[Served], float]], ...] = (
    ("running_requests", "Answers under way.", lambda served: served.session.running),
    ("waiting_requests", "Requests that have not started.", lambda served: served.session.waiting),
    ("start_seconds", "Estimated seconds until a new request would start.", lambda served: served.session.start_s),
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
