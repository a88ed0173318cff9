"""Prometheus metrics of the service."""

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.certification.engine import Engine
from server.certification.store import JobStore, StorageError


class Metrics(Collector):
    """What an operator watches. Jobs are counted when somebody asks, calls as they end."""

    def __init__(self, store: JobStore, engine: Engine) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._store = store
        self._engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._calls = Counter(
            "fedsmooth_certifier_calls",
            "Calls that have ended",
            ("method", "code"),
            registry=self.registry,
        )

    def count_call(self, method: str, code: str) -> None:
        """Count a call that has ended."""
        self._calls.labels(method, code).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of this moment."""
        prefix = "fedsmooth_certifier"
        jobs = GaugeMetricFamily(f"{prefix}_jobs", "Jobs by state", labels=["state"])
        seconds = CounterMetricFamily(f"{prefix}_device_seconds", "Seconds that all jobs took")
        # An unreadable disk must not hide all other figures.
        with contextlib.suppress(StorageError):
            for state, count in self._store.counts().items():
                jobs.add_metric([state.value], count)
            with self._store.reading() as connection:
                total = connection.execute("SELECT total(seconds) FROM jobs").fetchone()[0]
            seconds.add_metric([], total)
        yield jobs
        yield seconds
        engine = self._engine
        yield GaugeMetricFamily(
            f"{prefix}_healthy",
            "1 while jobs are certified or waited for",
            float(not engine.problem),
        )
        for name, text, value in (
            ("images", "Images certified by this process", engine.images_certified),
            ("draws", "Noisy images that these took", engine.draws),
        ):
            yield CounterMetricFamily(f"{prefix}_{name}", text, value)
