"""The in-process simulation: a Flower ``Grid`` whose nodes live in this process.

It drives the same ServerApp, strategy and ClientApp as a deployment, and answers a round's messages as
one batch. The one place that joins both ends.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from uuid import uuid4

import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console

import client.app
from client.app import Trainers, train_together
from client.tensor_array import tensor_record
from fedsmooth_core import wire
from fedsmooth_core.config import RunConfig, Scalar
from server.federation import run_federation
from server.recorder import Observer
from server.run_directory import RunDirectory

_RUN_ID = 1
_SERVER_NODE_ID = 1


def quiet_flower() -> None:
    """Keep Flower's own log to warnings: the simulation shows progress of its own."""
    logging.getLogger("flwr").setLevel(logging.WARNING)


def node_facts(config: RunConfig) -> dict[str, Scalar]:
    """Return what the run's settings say about the machine that plays all clients."""
    facts: dict[str, Scalar] = {wire.ENGINE: config.runtime.engine}
    if config.runtime.precision == "bfloat16":
        facts[wire.BF16] = True
    elif config.runtime.precision == "tf32":
        facts[wire.TF32] = True
    return facts


def simulate(
    config: RunConfig,
    console: Console,
    observers: Sequence[Observer],
    on_reply: Callable[[], None] = lambda: None,
) -> RunDirectory:
    """Run a federation in this process; its models stay on the device from round to round.

    Raises:
        FedSmoothError: one sentence about what is wrong with the configuration, data or run.
    """
    grid = InProcessGrid(
        config.partition.num_clients,
        config.runtime.device,
        on_reply,
        facts=node_facts(config),
        cohort_size=config.cohort_size,
    )
    with contextlib.closing(grid):
        return run_federation(config, grid, console, observers, tensor_record)


class InProcessGrid(Grid):
    """A Grid with ``num_clients`` simulated nodes that share this process and its device.

    Args:
        num_clients: nodes; node 2 + k is the client of partition k.
        device: what each node's configuration says about its accelerator.
        facts: what it says besides.
        cohort_size: clients that train at once; None means all. It decides the CPU threads of each, so
            that a client's result does not depend on who else is asked.
        on_reply: called after each reply, for progress.
        client_app: what the nodes run.
    """

    def __init__(
        self,
        num_clients: int,
        device: str = "auto",
        on_reply: Callable[[], None] = lambda: None,
        client_app: ClientApp = client.app.app,
        facts: Mapping[str, Scalar] = MappingProxyType({}),
        cohort_size: int | None = None,
    ) -> None:
        # Flower's Message constructor reads who is speaking from here.
        TaskIdentity.run_id = _RUN_ID
        TaskIdentity.node_id = _SERVER_NODE_ID
        TaskIdentity.task_id = 1
        self._run = Run.create_empty(_RUN_ID)
        self._client_app = client_app
        self._on_reply = on_reply
        self._cohort_size = cohort_size or num_clients
        self._trainers: Trainers | None = None
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _SERVER_NODE_ID + 1 + partition: Context(
                run_id=_RUN_ID,
                node_id=_SERVER_NODE_ID + 1 + partition,
                node_config={
                    wire.PARTITION_ID: partition,
                    wire.NUM_PARTITIONS: num_clients,
                    wire.DEVICE: device,
                    **facts,
                },
                state=RecordDict(),
                run_config={},
            )
            for partition in range(num_clients)
        }

    def close(self) -> None:
        """End the workers of the clients."""
        if self._trainers is not None:
            self._trainers.close()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer the messages at once; the replies wait to be pulled."""
        message_ids = []
        for reply in self._answer(messages):
            self._replies[reply.metadata.reply_to_message_id] = reply
            message_ids.append(reply.metadata.reply_to_message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = [message_id for message_id in message_ids if message_id in self._replies]
        return [self._replies.pop(message_id) for message_id in waiting]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer the messages; nothing is in flight, so a timeout has nothing to wait for."""
        return list(self._answer(messages))

    def _answer(self, messages: Iterable[Message]) -> Iterator[Message]:
        questions = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            questions.append((message, self._contexts[message.metadata.dst_node_id]))
        for reply in self._replies_to(questions):
            reply.metadata.__dict__["_message_id"] = str(uuid4())
            self._on_reply()
            yield reply

    def _replies_to(self, questions: Sequence[tuple[Message, Context]]) -> Iterator[Message]:
        to_train = self._client_app is client.app.app and all(
            message.metadata.message_type == MessageType.TRAIN for message, _ in questions
        )
        if to_train:
            yield from train_together(questions, self._own_trainers())
            return
        for message, context in questions:
            try:
                reply = self._client_app(message, context)
                if not isinstance(reply, Message):
                    raise TypeError(f"the ClientApp returned {reply!r} instead of a Message")
            except (Exception, SystemExit) as error:
                # As in a deployment: a client that raises answers with an error, and the round goes on.
                reason = f"{type(error).__name__}: {error}"
                reply = Message(
                    Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message
                )
            yield reply

    def _own_trainers(self) -> Trainers:
        if self._trainers is None:  # by the first round the run has set its threads
            threads = torch.get_num_threads()
            workers = min(threads, self._cohort_size)
            self._trainers = Trainers(workers, threads // workers, is_kept=True)
        return self._trainers
