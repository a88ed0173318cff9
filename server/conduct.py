"""Who has failed rounds repeatedly, and is left out for a while."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


class Conduct:
    """Counts refusals per client; every ``strikes`` of them cost ``suspension_rounds`` rounds.

    It follows from the refusals of the past rounds alone, so a resumed run leaves out the same clients.
    """

    def __init__(self, strikes: int, suspension_rounds: int) -> None:
        self.strikes = strikes
        self.suspension_rounds = suspension_rounds
        self.offences: Counter[int] = Counter()
        self._last_round_out: dict[int, int] = {}

    def note(self, server_round: int, client: int) -> bool:
        """Count an offence of this round; return whether it was one too many."""
        self.offences[client] += 1
        is_suspended = self.offences[client] % self.strikes == 0 and self.suspension_rounds > 0
        if is_suspended:
            self._last_round_out[client] = server_round + self.suspension_rounds
        return is_suspended

    def suspended(self, server_round: int) -> set[int]:
        """Return the clients that are left out of this round."""
        return {client for client, last in self._last_round_out.items() if server_round <= last}

    def replay(self, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Count the offences of recorded rounds, given their lines of the metrics."""
        for line in rounds:
            for refusal in line.get("refused", []):
                self.note(int(line["round"]), int(refusal["client"]))
