"""Prometheus metrics of a run, for whoever watches many."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    start_http_server,
)

from fedsmooth_core.config import RunConfig
from fedsmooth_core.errors import ConfigError
from server.recorder import RoundRecord, TrainedRound
from server.run_directory import RunDirectory


class Prometheus:
    """An observer that serves a run's figures over HTTP while the process lives.

    It serves nothing when ``runtime.metrics_address`` is null.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fedsmooth_{name}", text, labels, registry=self._registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"fedsmooth_{name}", text, registry=self._registry)

        self._round = gauge("round", "Rounds completed")
        self._num_rounds = gauge("rounds_planned", "Rounds of the run")
        self._connected = gauge("connected_clients", "Clients connected when the round began")
        self._asked = gauge("asked_clients", "Clients asked in the current attempt")
        self._used = gauge("used_replies", "Replies that made the last round's model")
        self._suspended = gauge("suspended_clients", "Clients left out of the last round")
        self._update_norm = gauge("update_norm", "l2 norm of the last change of the global model")
        self._seconds = gauge("round_seconds", "Seconds of the last round, by phase", "phase")
        self._train = gauge("train", "Example-weighted means of what clients report", "metric")
        self._accuracy = gauge("test_accuracy", "Accuracy on the server's test set", "kind")
        self._certified = gauge(
            "device_certified_accuracy", "Certified accuracy on the clients' own images", "radius"
        )
        self._certified_images = gauge(
            "device_certified_images", "Images that the clients certified when they were last asked"
        )
        self._attempts = counter("attempts", "Cohorts asked by this process")
        self._refused = counter("refused_replies", "Replies refused by this process")
        self._late = counter("late_replies", "Replies that came after their round")
        self._kept = counter("kept_rounds", "Rounds that kept the old model")

    def run_started(self, config: RunConfig, run: RunDirectory, completed_rounds: int) -> None:
        """Begin to serve.

        Raises:
            ConfigError: when the address cannot be listened on.
        """
        self._round.set(completed_rounds)
        self._num_rounds.set(config.federation.num_rounds)
        address = config.runtime.metrics_address
        if address is None:
            return
        host, _, port = address.rpartition(":")
        try:
            start_http_server(int(port), host.strip("[]"), self._registry)
        except OSError as error:
            raise ConfigError(
                f"runtime.metrics_address={address!r} cannot be listened on ({error.strerror}): choose "
                "another HOST:PORT, or null."
            ) from error

    def cohort_asked(self, server_round: int, trained: TrainedRound) -> None:
        self._attempts.inc()
        self._asked.set(len(trained.cohort))
        self._connected.set(trained.num_connected)

    def round_finished(self, record: RoundRecord) -> None:
        trained = record.trained
        self._round.set(record.server_round)
        self._used.set(len(trained.aggregated))
        self._suspended.set(len(trained.suspended))
        self._update_norm.set(trained.update_norm)
        self._refused.inc(len(trained.refused))
        self._late.inc(len(trained.late))
        if not trained.aggregated:
            self._kept.inc()
        for phase, seconds in trained.seconds.items():
            self._seconds.labels(phase).set(seconds)
        for name, value in trained.metrics.items():
            self._train.labels(name).set(value)
        for kind in ("clean", "noisy"):
            if f"{kind}-accuracy" in record.evaluation:
                self._accuracy.labels(kind).set(record.evaluation[f"{kind}-accuracy"])
        if record.on_devices is not None:
            self._refused.inc(len(record.on_devices.refused))
            self._certified_images.set(record.on_devices.num_examples)
            # Old figures do not stand for new ones that could not be had.
            self._certified.clear()
            shares = record.on_devices.accuracy or []
            for radius, share in zip(record.on_devices.radii, shares, strict=False):
                self._certified.labels(f"{radius:g}").set(share)

    def run_finished(self) -> None:
        """The last figures stay until the process ends."""
