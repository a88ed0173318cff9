"""The in-process simulation: a Flower ``Grid`` whose nodes live in this process.

It drives the same ServerApp, strategy and ClientApp as a deployment, and answers a round's messages as
one batch. The one place that joins both ends.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import client.app
from fedsmooth_core import wire

_RUN_ID = 1
_SERVER_NODE_ID = 1


def quiet_flower() -> None:
    """Keep Flower's own log to warnings: the simulation shows progress of its own."""
    logging.getLogger("flwr").setLevel(logging.WARNING)


class InProcessGrid(Grid):
    """A Grid with ``num_clients`` simulated nodes that share this process and its device.

    Args:
        num_clients: nodes; node 2 + k is the client of partition k.
        device: what each node's configuration says about its accelerator.
        on_reply: called after each reply, for progress.
        client_app: what the nodes run.
    """

    def __init__(
        self,
        num_clients: int,
        device: str = "auto",
        on_reply: Callable[[], None] = lambda: None,
        client_app: ClientApp = client.app.app,
    ) -> None:
        # Flower's Message constructor reads who is speaking from here.
        TaskIdentity.run_id = _RUN_ID
        TaskIdentity.node_id = _SERVER_NODE_ID
        TaskIdentity.task_id = 1
        self._run = Run.create_empty(_RUN_ID)
        self._client_app = client_app
        self._on_reply = on_reply
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _SERVER_NODE_ID + 1 + partition: Context(
                run_id=_RUN_ID,
                node_id=_SERVER_NODE_ID + 1 + partition,
                node_config={
                    wire.PARTITION_ID: partition,
                    wire.NUM_PARTITIONS: num_clients,
                    wire.DEVICE: device,
                },
                state=RecordDict(),
                run_config={},
            )
            for partition in range(num_clients)
        }

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
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            try:
                reply = self._client_app(message, self._contexts[message.metadata.dst_node_id])
                if not isinstance(reply, Message):
                    raise TypeError(f"the ClientApp returned {reply!r} instead of a Message")
            except (Exception, SystemExit) as error:
                # As in a deployment: a client that raises answers with an error, and the round goes on.
                reason = f"{type(error).__name__}: {error}"
                reply = Message(
                    Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message
                )
            reply.metadata.__dict__["_message_id"] = str(uuid4())
            self._on_reply()
            yield reply
