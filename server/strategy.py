"""Weighted FedAvg with seeded client sampling and checked replies, as a Flower strategy."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import NamedTuple

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore import log
from torch import Tensor

from fedsmooth_core import wire
from fedsmooth_core.aggregation import update_norm
from fedsmooth_core.config import RunConfig, to_flat
from fedsmooth_core.models import ModelSpec
from server.conduct import Conduct
from server.device_certification import DeviceCertification
from server.exchange import CLOCK_TOLERANCE_SECONDS, Exchange
from server.recorder import Recorder, TrainedRound
from server.replies import BadReplyError, GlobalModel, Refusal, read_reply, readable, state_of
from server.robust import Aggregator
from server.roster import Roster
from server.sampling import sample_cohort

_LOG_SECONDS = 60.0


class _GoodReply(NamedTuple):
    message: Message
    state: dict[str, Tensor]
    metrics: MetricRecord

    @property
    def num_examples(self) -> int:
        return int(self.metrics[wire.NUM_EXAMPLES])  # type: ignore[arg-type]


class SmoothAdvFedAvg(FedAvg):
    """theta = sum_k (n_k / n) theta_k over the sampled cohort (McMahan et al. 2017).

    ``train_round`` is the server's round: it asks cohorts until a quorum of good replies is in. Flower's
    own ``start`` loop drives the same hooks, without the quorum's second attempts.

    Args:
        max_num_examples: what a reply may claim at most.
        num_awaited: clients to wait for before the first round, so that cohorts are drawn from the same
            clients in every runtime; later a quorum will do.
        patience_seconds: how long to wait for those beyond a quorum.
        judge: says what is wrong with a model that cannot be a classifier, or None.
        record_of: makes the record that a new model is sent in. Flower's own holds bytes; one that holds
            the tensors keeps the model on its device.

    Attributes:
        trained: what the current round, or the last one, did.
        on_devices: asks clients to certify a round's model; it shares what is known of the nodes.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: ModelSpec,
        class_names: Sequence[str],
        max_num_examples: int,
        roster: Roster,
        conduct: Conduct,
        num_awaited: int,
        patience_seconds: float,
        judge: Callable[[Mapping[str, Tensor]], str | None],
        record_of: Callable[[dict[str, Tensor]], ArrayRecord] = ArrayRecord.from_torch_state_dict,
    ) -> None:
        super().__init__()
        self.config = config
        self.trained = TrainedRound()
        self._roster = roster
        self._conduct = conduct
        self._num_awaited, self._patience = num_awaited, patience_seconds
        self._judge = judge
        self._record_of = record_of
        self._aggregate = Aggregator(config.aggregation)
        self._exchange = Exchange(self._receive_late)
        self._facts = ConfigRecord({wire.CLASS_NAMES: list(class_names)})
        self._facts.update(to_flat(config.plan, wire.PLAN_PREFIX))
        self._facts.update(to_flat(spec, wire.SPEC_PREFIX))
        self.on_devices = DeviceCertification(config, self._facts, roster, conduct, self._exchange)
        self._max_num_examples = max_num_examples
        self._round = 0
        self._global = GlobalModel({})
        self._asked: dict[int, Metadata] = {}
        self._good: dict[int, _GoodReply] = {}
        self._node_of: Mapping[int, int] = {}
        self._client_of: Mapping[int, int] = {}
        self._sent_at = self._log_at = 0.0
        self._refused_before = 0

    def summary(self) -> None:
        """Log what is averaged over whom."""
        log(
            INFO,
            "\t└──> %d of %d clients a round, %d good replies needed, seed %d",
            self.config.cohort_size,
            self.config.partition.num_clients,
            self.config.quorum_size,
            self.config.seed,
        )

    def train_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, recorder: Recorder
    ) -> ArrayRecord:
        """Return the model after a round: the aggregate, or the old one if no attempt met the quorum.

        Raises:
            TrainingError: when too few clients are connected for a quorum.
        """
        for attempt in range(1, self.config.federation.attempts + 1):
            messages = self.configure_train(server_round, arrays, ConfigRecord(), grid)
            recorder.cohort_asked(server_round, self.trained)
            spent = self._exchange.ask(
                grid,
                messages,
                self.config.federation.deadline_seconds,
                self._receive,
                self._is_over,
            )
            for phase, seconds in spent.items():
                self._add_seconds(phase, seconds)
            new, _ = self.aggregate_train(server_round, [])
            if new is not None:
                return new
            log(
                WARNING,
                "Round %d, attempt %d of %d: %d good replies, but %d are needed; the model is kept.",
                server_round,
                attempt,
                self.config.federation.attempts,
                len(self._good),
                self.config.quorum_size,
            )
        return arrays

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample S_t and send each of its clients the model, the plan and its number."""
        if server_round != self._round:
            self._round, self.trained = server_round, TrainedRound()
        self.trained.attempts += 1
        nodes = self._connected(grid)
        candidates = self._candidates(nodes)
        extra = round(self.config.federation.over_selection * self.config.cohort_size)
        cohort = sample_cohort(
            candidates,
            self.config.cohort_size + extra,
            self.config.seed,
            server_round,
            self.trained.attempts,
        )
        self.trained.cohort = sorted(cohort)
        self._global, self._good, self._asked = GlobalModel(state_of(arrays)), {}, {}
        self._node_of, self._refused_before = nodes, len(self.trained.refused)
        self._client_of = {nodes[client]: client for client in cohort}
        messages = []
        for client in cohort:
            facts = self._facts.copy()
            facts[wire.SERVER_ROUND], facts[wire.PARTITION_ID] = server_round, client
            message = Message(
                RecordDict({wire.ARRAYS: arrays, wire.CONFIG: facts}),
                nodes[client],
                MessageType.TRAIN,
                ttl=self.config.federation.deadline_seconds + CLOCK_TOLERANCE_SECONDS,
                group_id=str(server_round),
            )
            messages.append(message)
            # Flower sets a message's id when it is sent: the metadata object is kept, not a copy.
            self._asked[client] = message.metadata
        self._sent_at, self._log_at = time.perf_counter(), _LOG_SECONDS
        return messages

    def _connected(self, grid: Grid) -> dict[int, int]:
        """Return {client: node}, after waiting for all clients at first, and for a quorum later."""
        started = time.perf_counter()
        # Late answers say who is free again.
        self._exchange.collect_late(grid)
        needed = self.config.quorum_size
        timeout = self.config.federation.connect_timeout_seconds
        wanted = max(self._num_awaited, needed)
        nodes = self._roster.wait(grid, wanted, needed, self._patience, timeout)
        self._num_awaited = 0
        self.trained.num_connected = len(nodes)
        if len(nodes) < self.config.partition.num_clients:
            missing = sorted(set(range(self.config.partition.num_clients)) - nodes.keys())
            log(WARNING, "Not connected and hence not sampled: clients %s.", missing)
        self._add_seconds("connect", time.perf_counter() - started)
        return nodes

    def _candidates(self, nodes: Mapping[int, int]) -> set[int]:
        """Return who may be sampled: failed, busy and suspended clients only where a quorum needs them."""
        failed = {refusal.client for refusal in self.trained.refused}
        busy = {c for c, node in nodes.items() if node in self._exchange.busy_nodes}
        suspended_nodes = self._conduct.suspended(self._round)
        suspended = {client for client, node in nodes.items() if node in suspended_nodes}
        self.trained.suspended = sorted(suspended)
        candidates = nodes.keys() - failed - busy - suspended
        for held_back in (failed - busy - suspended, busy - suspended, suspended):
            if len(candidates) < self.config.quorum_size:
                candidates |= held_back & nodes.keys()
        return candidates

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no client here: the server evaluates the global model itself; see ``on_devices``."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the good replies; name the others. Without a quorum the old model is kept.

        ``replies`` are those that Flower's own loop collected; ``train_round`` has handed them in before.
        """
        by_question = {reply.metadata.reply_to_message_id: reply for reply in replies}
        for question in list(self._asked.values()):
            # An error that Flower makes up for a lost node does not carry that node's id.
            if question.message_id in by_question:
                self._receive(question, by_question[question.message_id])
        received = time.perf_counter()
        self._add_seconds("train", received - self._sent_at)
        if not self._has_enough():
            for client in sorted(self._asked):
                self._refuse(client, "no reply came in time")
        new = self._plausible_average()
        self._note_offences()
        if new is None:
            return None, None
        good = [self._good[client] for client in sorted(self._good)]
        num_examples = sum(reply.num_examples for reply in good)
        # Plain numbers: Flower's records check the type of every one at each turn.
        reported = [{name: float(x) for name, x in reply.metrics.items()} for reply in good]  # type: ignore[arg-type]
        # Whatever a client says, it worked no longer than it was waited for.
        waited = received - self._sent_at
        for own in reported:
            for name in (wire.SETUP_SECONDS, wire.TRAIN_SECONDS):
                own[name] = min(own[name], waited)
        shares = [reply.num_examples / num_examples for reply in good]
        means = {
            name: sum(share * own[name] for share, own in zip(shares, reported, strict=True))
            for name in reported[0]
            if name != wire.NUM_EXAMPLES
        }
        own_work = [own[wire.SETUP_SECONDS] + own[wire.TRAIN_SECONDS] for own in reported]
        self.trained.aggregated = sorted(self._good)
        self.trained.num_clipped = self._aggregate.num_clipped
        self.trained.num_examples = num_examples
        self.trained.metrics = means
        self.trained.update_norm = update_norm(new, self._global.on(_device(new)))
        self.trained.seconds["slowest_client"] = min(max(own_work), waited)
        self._add_seconds("aggregate", time.perf_counter() - received)
        return self._record_of(new), MetricRecord(dict(means))

    def _plausible_average(self) -> dict[str, Tensor] | None:
        """Average the good replies, but for those that make no classifier; None without a quorum."""
        if len(self._good) < self.config.quorum_size:
            return None
        new = self._average()
        if self._judge(new) is None:
            return new
        # Rare, so each reply is looked at only now: finite weights can be as harmful as infinite ones.
        for client, reply in sorted(self._good.items()):
            problem = self._judge(reply.state)
            if problem is not None:
                del self._good[client]
                self._refuse(client, problem)
        if len(self._good) < self.config.quorum_size:
            return None
        new = self._average()
        problem = self._judge(new)
        if problem is not None:
            log(WARNING, "The average of the replies is not taken: %s.", problem)
            self._good = {}
        return new if problem is None else None

    def _average(self) -> dict[str, Tensor]:
        # In the order of client numbers, so that the sum does not depend on arrival.
        good = [self._good[client] for client in sorted(self._good)]
        device = _device(good[0].state)
        return self._aggregate(
            self._global.on(device),
            [_moved(reply.state, device) for reply in good],
            [reply.num_examples for reply in good],
            [reply.message for reply in good],
        )

    def _note_offences(self) -> None:
        """Count who was refused in this attempt, unless everybody was."""
        if not self._good:
            return
        clients = {refusal.client for refusal in self.trained.refused[self._refused_before :]}
        for client in sorted(clients):
            node = self._node_of[client]
            if node in self.trained.offenders:
                continue
            self.trained.offenders.append(node)
            if self._conduct.note(self._round, node):
                log(
                    WARNING,
                    "Client %d is left out for %d rounds: it was refused in %d.",
                    client,
                    self._conduct.suspension_rounds,
                    self._conduct.strikes,
                )

    def _receive(self, question: Metadata, reply: Message | Error) -> None:
        """Check one reply to the current attempt."""
        if self._has_enough():
            return
        client = self._client_of[question.dst_node_id]
        error = reply if isinstance(reply, Error) else reply.error if reply.has_error() else None
        if error is not None:
            self._refuse(client, error.reason or f"Flower's error {error.code}")
            return
        assert isinstance(reply, Message)
        try:
            state, metrics = read_reply(reply, self._global, self._max_num_examples)
        except BadReplyError as bad:
            self._refuse(client, str(bad))
            return
        del self._asked[client]
        self._good[client] = _GoodReply(reply, state, metrics)

    def _receive_late(self, question: Metadata, reply: Message | Error) -> None:
        """Note an answer that came after its round: it belongs to a model that has moved on."""
        client = self._roster.client_of(question.dst_node_id)
        is_reply = isinstance(reply, Message) and not reply.has_error()
        what = "its reply to" if is_reply else "its failure in"
        asked = "the certification of " if question.message_type == MessageType.EVALUATE else ""
        reason = f"{what} {asked}round {question.group_id} came after that was over, and is dropped"
        if client is not None:
            log(INFO, "Client %d: %s.", client, reason)
            self.trained.late.append(Refusal(client, reason))

    def _is_over(self) -> bool:
        """Whether no more replies are needed; asked all the time, so it also says who keeps it waiting."""
        if self._has_enough():
            return True
        waited = time.perf_counter() - self._sent_at
        if self._asked and waited > self._log_at:
            self._log_at = waited + _LOG_SECONDS
            log(
                INFO,
                "Round %d: waiting for clients %s for %.0f s; the deadline is %g s.",
                self._round,
                sorted(self._asked),
                waited,
                self.config.federation.deadline_seconds,
            )
        return False

    def _has_enough(self) -> bool:
        return len(self._good) >= self.config.cohort_size

    def _refuse(self, client: int, reason: str) -> None:
        refusal = Refusal(client, readable(reason))
        log(WARNING, "Client %d is refused: %s.", client, refusal.reason)
        self.trained.refused.append(refusal)
        self._asked.pop(client, None)

    def _add_seconds(self, phase: str, seconds: float) -> None:
        self.trained.seconds[phase] = self.trained.seconds.get(phase, 0.0) + seconds


def _device(state: Mapping[str, Tensor]) -> torch.device:
    return next(iter(state.values())).device


def _moved(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Bring a reply to where the others are: clients of one process may compute on several devices."""
    if _device(state) == device:
        return state
    return {name: tensor.to(device) for name, tensor in state.items()}
