"""Who is connected: a stable client number for every Flower node."""

import time
from collections.abc import Collection, Iterable
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fedsmooth_core import wire
from fedsmooth_core.errors import ConfigError

_POLL_SECONDS = 1.0


class Roster:
    """Maps client numbers to Flower node ids, by asking each new node once.

    A node that has a ``partition-id`` is the client of that number; a node without one (a real device
    with its own data) gets the smallest free number, in order of node ids, and keeps it while known. A
    node that comes back under another id takes its partition again once the old one is gone.
    """

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self._client_of: dict[int, int] = {}
        self._refused: set[int] = set()

    def wait(self, grid: Grid, num_wanted: int, timeout: float) -> dict[int, int]:
        """Return {client: node id} of all that are connected, once they are ``num_wanted``.

        Raises:
            ConfigError: when they are not within ``timeout`` seconds, or a node belongs to a
                federation of another size.
        """
        end = time.monotonic() + timeout
        while len(nodes := self.refresh(grid)) < num_wanted:
            if time.monotonic() > end:
                raise ConfigError(
                    f"Only {len(nodes)} of {num_wanted} clients connected within {timeout:g} "
                    "seconds: start the missing ones, or set partition.num_clients or "
                    "federation.connect_timeout_seconds."
                )
            log(INFO, "Waiting for clients: %d of %d connected.", len(nodes), num_wanted)
            time.sleep(_POLL_SECONDS)
        return nodes

    def refresh(self, grid: Grid) -> dict[int, int]:
        """Return {client: node id} of the nodes that are connected now."""
        connected = list(grid.get_node_ids())
        known = self._client_of.keys() | self._refused
        unknown = [node for node in connected if node not in known]
        if unknown:
            self._introduce(unknown, connected, grid)
        return {self._client_of[node]: node for node in connected if node in self._client_of}

    def _introduce(self, nodes: Iterable[int], connected: Collection[int], grid: Grid) -> None:
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
        without_number = []
        for reply in grid.send_and_receive(questions, timeout=60):
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._refuse(node, str(reply.error.reason))
                continue
            answer = reply.content.config_records.get(wire.CONFIG, ConfigRecord())
            partition, total = answer.get(wire.PARTITION_ID), answer.get(wire.NUM_PARTITIONS)
            if partition is None:
                without_number.append(node)
            elif total != self.num_clients:
                raise ConfigError(
                    f"The connected nodes are {total!r} partitions, but partition.num_clients="
                    f"{self.num_clients}: start {self.num_clients} nodes (Flower's simulation: "
                    f"--federation-config 'num-supernodes={self.num_clients}') or set "
                    f"partition.num_clients={total!r}."
                )
            elif not isinstance(partition, int) or not 0 <= partition < self.num_clients:
                self._refuse(node, f"its {wire.PARTITION_ID}={partition!r} is no partition")
            elif any(self._client_of.get(other) == partition for other in connected):
                self._refuse(node, f"{wire.PARTITION_ID}={partition!r} is another node's already")
            else:
                gone = [other for other, client in self._client_of.items() if client == partition]
                for other in gone:
                    del self._client_of[other]
                self._client_of[node] = partition
        taken = set(self._client_of.values())
        free = (number for number in range(self.num_clients) if number not in taken)
        for node, number in zip(sorted(without_number), free, strict=False):
            self._client_of[node] = number

    def _refuse(self, node: int, reason: str) -> None:
        log(WARNING, "Node %d is left out: %s", node, reason)
        self._refused.add(node)
