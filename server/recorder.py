"""What happens after every round: evaluate, write the checkpoint, tell the observers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from fedsmooth_core.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fedsmooth_core.config import RunConfig, to_nested
from fedsmooth_core.data import ArrayDataset, load_dataset
from fedsmooth_core.device import choose_device
from fedsmooth_core.errors import CheckpointError, ConfigError, DataError
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.seeding import Purpose, torch_generator
from server.evaluation import Evaluator
from server.owed import ROWS
from server.replies import Refusal
from server.report import ROWS_IN_RUN
from server.run_directory import RunDirectory
from server.terms import certification_terms, refuse_other_terms


@dataclass
class TrainedRound:
    """What one round of training did."""

    cohort: list[int] = field(default_factory=list)
    """The clients that were asked, in the last attempt."""
    aggregated: list[int] = field(default_factory=list)
    """Those whose replies make the new model; none of them when the old model was kept."""
    refused: list[Refusal] = field(default_factory=list)
    """Replies, silence included, that the round went on without, over all its attempts."""
    offenders: list[int] = field(default_factory=list)
    """Flower nodes that this round counts an offence of: each refused one once, but for attempts in which
    every reply was refused, for then the fault may well be the model's or the server's."""
    late: list[Refusal] = field(default_factory=list)
    """Replies to earlier rounds that came during this one, and were dropped."""
    suspended: list[int] = field(default_factory=list)
    """Clients that were left out for what they did in earlier rounds."""
    num_connected: int = 0
    attempts: int = 0
    num_clipped: int = 0
    """Replies whose update was longer than ``aggregation.max_update_norm``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Example-weighted means of what the clients report."""
    num_examples: int = 0
    update_norm: float = 0.0
    """l2 norm of the change of all floating-point weights."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase: ``connect`` (waiting for clients), ``train`` (from the questions to the last reply),
    ``aggregate``, ``certify`` (on the clients), ``evaluate``. Parts of ``train``: ``send`` and
    ``receive`` (the server's own work with questions and replies), ``slowest_client`` (what the slowest
    good client says it worked)."""


@dataclass(frozen=True)
class FederatedAccuracy:
    """What clients count of their own images after a round."""

    radii: list[float]
    """In [0, 1] pixel units, ascending from 0."""
    cohort: list[int]
    """The clients that were asked."""
    num_clients: int
    """Those that answered well."""
    num_examples: int
    """The images that they certified, together."""
    num_held_out: int
    """Of these, images that their client does not train on."""
    num_abstained: int
    """Of these, images without a certificate."""
    refused: list[Refusal]
    """Replies, silence included, that are no part of the figures."""
    accuracy: list[float] | None = None
    """At each radius the share of the images that are certified to be right; None without a quorum."""
    confidence_interval_95: list[list[float]] | None = None
    """[low, high] for each of them (Clopper-Pearson): how far the images of all clients may be from it."""
    problem: str | None = None
    """Why there is no accuracy."""

    def at_smallest_radius(self) -> tuple[float, float] | None:
        """Return (radius, accuracy) at the smallest radius > 0, or at 0 where there is no other."""
        if self.accuracy is None:
            return None
        place = min(1, len(self.radii) - 1)
        return self.radii[place], self.accuracy[place]


@dataclass(frozen=True)
class RoundRecord:
    """One finished round, as observers see it and as its JSON line says it."""

    server_round: int
    trained: TrainedRound
    evaluation: dict[str, float]
    """Empty in rounds without an evaluation."""
    on_devices: FederatedAccuracy | None = None
    """None in rounds that do not ask for it."""

    def as_json(self) -> dict[str, object]:
        line = {"round": self.server_round, **asdict(self.trained), **self.evaluation}
        if self.on_devices is not None:
            line["federated_certified_accuracy"] = asdict(self.on_devices)
        return line


class Observer(Protocol):
    """Watches a run; it never changes one."""

    def run_started(self, config: RunConfig, run: RunDirectory, completed_rounds: int) -> None:
        """Rounds ``completed_rounds + 1`` and on are about to come."""

    def cohort_asked(self, server_round: int, trained: TrainedRound) -> None:
        """The clients of a round's next attempt have been chosen and are about to be asked."""

    def round_finished(self, record: RoundRecord) -> None:
        """A round is over, its checkpoint (if due) on disk."""

    def run_finished(self) -> None:
        """No more rounds will come."""


