"""Ask nodes, and collect what comes until enough is in or the deadline has passed."""

import time
from collections.abc import Callable, Iterable

import httpx
from flwr.app import Error, Message, Metadata
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

POLL_SECONDS = 0.2  # Flower's own `send_and_receive` looks every 3 s

CLOCK_TOLERANCE_SECONDS = 300.0
"""A message lives this much longer than its round's deadline: a device's clock may be wrong by as much,
and Flower has the device count down."""

Questions = dict[str, Metadata]
"""What was asked and is not answered yet, by message id."""

Receive = Callable[[Metadata, Message | Error], None]
"""Takes the metadata of a question, and its reply or what is known about its loss."""


def send(grid: Grid, messages: Iterable[Message]) -> Questions:
    """Send the messages; return those that Flower took."""
    messages = list(messages)
    if not messages:
        return {}
    # Flower sets a message's id when it is sent: the metadata object is kept, not a copy.
    asked = [message.metadata for message in messages]
    sent = set(grid.push_messages(messages))
    return {question.message_id: question for question in asked if question.message_id in sent}


def collect(
    grid: Grid,
    waiting: Questions,
    receive: Receive,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Hand over the replies that have come, and take their questions out of ``waiting``.

    Raises:
        httpx.HTTPError: when the SuperLink cannot be reached, after Flower's own retries.
    """
    for message_id, question in list(waiting.items()):
        if is_over():
            return
        for reply in _pull(grid, message_id):
            del waiting[message_id]
            receive(question, reply)


def _pull(grid: Grid, message_id: str) -> list[Message | Error]:
    # One at a time: a reply that cannot even be taken apart must not take others with it.
    try:
        return list(grid.pull_messages([message_id]))
    except httpx.HTTPError:
        raise
    except Exception as error:
        # Whatever bytes a hostile node stores as its reply, Flower's decoder raises many kinds of errors.
        reason = f"its reply cannot be read ({type(error).__name__}: {error})"
        return [Error(ErrorCode.UNKNOWN, reason)]


class Exchange:
    """The rounds' questions and answers over a run.

    A node works on one message at a time. Who has not answered an old question is still busy with it, so
    late answers are looked for as well: they are no use for a model that has moved on, but they say that
    the node is free again.
    """

    def __init__(self, receive_late: Receive) -> None:
        self._receive_late = receive_late
        self._late: Questions = {}

    @property
    def busy_nodes(self) -> set[int]:
        """Nodes that owe an answer to a question of an earlier round or attempt."""
        return {question.dst_node_id for question in self._late.values()}

    def collect_late(self, grid: Grid) -> None:
        """Look for late answers without asking anything."""
        collect(grid, self._late, self._receive_late)

    def ask(
        self,
        grid: Grid,
        messages: Iterable[Message],
        deadline_seconds: float,
        receive: Receive,
        is_over: Callable[[], bool],
    ) -> dict[str, float]:
        """Send the messages and hand over each reply as it comes.

        It is over when all have answered, when ``is_over()``, or when the deadline has passed.

        Returns:
            Seconds spent on ``send`` and ``receive``; the rest went by waiting.
        """
        started = time.monotonic()
        messages = list(messages)
        waiting = send(grid, messages)
        sent = time.monotonic()
        for question in (message.metadata for message in messages):
            if question.message_id not in waiting:
                receive(question, Error(ErrorCode.UNKNOWN, "Flower did not take the message to it"))
        end, receiving = sent + deadline_seconds, 0.0
        while True:
            looked = time.monotonic()
            collect(grid, waiting, receive, is_over)
            self.collect_late(grid)
            receiving += time.monotonic() - looked
            left = end - time.monotonic()
            if not waiting or is_over() or left <= 0:
                break
            time.sleep(min(POLL_SECONDS, left))
        self._late |= waiting
        return {"send": sent - started, "receive": receiving}
