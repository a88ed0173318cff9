"""The ClientApp: unpack a message, find this device's data, call the core, pack the reply."""

import time
from functools import lru_cache
from typing import NamedTuple

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import nn

from client.local_data import images_to_certify, local_data
from client.node import OUT_OF_MEMORY, NodeFacts
from fedsmooth_core import wire
from fedsmooth_core.config import TrainingPlan, from_flat
from fedsmooth_core.errors import ConfigError, FedSmoothError
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.training import local_train

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Tell the server which partition this node says it is; most have none to say."""
    try:
        facts = NodeFacts.read(context.node_config)
    except FedSmoothError as error:
        return _refusal(error, message)
    answer = ConfigRecord()
    if facts.partition is not None:
        answer[wire.PARTITION_ID], answer[wire.NUM_PARTITIONS] = facts.partition
    return Message(RecordDict({wire.CONFIG: answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round: LocalTrain from the global weights on this device's data."""
    started = time.perf_counter()
    try:
        task = _read(message)
        facts = NodeFacts.read(context.node_config)
        device = facts.prepare()
        data = local_data(facts, task.plan, task.spec, task.class_names, task.client, device)
        model = _load_model(task.spec, message.content.array_records[wire.ARRAYS], device)
        set_up = time.perf_counter()
        result = local_train(model, data, task.plan, task.server_round, task.client, facts.limits)
    except FedSmoothError as error:
        return _refusal(error, message)
    except torch.OutOfMemoryError:
        return _refusal(ConfigError(OUT_OF_MEMORY), message)
    metrics = MetricRecord(
        {
            wire.NUM_EXAMPLES: data.num_examples,
            wire.TRAIN_LOSS: result.loss,
            wire.TRAIN_ACCURACY: result.accuracy,
            wire.SETUP_SECONDS: set_up - started,
            wire.TRAIN_SECONDS: time.perf_counter() - set_up,
        }
    )
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({wire.ARRAYS: arrays, wire.METRICS: metrics}), reply_to=message)


@app.evaluate()
def certify(message: Message, context: Context) -> Message:
    """Certify the global model at a few of this client's own images; answer with counts alone."""
    # Imported here: the statistics cost a fresh process more than a train message can bear.
    from client.certification import Order, certified_counts

    try:
        task = _read(message)
        order = Order.read(message.content.config_records[wire.CONFIG])
        facts = NodeFacts.read(context.node_config)
        device = facts.prepare()
        own = images_to_certify(
            facts, task.plan, task.spec, task.class_names, task.client, order.num_images, device
        )
        model = _load_model(task.spec, message.content.array_records[wire.ARRAYS], device)
        counts = certified_counts(model, own, order, task.client, facts.limits.max_batch, device)
    except FedSmoothError as error:
        return _refusal(error, message)
    except torch.OutOfMemoryError:
        return _refusal(ConfigError(OUT_OF_MEMORY), message)
    return Message(RecordDict({wire.METRICS: counts}), reply_to=message)


class _Task(NamedTuple):
    """What every train and evaluate message says."""

    plan: TrainingPlan
    spec: ModelSpec
    class_names: list[str]
    client: int
    server_round: int


def _read(message: Message) -> _Task:
    """Unpack a message, or say in one sentence what it lacks."""
    config = message.content.config_records.get(wire.CONFIG)
    if config is None or wire.ARRAYS not in message.content.array_records:
        raise ConfigError(
            f"The server's message lacks its '{wire.CONFIG}' or '{wire.ARRAYS}' record: server and "
            "client must be of the same version."
        )

    def part(prefix: str) -> dict[str, object]:
        return {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}

    facts = [config.get(key) for key in (wire.CLASS_NAMES, wire.PARTITION_ID, wire.SERVER_ROUND)]
    match facts:
        case [list(names), int(client), int(server_round)]:
            plan = from_flat(TrainingPlan, part(wire.PLAN_PREFIX))
            spec = from_flat(ModelSpec, part(wire.SPEC_PREFIX))
            return _Task(plan, spec, [str(name) for name in names], client, server_round)
    raise ConfigError(
        f"The server's message has {wire.CLASS_NAMES}, {wire.PARTITION_ID} and {wire.SERVER_ROUND} "
        f"of {facts!r}: server and client must be of the same version."
    )


@lru_cache(maxsize=2)
def _skeleton(spec: ModelSpec, device: torch.device) -> nn.Module:
    """Build an architecture once a process; every message overwrites all its weights and buffers."""
    channels = spec.channels
    model = build_model(spec, [0.0] * channels, [1.0] * channels, torch.Generator())
    return model.to(device)


def _load_model(spec: ModelSpec, arrays: ArrayRecord, device: torch.device) -> nn.Module:
    model = _skeleton(spec, device)
    try:
        model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"The server's weights do not fit the architecture {spec.name!r} of this client: server "
            f"and client must be of the same version ({' '.join(str(error).split())})."
        ) from error
    return model


def _refusal(error: FedSmoothError, message: Message) -> Message:
    """Answer with the sentence alone; the server names the client beside it."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