class Recorder:
    """Opens a run, holds its state at the start, and records its rounds.

    The federated and the centralised run share it, so that their directories read alike.

    Attributes:
        run: the directory.
        train_set, test_set: the configured data set.
        spec: the architecture.
        device: where the server computes.
        completed_rounds: rounds behind this process (0 for a new run).
        state: the weights to start from.
        judge: says what is wrong with weights that make no classifier, or None.
    """

    def __init__(self, config: RunConfig, kind: str, observers: Sequence[Observer]) -> None:
        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        self.config = config
        self.device = choose_device(config.runtime.device)
        self.train_set: ArrayDataset = load_dataset(config.dataset, "train")
        self.test_set: ArrayDataset = load_dataset(config.dataset, "test")
        info = self.train_set.info
        self.spec = ModelSpec.of(config.model, info)
        stream = torch_generator(config.seed, Purpose.MODEL_INIT)
        model = build_model(self.spec, info.mean, info.std, stream)
        self._evaluate = Evaluator(config, self.spec, self.test_set, self.device)
        self.judge = self._evaluate.problem
        # Nothing is written before the configuration has proved to make a model.
        self.run = RunDirectory.open(config, kind)
        self._observers = observers
        self.completed_rounds, self.state = 0, dict(model.state_dict())
        try:
            if config.resume:
                self._resume()
            # Whatever would be refused later is refused before anything is written.
            if config.certification.at_end or config.certification.every:
                self._refuse_other_terms()
            self.run.record(config, kind)
            self.run.forget_rounds_after(self.completed_rounds)
            if not self.completed_rounds:
                self._save(0, self.state)
        except BaseException:
            self.run.close()
            raise

    def _refuse_other_terms(self) -> None:
        """Let the certificates of one run, which one table shows, all be of the same terms."""
        terms = certification_terms(self.config, self.test_set, self.device)
        final = self.run.certification(self.config.federation.num_rounds)
        if self.config.service.address is None:
            refuse_other_terms(final / ROWS, terms)
        # Nothing is added on this device to the rows of the other rounds, and to a service's.
        del terms["device"]
        for rows in sorted(self.run.path.glob(ROWS_IN_RUN)):
            refuse_other_terms(rows, terms)

    def _resume(self) -> None:
        path = latest_checkpoint(self.run.checkpoints)
        if path is None:  # interrupted before its first checkpoint: the seed makes the same model
            return
        checkpoint = load_checkpoint(path)
        completed, recorded_fingerprint = _round_and_dataset(path, checkpoint)
        wanted = self.config.federation.num_rounds
        if completed > wanted:
            raise ConfigError(
                f"federation.num_rounds={wanted} is less than the {completed} rounds that "
                f"{self.run.path} has completed: allowed is {completed} or more."
            )
        fingerprint = self.train_set.info.fingerprint
        if recorded_fingerprint != fingerprint:
            raise DataError(
                f"dataset.root={self.config.dataset.root} does not hold the images that "
                f"{self.run.path} was started with: give dataset.root=<where they are>."
            )
        self.completed_rounds, self.state = completed, checkpoint.state

    def round_finished(
        self,
        server_round: int,
        state: Mapping[str, Tensor],
        trained: TrainedRound,
        on_devices: FederatedAccuracy | None = None,
    ) -> None:
        """Record one round, given the weights after it and what clients certified of them."""
        every, last = self.config.evaluation.every, self.config.federation.num_rounds
        evaluation: dict[str, float] = {}
        if server_round == last or (every and server_round % every == 0):
            started = time.perf_counter()
            evaluation = self._evaluate(state)
            trained.seconds["evaluate"] = time.perf_counter() - started
        record = RoundRecord(server_round, trained, evaluation, on_devices)
        # The line before the checkpoint: a resumed run drops lines beyond its checkpoint, so no
        # crash between the two leaves a round without its line, or with two.
        self.run.append_metrics(record.as_json())
        # A model that the service is to certify is one that is on the disk.
        due = (self.config.federation.checkpoint_every, self.config.certification.every)
        if server_round == last or any(every and server_round % every == 0 for every in due):
            self._save(server_round, state)
        for observer in self._observers:
            observer.round_finished(record)

    def cohort_asked(self, server_round: int, trained: TrainedRound) -> None:
        """Tell the observers, and whoever looks at the directory, whom an attempt asks."""
        self.run.write_asked(server_round, trained.attempts, trained.cohort)
        for observer in self._observers:
            observer.cohort_asked(server_round, trained)

    def __enter__(self) -> Self:
        """Begin the rounds: observers hear of it, and of their end however it comes."""
        for observer in self._observers:
            observer.run_started(self.config, self.run, self.completed_rounds)
        return self

    def __exit__(self, *_: object) -> None:
        for observer in self._observers:
            observer.run_finished()

    def _save(self, server_round: int, state: Mapping[str, Tensor]) -> None:
        metadata = {
            "round": server_round,
            "model": to_nested(self.spec),
            "dataset": {
                "fingerprint": self.train_set.info.fingerprint,
                "class_names": list(self.train_set.info.class_names),
                "num_test_images": len(self.test_set),
            },
            "config": to_nested(self.config),
        }
        save_checkpoint(self.run.checkpoint(server_round), state, metadata)


def _round_and_dataset(path: Path, checkpoint: Checkpoint) -> tuple[int, str]:
    match checkpoint.metadata:
        case {"round": int(server_round), "dataset": {"fingerprint": str(fingerprint)}}:
            return server_round, fingerprint
    raise CheckpointError(
        f"{path.with_suffix('.json')} does not say which round of which data set it is: restore it from "
        "a copy, or delete it to use an earlier checkpoint."
    )
