"""Federated certified accuracy: devices certify images of their own, the server pools their counts."""

import math
import time
from dataclasses import dataclass, field, replace
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedsmooth_core import wire
from fedsmooth_core.certification.bounds import p_a_lower
from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.config import RunConfig, to_flat
from fedsmooth_core.seeding import Purpose
from server.conduct import Conduct
from server.exchange import CLOCK_TOLERANCE_SECONDS, Exchange
from server.recorder import FederatedAccuracy, TrainedRound
from server.replies import BadReplyError, Counts, Refusal, read_counts, readable
from server.roster import Roster
from server.sampling import sample_cohort

_TAIL = 0.025
"""Failure probability of either end of a 95 % interval."""


@dataclass
class _Answers:
    """What is known of the clients that are asked."""

    counts: dict[int, Counts] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)


class DeviceCertification:
    """Asks some clients, after a due round, how many of their own images the model is certified at.

    It never changes the model. A client that answers badly or not at all is counted as an offender of
    the round, as in training, unless no client answered well.

    Args:
        config: of the run.
        facts: what every message says: class names, plan, model specification.
        roster: who is connected.
        conduct: who is left out.
        exchange: the run's, for a node that trains or certifies is busy for both.
    """

    def __init__(
        self,
        config: RunConfig,
        facts: ConfigRecord,
        roster: Roster,
        conduct: Conduct,
        exchange: Exchange,
    ) -> None:
        self._config, self._facts = config, facts
        self._roster, self._conduct, self._exchange = roster, conduct, exchange
        terms = config.device_certification
        self._quorum = math.ceil(config.federation.quorum * config.cohort_size)
        self._radii: list[float] = []
        self._order = ConfigRecord()
        if terms.every:
            self._radii = config.device_radii
            procedure = Procedure(
                sigma=config.certified_sigma,
                n0=terms.n0,
                n=terms.n,
                alpha=terms.alpha,
                seed=config.seed,
            )
            self._order = ConfigRecord({wire.NUM_IMAGES: terms.num_images, wire.RADII: self._radii})
            self._order.update(to_flat(procedure, wire.CERTIFY_PREFIX))

    def certify_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, trained: TrainedRound
    ) -> FederatedAccuracy | None:
        """Return what the round's clients count, or None when the round is not due.

        It waits for them until ``federation.deadline_seconds``, and for nobody to connect.

        Args:
            server_round: the round that has just been trained.
            arrays: its model.
            grid: how to reach the clients.
            trained: what the round did; its offenders and seconds are added to.
        """
        every, last = self._config.device_certification.every, self._config.federation.num_rounds
        if not every or (server_round % every and server_round != last):
            return None
        started = time.perf_counter()
        self._exchange.collect_late(grid)
        nodes = self._roster.refresh(grid)
        out = self._exchange.busy_nodes | self._conduct.suspended(server_round)
        cohort = sample_cohort(
            (client for client, node in nodes.items() if node not in out),
            self._config.cohort_size,
            self._config.seed,
            server_round,
            purpose=Purpose.CERTIFIED_COHORT,
        )
        answers = _Answers()
        if len(cohort) >= self._quorum:
            self._ask(server_round, arrays, grid, nodes, cohort, answers)
            self._note_offences(server_round, nodes, answers, trained)
        result = self._pooled(sorted(cohort), answers)
        trained.seconds["certify"] = time.perf_counter() - started
        if result.problem is not None:
            log(WARNING, "Round %d: no certified accuracy: %s.", server_round, result.problem)
        return result

    def _ask(
        self,
        server_round: int,
        arrays: ArrayRecord,
        grid: Grid,
        nodes: dict[int, int],
        cohort: list[int],
        answers: _Answers,
    ) -> None:
        deadline = self._config.federation.deadline_seconds
        messages, client_of = [], {}
        for client in cohort:
            facts = ConfigRecord({wire.SERVER_ROUND: server_round, wire.PARTITION_ID: client})
            facts.update(self._facts)
            facts.update(self._order)
            message = Message(
                RecordDict({wire.ARRAYS: arrays, wire.CONFIG: facts}),
                nodes[client],
                MessageType.EVALUATE,
                ttl=deadline + CLOCK_TOLERANCE_SECONDS,
                group_id=str(server_round),
            )
            messages.append(message)
            client_of[nodes[client]] = client
        waiting = set(cohort)

        def receive(question: Metadata, reply: Message | Error) -> None:
            client = client_of[question.dst_node_id]
            waiting.discard(client)
            self._judge(client, reply, answers)

        log(INFO, "Round %d: %d clients certify images of their own.", server_round, len(cohort))
        self._exchange.ask(grid, messages, deadline, receive, lambda: False)
        for client in sorted(waiting):
            _refuse(client, "no reply came in time", answers)

    def _judge(self, client: int, reply: Message | Error, answers: _Answers) -> None:
        error = reply if isinstance(reply, Error) else reply.error if reply.has_error() else None
        if error is not None:
            _refuse(client, error.reason or f"Flower's error {error.code}", answers)
            return
        assert isinstance(reply, Message)
        asked = self._config.device_certification.num_images
        try:
            answers.counts[client] = read_counts(reply, asked, len(self._radii))
        except BadReplyError as bad:
            _refuse(client, str(bad), answers)

    def _note_offences(
        self, server_round: int, nodes: dict[int, int], answers: _Answers, trained: TrainedRound
    ) -> None:
        if not answers.counts:  # the fault may well be the model's or the server's
            return
        for client in sorted({refusal.client for refusal in answers.refused}):
            if nodes[client] in trained.offenders:  # a round counts one offence of a node at most
                continue
            trained.offenders.append(nodes[client])
            if self._conduct.note(server_round, nodes[client]):
                log(WARNING, "Client %d is left out for a while from now on.", client)

    def _pooled(self, cohort: list[int], answers: _Answers) -> FederatedAccuracy:
        counts = [answers.counts[client] for client in sorted(answers.counts)]
        num_examples = sum(c.num_examples for c in counts)
        result = FederatedAccuracy(
            radii=self._radii,
            cohort=cohort,
            num_clients=len(counts),
            num_examples=num_examples,
            num_held_out=sum(c.num_held_out for c in counts),
            num_abstained=sum(c.num_abstained for c in counts),
            refused=answers.refused,
        )
        if len(cohort) < self._quorum:
            problem = f"{len(cohort)} clients are free, but a quorum is {self._quorum}"
            return replace(result, problem=problem)
        if len(counts) < self._quorum:
            problem = f"{len(counts)} clients answered well, but a quorum is {self._quorum}"
            return replace(result, problem=problem)
        correct = [sum(at_radius) for at_radius in zip(*(c.correct for c in counts), strict=True)]
        return replace(
            result,
            accuracy=[count / num_examples for count in correct],
            confidence_interval_95=[_interval(count, num_examples) for count in correct],
        )


def _interval(count: int, total: int) -> list[float]:
    """Two-sided 95 % Clopper-Pearson interval of a share that showed ``count`` times in ``total``."""
    return [p_a_lower(count, total, _TAIL), 1 - p_a_lower(total - count, total, _TAIL)]


def _refuse(client: int, reason: str, answers: _Answers) -> None:
    refusal = Refusal(client, readable(reason))
    log(WARNING, "Client %d certifies nothing: %s.", client, refusal.reason)
    answers.refused.append(refusal)
