"""From the checked replies of a round to the new model: clipping, then the configured rule."""

from collections.abc import Mapping, Sequence

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, Strategy
from torch import Tensor

from fedsmooth_core import wire
from fedsmooth_core.aggregation import clip_update, weighted_mean
from fedsmooth_core.config import AggregationConfig
from fedsmooth_core.models import NORMALISATION

State = Mapping[str, Tensor]


class Aggregator:
    """Makes the new global model of a round's replies.

    Attributes:
        num_clipped: replies of the last round whose update was longer than allowed.
    """

    def __init__(self, config: AggregationConfig) -> None:
        self.num_clipped = 0
        self._max_norm = config.max_update_norm
        rules: dict[str, Strategy] = {
            "median": FedMedian(),
            "trimmed_mean": FedTrimmedAvg(beta=config.trimmed_fraction),
            "krum": Krum(num_malicious_nodes=config.num_malicious),
        }
        self._rule = rules.get(config.rule)

    def __call__(
        self,
        old: State,
        states: Sequence[State],
        weights: Sequence[int],
        replies: Sequence[Message],
    ) -> dict[str, Tensor]:
        """Return the new state.

        Args:
            old: the global state that the clients started from, on the device of theirs.
            states: one checked state per client.
            weights: n_k, used by ``fedavg`` alone.
            replies: the messages that the states came in, for Flower's rules; their content is replaced.
        """
        self.num_clipped = 0
        if self._max_norm is not None:
            clipped = [clip_update(state, old, self._max_norm) for state in states]
            self.num_clipped = sum(was_clipped for _, was_clipped in clipped)
            states = [state for state, _ in clipped]
        mean = weighted_mean(states, weights)
        if self._rule is None:
            return mean
        # Flower's rules see float64 updates: distances between whole models would cancel in float32.
        # Counters and the untrained normalisation are no business of theirs.
        names = [
            name
            for name, tensor in old.items()
            if tensor.is_floating_point() and not name.startswith(NORMALISATION)
        ]
        for reply, state in zip(replies, states, strict=True):
            update = {name: state[name].double() - old[name].double() for name in names}
            weight = MetricRecord({wire.NUM_EXAMPLES: 1})
            reply.content = RecordDict({wire.ARRAYS: ArrayRecord(update), wire.METRICS: weight})
        arrays, _ = self._rule.aggregate_train(0, replies)
        assert arrays is not None
        moved = {
            name: (old[name].double() + update.to(old[name].device)).to(old[name].dtype)
            for name, update in arrays.to_torch_state_dict().items()
        }
        return mean | moved
