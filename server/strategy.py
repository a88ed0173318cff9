"""Weighted FedAvg with seeded client sampling and checked replies, as a Flower strategy."""

import time
from collections.abc import Iterable, Mapping, Sequence
from logging import INFO, WARNING

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
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
from fedsmooth_core.aggregation import weighted_mean
from fedsmooth_core.config import RunConfig, to_flat
from fedsmooth_core.models import ModelSpec
from server.recorder import TrainedRound, state_distance
from server.replies import BadReplyError, Refusal, read_reply
from server.roster import Roster
from server.sampling import sample_cohort

_REASON_LENGTH = 500  # of what a client may have written


class SmoothAdvFedAvg(FedAvg):
    """theta = sum_k (n_k / n) theta_k over the sampled cohort (McMahan et al. 2017).

    Flower's ``start`` loop drives it; the loop counts from 1, so a resumed run says how many rounds
    are behind it. ``trained`` describes the round that was aggregated last.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: ModelSpec,
        class_names: Sequence[str],
        max_num_examples: int,
        completed_rounds: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.completed_rounds = completed_rounds
        self.trained = TrainedRound()
        self._roster = Roster(config.partition.num_clients)
        self._facts = ConfigRecord({wire.CLASS_NAMES: list(class_names)})
        self._facts.update(to_flat(config.plan, wire.PLAN_PREFIX))
        self._facts.update(to_flat(spec, wire.SPEC_PREFIX))
        self._max_num_examples = max_num_examples
        self._global: Mapping[str, Tensor] = {}
        self._sent: list[tuple[Metadata, int]] = []
        self._started = 0.0

    def summary(self) -> None:
        """Log what is averaged over whom."""
        log(
            INFO,
            "\t└──> %d of %d clients a round, seed %d, %d rounds done",
            self.config.cohort_size,
            self.config.partition.num_clients,
            self.config.seed,
            self.completed_rounds,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample S_t and send each of its clients the model, the plan and its number."""
        self._started = time.perf_counter()
        current = server_round + self.completed_rounds
        # All of them at first, so that cohorts are drawn from the same clients in every runtime;
        # later a round goes on with those that are left.
        num_wanted = 1 if self.trained.cohort else self.config.partition.num_clients
        timeout = self.config.federation.connect_timeout_seconds
        nodes = self._roster.wait(grid, num_wanted, timeout)
        if len(nodes) < self.config.partition.num_clients:
            missing = sorted(set(range(self.config.partition.num_clients)) - nodes.keys())
            log(WARNING, "Not connected and hence not sampled: clients %s.", missing)
        cohort = sample_cohort(nodes, self.config.cohort_size, self.config.seed, current)
        self.trained = TrainedRound(cohort)
        self._global = arrays.to_torch_state_dict()
        messages = []
        for client in cohort:
            facts = ConfigRecord({wire.SERVER_ROUND: current, wire.PARTITION_ID: client})
            facts.update(self._facts)
            content = RecordDict({wire.ARRAYS: arrays, wire.CONFIG: facts})
            messages.append(
                Message(content, nodes[client], MessageType.TRAIN, group_id=str(current))
            )
        # Flower sets a message's id when it is sent: the metadata object is kept, not a copy.
        self._sent = [
            (message.metadata, client) for message, client in zip(messages, cohort, strict=True)
        ]
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no client: the server evaluates the global model itself."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the good replies; name the others. Without a good one the old model is kept."""
        received = time.perf_counter()
        accepted = self._accept(replies)
        for refusal in self.trained.refused:
            log(WARNING, "Client %d is refused: %s.", refusal.client, refusal.reason)
        arrays, metrics = None, None
        if accepted:
            records = [metrics for _, metrics in accepted]
            weights = [int(record[wire.NUM_EXAMPLES]) for record in records]  # type: ignore[arg-type]
            average = weighted_mean([state for state, _ in accepted], weights)
            metrics = self.train_metrics_aggr_fn(
                [RecordDict({wire.METRICS: record}) for record in records], wire.NUM_EXAMPLES
            )
            self.trained.num_examples = sum(weights)
            self.trained.metrics = {name: float(value) for name, value in metrics.items()}  # type: ignore[arg-type]
            self.trained.update_norm = state_distance(average, self._global)
            arrays = ArrayRecord(average)
        else:
            log(WARNING, "No reply of this round can be used: the model is kept as it was.")
        self.trained.seconds = {
            "train": received - self._started,
            "aggregate": time.perf_counter() - received,
        }
        return arrays, metrics

    def _accept(self, replies: Iterable[Message]) -> list[tuple[dict[str, Tensor], MetricRecord]]:
        """Return the good replies in the cohort's order, so that the sum does not depend on arrival."""
        # An error that Flower makes up for a lost node does not carry that node's id.
        by_question = {reply.metadata.reply_to_message_id: reply for reply in replies}
        accepted = []
        for metadata, client in self._sent:
            reply = by_question.get(metadata.message_id)
            if reply is None:
                self._refuse(client, "no reply came in time")
            elif reply.has_error():
                # Whatever text a client sends: one line in the log and in the metrics.
                self._refuse(client, str(reply.error.reason).rstrip(".\n"))
            else:
                try:
                    accepted.append(read_reply(reply, self._global, self._max_num_examples))
                except BadReplyError as error:
                    self._refuse(client, str(error))
        return accepted

    def _refuse(self, client: int, reason: str) -> None:
        # What a client writes may hold control characters of a terminal.
        readable = "".join(letter if letter.isprintable() else " " for letter in reason)
        self.trained.refused.append(Refusal(client, " ".join(readable.split())[:_REASON_LENGTH]))
