"""Which nodes have failed rounds repeatedly, and are left out for a while."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


class Conduct:
    """Counts the offences of Flower nodes; every ``strikes`` of them cost ``suspension_rounds`` rounds.

    By node, not by client number: a number can pass to another node. It follows from the recorded
    rounds alone, so a resumed run leaves out the same nodes.
    """

    def __init__(self, strikes: int, suspension_rounds: int) -> None:
        self.strikes = strikes
        self.suspension_rounds = suspension_rounds
        self._offences: Counter[int] = Counter()
        self._last_round_out: dict[int, int] = {}

    def note(self, server_round: int, node: int) -> bool:
        """Count an offence of this round; return whether it was one too many."""
        self._offences[node] += 1
        is_suspended = self._offences[node] % self.strikes == 0 and self.suspension_rounds > 0
        if is_suspended:
            self._last_round_out[node] = server_round + self.suspension_rounds
        return is_suspended

    def suspended(self, server_round: int) -> set[int]:
        """Return the nodes that are left out of this round."""
        return {node for node, last in self._last_round_out.items() if server_round <= last}

    def replay(self, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Count the offences of recorded rounds, given their lines of the metrics."""
        for line in rounds:
            for node in line.get("offenders", []):
                self.note(int(line["round"]), int(node))
