"""Clients that were silent or refused several times in a row are asked less often, until one answer counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server_app.run.clients.client_status import LATE, OK, REJECTED, RESTED, ClientRecord
from strategies.framework.exchange import Client

LONGEST_REST = 16
"""Longest rest of a client, in rounds."""


class Strikes:
    """How often each client has failed in a row, and in which round it is asked again.

    The first rest is one round, each further one twice as long, at most :data:`LONGEST_REST`. An answer that counts
    clears all strikes. A client that reports a failure, or whose node is gone, costs no waiting and gets no strike. Nor
    does a client that a quorum did not wait for: it may only be slow.

    Args:
        allowed: rounds in a row without a usable answer before a client rests; 0: none ever rests.
        saved: what :meth:`saved` gave.
    """

    def __init__(self, allowed: int, saved: Mapping[str, Sequence[int]] | None = None) -> None:
        self.allowed = allowed
        self._in_a_row = {name: (int(count), int(again)) for name, (count, again) in (saved or {}).items()}

    def due(self, round_: int, clients: list[Client], least: int) -> list[Client]:
        """Clients that may be asked, in order; at least ``least``, if need be those whose rest ends soonest."""
        resting = sorted((self._again(client.id), client.id) for client in clients if self._again(client.id) > round_)
        needed = max(0, least - (len(clients) - len(resting)))
        left_out = {name for _, name in resting[needed:]}
        return [client for client in clients if client.id not in left_out]

    def resting(self, clients: Sequence[Client], due: Sequence[Client]) -> dict[str, ClientRecord]:
        """Records of the clients that are here and are not asked."""
        asked = {client.id for client in due}
        return {
            client.id: {
                "status": RESTED,
                "reason": f"not asked after {self._in_a_row[client.id][0]} rounds in a row without a usable answer; "
                f"again in round {self._again(client.id)}",
            }
            for client in clients
            if client.id not in asked
        }

    def book(self, round_: int, records: Mapping[str, ClientRecord]) -> None:
        """Note the outcomes of the clients that were asked in a round."""
        for name, record in records.items():
            if record["status"] == OK:
                self._in_a_row.pop(name, None)
            elif record["status"] in (LATE, REJECTED) and self.allowed and not record.get("cut_off"):
                count = self._in_a_row.get(name, (0, 0))[0] + 1
                beyond = count - self.allowed
                rest = min(2 ** min(beyond, 16), LONGEST_REST) if beyond >= 0 else 0
                self._in_a_row[name] = count, round_ + 1 + rest

    def saved(self) -> dict[str, list[int]]:
        """For a checkpoint: strikes in a row, and the round in which the client is asked again."""
        return {name: list(entry) for name, entry in sorted(self._in_a_row.items())}

    def _again(self, name: str) -> int:
        return self._in_a_row.get(name, (0, 0))[1]
