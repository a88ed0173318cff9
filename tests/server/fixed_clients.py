"""A strategy, and a grid whose clients answer with fixed models, or misbehave as they are told."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import client.app
from fedsmooth_core.config import (
    AggregationConfig,
    DeviceCertificationConfig,
    FederationConfig,
    PartitionConfig,
    RunConfig,
)
from fedsmooth_core.models import ModelSpec
from server.conduct import Conduct
from server.roster import Roster
from server.simulation import InProcessGrid, quiet_flower
from server.strategy import SmoothAdvFedAvg

SPEC = ModelSpec("small_cnn", "he", 3, 1, 8, 8)
INITIAL = {
    "weight": torch.linspace(-1, 1, 12, dtype=torch.float32).reshape(3, 4),
    "scale": torch.tensor(0.5, dtype=torch.float64),
    "batches": torch.tensor(100),
}


def local_model(number, server_round=1):
    """What client ``number`` makes of any model: values of its own."""
    generator = torch.Generator().manual_seed(1000 * server_round + number)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "scale": torch.randn((), generator=generator, dtype=torch.float64),
        "batches": torch.tensor(100 + 7 * number % 5),
    }


def num_examples(number):
    return 10 + 37 * number % 101


def good_reply(number, server_round=1):
    metrics = {
        "num-examples": num_examples(number),
        "train-loss": float(number),
        "train-accuracy": 0.5,
        "setup-seconds": 2e-9,
        "train-seconds": 1e-9,
    }
    arrays = ArrayRecord(local_model(number, server_round))
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})


def good_counts(number):
    """What client ``number`` counts of its images: up to ten, at the radii 0, 0.25 and 0.5."""
    counts = {
        "num-examples": 10 - number % 3,
        "held-out": 10 - number % 3 if number % 2 else 0,
        "abstained": 1,
        "correct": [6 - number % 3, 4, number % 5],
    }
    return RecordDict({"metrics": MetricRecord(counts)})


def federation(
    num_clients,
    misbehave=None,
    aggregation=None,
    judge=lambda state: None,
    miscount=None,
    certify_every=0,
    **settings,
):
    """A strategy and a grid whose clients answer with fixed models, but for those that misbehave.

    Args:
        misbehave: {client: function from its good reply to what it sends instead}.
        aggregation: settings of the aggregation, if not the defaults.
        judge: says what is wrong with a state.
        miscount: as ``misbehave``, for what clients count of their own images.
        certify_every: rounds between two of those.
        settings: of the federation.
    """
    app = ClientApp()
    app.query()(client.app.describe)
    seen = []

    @app.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        seen.append((message, number))
        server_round = message.content["config"]["server-round"]
        content = good_reply(number, server_round)
        content = (misbehave or {}).get(number, lambda same: same)(content)
        return Message(content, reply_to=message)

    @app.evaluate()
    def certify(message, context):
        number = context.node_config["partition-id"]
        seen.append((message, number))
        content = (miscount or {}).get(number, lambda same: same)(good_counts(number))
        return Message(content, reply_to=message)

    config = RunConfig(
        device_certification=DeviceCertificationConfig(every=certify_every),
        partition=PartitionConfig(num_clients=num_clients),
        federation=FederationConfig(**{"cohort_fraction": 1.0} | settings),
        aggregation=AggregationConfig(**(aggregation or {})),
    )
    conduct = Conduct(config.federation.strikes, config.federation.suspension_rounds)
    names = ["a", "b", "c"]
    strategy = SmoothAdvFedAvg(
        config,
        SPEC,
        names,
        1_000_000,
        Roster(num_clients),
        conduct,
        num_awaited=num_clients,
        patience_seconds=config.federation.connect_timeout_seconds,
        judge=judge,
    )
    grid = InProcessGrid(num_clients, client_app=app)
    grid.seen = seen
    return strategy, grid


class SlowGrid(InProcessGrid):
    """Clients answer at their own pace: ``order`` is a permutation, or the clients that answer at all."""

    order = ()

    def pull_messages(self, message_ids):
        (message_id,) = message_ids
        reply = self._replies.get(message_id)
        if reply is None or reply.metadata.message_type != "train":
            return super().pull_messages(message_ids)
        number = reply.metadata.src_node_id - 2
        if not self.order or self.order[0] != number:
            return []
        self.order = self.order[1:]
        return super().pull_messages(message_ids)


class Witness:
    """Takes the recorder's place: it remembers whom each attempt asked."""

    def __init__(self):
        self.cohorts = []

    def cohort_asked(self, server_round, trained):
        self.cohorts.append((server_round, trained.attempts, trained.cohort))


def run(strategy, grid, num_rounds=1, first=1, witness=None):
    """Return the global model after some rounds."""
    quiet_flower()
    arrays = ArrayRecord(INITIAL)
    for server_round in range(first, first + num_rounds):
        arrays = strategy.train_round(server_round, arrays, grid, witness or Witness())
    return arrays.to_torch_state_dict()


def oracle(numbers, server_round=1):
    """sum_k (n_k / n) theta_k in float64 NumPy; counters take the maximum."""
    weights = np.array([num_examples(k) for k in numbers], np.float64)
    models = [local_model(k, server_round) for k in numbers]
    mean = {
        name: sum(w * m[name].double().numpy() for w, m in zip(weights, models, strict=True))
        / weights.sum()
        for name in ("weight", "scale")
    }
    return mean | {"batches": max(int(m["batches"]) for m in models)}


def assert_average_of(state, numbers, server_round=1):
    expected = oracle(numbers, server_round)
    assert {name: value.dtype for name, value in state.items()} == {
        name: value.dtype for name, value in INITIAL.items()
    }
    np.testing.assert_allclose(state["weight"].numpy(), expected["weight"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(state["scale"].numpy(), expected["scale"], rtol=1e-12)
    assert int(state["batches"]) == expected["batches"]


def assert_same(first, second):
    for name in INITIAL:
        assert torch.equal(first[name], second[name])
