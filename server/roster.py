"""Who is connected: a stable client number for every Flower node."""

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Error, Message, MessageType, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedsmooth_core import wire
from fedsmooth_core.errors import TrainingError
from server.exchange import Questions, collect, send
from server.replies import readable

_POLL_SECONDS = 0.5
_QUESTION_SECONDS = 3600.0  # how long a node may be busy with something else
_ASK_AGAIN_SECONDS = 60.0  # whoever runs a refused device may have mended it
_LOST_SECONDS = 120.0  # a SuperNode may drop a question without a word, so it is asked once more


class Roster:
    """Maps client numbers to Flower node ids, by asking each new node who it is.

    A node that has a ``partition-id`` is the client of that number. Any other node (a real device with its
    own data, one of many equal containers) is given a number, and keeps it for as long as its id is known:
    a free number that no node ever had, or else the smallest that belongs to a node that is gone.

    Args:
        num_clients: numbers run from 0 to ``num_clients - 1``.
        remembered: {client: node id}, as an interrupted run left it.
        remember: called with {client: node id} of all nodes known whenever that changes.
    """

    def __init__(
        self,
        num_clients: int,
        remembered: Mapping[int, int] | None = None,
        remember: Callable[[dict[int, int]], None] = lambda clients: None,
    ) -> None:
        self.num_clients = num_clients
        self._client_of = {node: client for client, node in (remembered or {}).items()}
        self._remember = remember
        self._says: dict[int, int | None] = {}
        self._claimed: dict[int, int] = {}
        self._questions: Questions = {}
        self._asked_at: dict[int, float] = {}
        self._refused: dict[int, tuple[str, float]] = {}

    def wait(
        self, grid: Grid, num_wanted: int, num_needed: int, patience: float, timeout: float
    ) -> dict[int, int]:
        """Return {client: node id} of all that are connected, once they are ``num_wanted``.

        After ``patience`` seconds ``num_needed`` will do.

        Raises:
            TrainingError: when not even those are there after ``timeout`` seconds.
        """
        started = time.monotonic()
        said = -1
        while len(nodes := self.refresh(grid)) < num_wanted:
            waited = time.monotonic() - started
            if len(nodes) >= num_needed and waited > patience:
                break
            if waited > timeout:
                reasons = {reason for reason, _ in self._refused.values()}
                also = f" Nodes were refused: {'; '.join(sorted(reasons))}." if reasons else ""
                raise TrainingError(
                    f"Only {len(nodes)} of the {num_needed} clients that a round needs connected within "
                    f"{timeout:g} seconds: start the missing ones, or set partition.num_clients, "
                    f"federation.quorum or federation.connect_timeout_seconds.{also}"
                )
            if len(nodes) != said:
                said = len(nodes)
                log(INFO, "Waiting for clients: %d of %d connected.", said, num_wanted)
            time.sleep(_POLL_SECONDS)
        return nodes

    def refresh(self, grid: Grid) -> dict[int, int]:
        """Return {client: node id} of the nodes that are connected now and have said who they are."""
        connected = set(grid.get_node_ids())
        # A node that left may come back as something else: it is asked again.
        self._says = {node: said for node, said in self._says.items() if node in connected}
        now = time.monotonic()
        not_asked = connected - self._says.keys()
        not_asked -= {
            question.dst_node_id
            for question in self._questions.values()
            if self._asked_at[question.dst_node_id] > now - _LOST_SECONDS
        }
        not_asked -= {
            node for node, (_, since) in self._refused.items() if since > now - _ASK_AGAIN_SECONDS
        }
        self._asked_at |= dict.fromkeys(not_asked, now)
        self._questions |= send(
            grid,
            [
                Message(RecordDict(), node, MessageType.QUERY, ttl=_QUESTION_SECONDS)
                for node in sorted(not_asked)
            ],
        )
        collect(grid, self._questions, self._note)
        before = dict(self._client_of)
        self._seat_partitions()
        self._hand_out_numbers(connected)
        if self._client_of != before:
            self._remember({client: node for node, client in self._client_of.items()})
        return {
            client: node
            for node, client in self._client_of.items()
            if node in self._says and node in connected
        }

    def client_of(self, node: int) -> int | None:
        """Return the number of a node, which may be gone by now."""
        return self._client_of.get(node)

    def _note(self, question: Metadata, reply: Message | Error) -> None:
        """Take down what a node says it is, after checking that it can be."""
        node = question.dst_node_id
        if isinstance(reply, Error):
            self._refuse(node, reply.reason or f"Flower's error {reply.code}")
        elif reply.has_error():
            # What Flower makes up for a lost node has another source; the node is asked again.
            if reply.metadata.src_node_id == node:
                self._refuse(node, reply.error.reason or f"Flower's error {reply.error.code}")
        else:
            answer = reply.content.config_records.get(wire.CONFIG, ConfigRecord())
            partition, total = answer.get(wire.PARTITION_ID), answer.get(wire.NUM_PARTITIONS)
            if partition is None:
                self._says[node] = None
            elif total != self.num_clients:
                self._refuse(
                    node,
                    f"it is one of {total!r} partitions, but partition.num_clients={self.num_clients}: "
                    f"start {self.num_clients} nodes (in Flower's simulation: --federation-config "
                    f"'num-supernodes={self.num_clients}') or set partition.num_clients={total!r}",
                )
            elif type(partition) is not int or not 0 <= partition < self.num_clients:
                self._refuse(node, f"its {wire.PARTITION_ID}={partition!r} is no partition")
            elif self._claimed.setdefault(node, partition) != partition:
                # Or it could drive others off their numbers, one after another.
                self._refuse(
                    node,
                    f"it was {wire.PARTITION_ID}={self._claimed[node]} before, and is "
                    f"{wire.PARTITION_ID}={partition} now: a node keeps its partition for the whole run",
                )
            else:
                self._says[node] = partition

    def _seat_partitions(self) -> None:
        """Give every node with a partition of its own that number, whoever had it."""
        for node, partition in sorted(self._says.items()):
            if partition is None or self._client_of.get(node) == partition:
                continue
            holders = [other for other, client in self._client_of.items() if client == partition]
            if any(self._says.get(other) == partition for other in holders):
                del self._says[node]
                self._refuse(node, f"{wire.PARTITION_ID}={partition!r} is another node's already")
                continue
            for other in holders:
                del self._client_of[other]
            self._client_of[node] = partition

    def _hand_out_numbers(self, connected: Collection[int]) -> None:
        """Give every other node a number, as long as there is one."""
        for node in sorted(self._says.keys() - self._client_of.keys()):
            node_of = {client: other for other, client in self._client_of.items()}
            never_used = (k for k in range(self.num_clients) if k not in node_of)
            of_the_gone = (k for k, other in sorted(node_of.items()) if other not in connected)
            number = next(itertools.chain(never_used, of_the_gone), None)
            if number is None:
                return
            self._client_of.pop(node_of.get(number, -1), None)
            self._client_of[node] = number

    def _refuse(self, node: int, reason: str) -> None:
        reason = readable(reason)
        log(WARNING, "Node %d is left out: %s.", node, reason)
        self._refused[node] = (reason, time.monotonic())
