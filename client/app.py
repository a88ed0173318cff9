"""The ClientApp: unpack a message, find this device's data, call the core, pack the reply."""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
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
from client.tensor_array import state_of, tensor_record
from fedsmooth_core import wire
from fedsmooth_core.cohort import CohortTrainer, Member, Trained
from fedsmooth_core.config import SectionT, TrainingPlan, from_flat
from fedsmooth_core.errors import ConfigError, FedSmoothError
from fedsmooth_core.limits import DeviceLimits
from fedsmooth_core.models import ModelSpec, build_model

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
    ((_, answer),) = _train([(message, context)], _ALONE)
    if isinstance(answer, Exception):
        raise answer  # a bug, which Flower answers for
    return answer


class Trainers:
    """The trainers of a process, one for each kind of node in it.

    Args:
        workers: clients that train side by side on a CPU; None trains in the calling thread.
        threads_per_worker: CPU threads of each.
        is_kept: whether this process answers many rounds, so that data and preparations are kept.
    """

    def __init__(
        self, workers: int | None = None, threads_per_worker: int = 1, is_kept: bool = False
    ) -> None:
        self.is_kept = is_kept
        self._make = partial(
            CohortTrainer,
            workers=workers,
            threads_per_worker=threads_per_worker,
            is_kept=is_kept,
        )
        self._made: dict[tuple[torch.device, str, DeviceLimits], CohortTrainer] = {}

    def of(self, device: torch.device, facts: NodeFacts) -> CohortTrainer:
        """Return the trainer of nodes with these facts."""
        key = (device, facts.engine, facts.limits)
        if key not in self._made:
            self._made[key] = self._make(device, engine=facts.engine, limits=facts.limits)
        return self._made[key]

    def close(self) -> None:
        """End the trainers' workers, and give back what they kept."""
        for trainer in self._made.values():
            trainer.close()
        self._made.clear()


_ALONE = Trainers()


def train_together(
    questions: Iterable[tuple[Message, Context]], trainers: Trainers
) -> Iterator[Message]:
    """Answer train messages to any number of clients; each as if it had been asked alone.

    Those who are asked for the same round with the same plan and weights train as one cohort. Replies
    come as they are made, not in the order of the questions; a bug at one client is its error reply.
    """
    for question, answer in _train(questions, trainers):
        if isinstance(answer, Exception):
            reason = f"{type(answer).__name__}: {answer}"
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            yield Message(error, reply_to=question)
        else:
            yield answer


class _Asked(NamedTuple):
    """A question that can be answered, and what its answer needs."""

    question: Message
    member: Member
    set_up_seconds: float


class _Same(NamedTuple):
    """What the clients of a cohort share."""

    trainer: CohortTrainer
    device: torch.device
    plan: TrainingPlan
    spec: ModelSpec
    server_round: int
    weights: int
    """Which record, not which weights: to compare those would take longer than to load them."""


_Answer = tuple[Message, Message | Exception]
"""A question, and its reply or the bug that stands in its way."""


def _train(questions: Iterable[tuple[Message, Context]], trainers: Trainers) -> Iterator[_Answer]:
    cohorts: dict[_Same, list[_Asked]] = {}
    for question, context in questions:
        started = time.perf_counter()
        try:
            task = _read(question)
            facts = NodeFacts.read(context.node_config)
            device = facts.prepare()
            data = local_data(
                facts,
                task.plan,
                task.spec,
                task.class_names,
                task.client,
                device,
                trainers.is_kept,
            )
            trainer = trainers.of(device, facts)
        except Exception as error:
            yield question, _answer_to(error, question)
            continue
        weights = id(question.content.array_records[wire.ARRAYS])
        same = _Same(trainer, device, task.plan, task.spec, task.server_round, weights)
        asked = _Asked(question, Member(task.client, data), time.perf_counter() - started)
        cohorts.setdefault(same, []).append(asked)
    for same, members in cohorts.items():
        yield from _train_cohort(same, members)


def _train_cohort(same: _Same, cohort: Sequence[_Asked]) -> Iterator[_Answer]:
    waiting = dict(enumerate(cohort))
    try:
        arrays = cohort[0].question.content.array_records[wire.ARRAYS]
        model = _load_model(same.spec, arrays, same.device)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        outcomes = same.trainer.train(
            model, state, [asked.member for asked in cohort], same.plan, same.server_round
        )
        for place, outcome in outcomes:
            asked = waiting.pop(place)
            yield asked.question, _answer(asked, outcome)
    except Exception as error:  # of all who still wait: the weights, say
        for asked in waiting.values():
            yield asked.question, _answer_to(error, asked.question)


def _answer(asked: _Asked, outcome: Trained | Exception) -> Message | Exception:
    if isinstance(outcome, Exception):
        return _answer_to(outcome, asked.question)
    metrics = MetricRecord(
        {
            wire.NUM_EXAMPLES: asked.member.data.num_examples,
            wire.TRAIN_LOSS: outcome.metrics.loss,
            wire.TRAIN_ACCURACY: outcome.metrics.accuracy,
            wire.SETUP_SECONDS: asked.set_up_seconds,
            wire.TRAIN_SECONDS: outcome.seconds,
        }
    )
    arrays = tensor_record(outcome.state)
    content = RecordDict({wire.ARRAYS: arrays, wire.METRICS: metrics})
    return Message(content, reply_to=asked.question)


def _answer_to(error: Exception, question: Message) -> Message | Exception:
    """Return the sentence that answers a question, or the error itself where it is a bug."""
    if isinstance(error, torch.OutOfMemoryError):
        error = ConfigError(OUT_OF_MEMORY)
    return _refusal(error, question) if isinstance(error, FedSmoothError) else error


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

    def part(prefix: str) -> tuple[tuple[str, object], ...]:
        return tuple((k.removeprefix(prefix), v) for k, v in config.items() if k.startswith(prefix))

    facts = [config.get(key) for key in (wire.CLASS_NAMES, wire.PARTITION_ID, wire.SERVER_ROUND)]
    match facts:
        case [list(names), int(client), int(server_round)]:
            plan = _section(TrainingPlan, part(wire.PLAN_PREFIX))
            spec = _section(ModelSpec, part(wire.SPEC_PREFIX))
            return _Task(plan, spec, [str(name) for name in names], client, server_round)
    raise ConfigError(
        f"The server's message has {wire.CLASS_NAMES}, {wire.PARTITION_ID} and {wire.SERVER_ROUND} "
        f"of {facts!r}: server and client must be of the same version."
    )


# A cohort's messages say the same plan; reading it takes as long as the rest of a message.
@lru_cache(maxsize=8)
def _section(cls: type[SectionT], items: tuple[tuple[str, object], ...]) -> SectionT:
    return from_flat(cls, dict(items))


@lru_cache(maxsize=2)
def _skeleton(spec: ModelSpec, device: torch.device) -> nn.Module:
    """Build an architecture once a process; every message overwrites all its weights and buffers."""
    channels = spec.channels
    model = build_model(spec, [0.0] * channels, [1.0] * channels, torch.Generator())
    return model.to(device)


def _load_model(spec: ModelSpec, arrays: ArrayRecord, device: torch.device) -> nn.Module:
    model = _skeleton(spec, device)
    try:
        model.load_state_dict(state_of(arrays), strict=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConfigError(
            f"The server's weights do not fit the architecture {spec.name!r} of this client: server "
            f"and client must be of the same version ({' '.join(str(error).split())})."
        ) from error
    return model


def _refusal(error: FedSmoothError, message: Message) -> Message:
    """Answer with the sentence alone; the server names the client beside it."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
