"""The ledger's arithmetic: makes counters into bytes per client and round, and finds out where the bytes went.

Bytes per round come from the connections of :mod:`server_app.ledger.connections`.

Reconciliation: each category is measured without looking at the total. ``unexplained`` is the counter minus all of
    them; nothing is scaled to fit, so it may be negative. Only one number is derived from the total, an integer: how
    many polls and heartbeats fell between the calls of a message.

* Headers, acknowledgements and retransmissions are counters of their own.
* Polling, heartbeats, pings and connection setup are the counters' changes while no message was under way, and small
  lone jumps during one. Larger jumps never count as these.
* Tensors, message framing, Flower's control messages and the bundle are serialised sizes.
* A gRPC call's overhead (HTTP/2 headers with the SuperNode's key and signature, frames, TLS record) is the measured
  cost of the lone polls of this run, less their protobuf; so are the pings that gRPC sends when calls begin after a
  pause. Flower's source says how many calls a message makes, and that a poll follows each answer at once.
* Only TLS records beyond a call's first have a formula: 22 bytes for each 16 KiB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from server_app.ledger.call_costs import CallCost, call_cost
from server_app.ledger.connections import OTHER, Link, join, segments
from server_app.ledger.rows import (
    ActivityRow,
    BundleRow,
    ConnectionRow,
    MessageRow,
    ReadingRow,
    SmallCallRow,
    TensorRow,
)

FRAME_HEADER, TLS_RECORD = 9, 22  # RFC 9113, 4.1; RFC 8446, 5.2: header 5, content type 1, tag 16
PING = FRAME_HEADER + 8  # RFC 9113, 6.7
BUNDLE_CALLS = 2
POLL_INTERVAL = 3.0  # seconds until Flower's SuperNode polls again after a poll that brought nothing

SKETCH = "sketch"
"""Kind of a tensor that is not an adapter: a sketch of the gradient on a client's data."""
CATEGORIES = (
    "tensors",
    "sketches",
    "message framing",
    "Flower control",
    "app bundle",
    "gRPC calls",
    "TLS records",
    "polling, heartbeats",
    "HTTP/2 pings",
    "connection setup",
    "retransmissions",
    "TCP/IP headers",
    "acknowledgements",
    "unexplained",
)

# Kinds of the sampler's activity that are a category by themselves.
BY_COUNTER = {"idle": "polling, heartbeats", "ping": "HTTP/2 pings", "setup": "connection setup"}


@dataclass(frozen=True)
class ClientRound:
    """Bytes of one client, round and direction. ``wire`` is the sender's end (or what ``source`` says)."""

    round: int
    client: str
    direction: str
    tensor: int
    message: int
    wire: int | None
    other_end: int | None
    source: str


class Accounts:
    """A ledger's rows at one moment; see :mod:`server_app.ledger.store` for the tables."""

    def __init__(
        self,
        meta: dict[str, str],
        tensors: list[TensorRow],
        messages: list[MessageRow],
        bundles: list[BundleRow],
        readings: list[ReadingRow],
        connections: list[ConnectionRow],
        activity: list[ActivityRow],
        small_calls: list[SmallCallRow],
    ) -> None:
        self.meta = meta
        self.tensors = tensors
        self.messages = messages
        self.bundles = bundles
        self.readings = readings
        self.activity = activity
        self.small_calls = small_calls
        links = join(readings, connections)
        own = [link for link in links if link.client != OTHER]
        found = {link.client for link in own}
        # Other SuperNodes may share the Fleet port. The rest may be this run's only if one of its clients could
        # not read its own end, and none is behind address translation.
        missing = {row.client for row in messages} - found
        self.counts_other = bool(missing) and all(link.at_server for link in own)
        self.links = links if self.counts_other else own
        self.covered = found | (missing if self.counts_other else set())

    # ---------------------------------------------------------------------------------------------- per round

    def rows(self) -> list[ClientRound]:
        """One row per client, round and direction, in that order."""
        tensor, message = defaultdict[tuple[int, str, str], int](int), defaultdict[tuple[int, str, str], int](int)
        for row in self.tensors:
            tensor[row.round, row.client, row.direction] += row.bytes
        for sent in self.messages:
            message[sent.round, sent.client, sent.direction] += sent.bytes
        wire, other, source = self._wire()
        keys = sorted({*tensor, *message, *wire}, key=lambda key: (key[0], key[1] == OTHER, key[1], key[2] == "down"))
        return [
            ClientRound(
                round=key[0],
                client=key[1],
                direction=key[2],
                tensor=tensor[key],
                message=message[key],
                wire=wire.get(key),
                other_end=other.get(key),
                source=source.get(key, ""),
            )
            for key in keys
        ]

    def totals(self) -> dict[str, dict[str, int | None]]:
        """Sums over all clients and rounds."""
        rows = self.rows()
        totals: dict[str, dict[str, int | None]] = {}
        for direction in ("up", "down"):
            mine = [row for row in rows if row.direction == direction]
            wires = [row.wire for row in mine if row.wire is not None]
            totals[direction] = {
                "tensor": sum(row.tensor for row in mine),
                "message": sum(row.message for row in mine),
                "wire": sum(wires) if wires else None,
            }
        return totals

    def not_measured(self) -> dict[str, str]:
        """Clients that could not read the wire at the last reading, and why; the server's name is ``server``.

        An earlier reading without a connection (because one was being made again) loses nothing: counters only grow,
        and the last counts of a broken connection are lost in any case.
        """
        last: dict[str, str] = {}
        for row in self.readings:
            last[row.client if row.end == "client" else "server"] = row.not_measured
        return {who: why for who, why in last.items() if why}

    def unjoined(self) -> list[str]:
        """Clients whose connection the server does not see under the client's own address (NAT, or no server end)."""
        return sorted({link.client for link in self.links if not link.at_server})

    def _wire(self) -> tuple[dict[tuple[int, str, str], int], dict[tuple[int, str, str], int], dict[Any, str]]:
        wire, other = defaultdict[tuple[int, str, str], int](int), defaultdict[tuple[int, str, str], int](int)
        source: dict[tuple[int, str, str], str] = {}
        for link in self.links:
            for direction, pieces in (("up", link.up()), ("down", link.down())):
                for round_, piece, end in pieces:
                    wire[round_, link.client, direction] += piece.wire
                    source[round_, link.client, direction] = end
            if link.at_client and link.at_server:
                for round_, piece in link.up_at_server():
                    other[round_, link.client, "up"] += piece.wire
                for round_, piece in link.down_at_client():
                    other[round_, link.client, "down"] += piece.wire
        return wire, other, source

    # -------------------------------------------------------------------------------------------- where it went

    def reconciliation(self) -> dict[str, dict[str, int]]:
        """Bytes per direction and category, in the order of ``CATEGORIES``; empty if the wire was not measured."""
        return {direction: self._reconcile(direction) for direction in ("up", "down")}

    def unexplained_fraction(self) -> float | None:
        """The larger direction's ``|unexplained| / wire``; None if the wire was not measured."""
        fractions = [
            abs(categories["unexplained"]) / max(1, sum(categories.values()))
            for categories in self.reconciliation().values()
            if categories
        ]
        return max(fractions, default=None)

    def call_overhead(self, client: str = "") -> CallCost | None:
        """The cost of one gRPC call beyond its protobuf: the median lone poll of ``client``, else of all clients."""
        keys = {link.key for link in self.links if link.client == client and link.at_server}
        return call_cost(self.small_calls, keys, PING + self._record)

    @property
    def _record(self) -> int:
        """The bytes that a TLS record adds to its content."""
        return TLS_RECORD if self.meta.get("tls") == "1" else 0

    @cached_property
    def _unseen(self) -> dict[str, int]:
        """How many of each client's polls and heartbeats fell between the calls of its messages.

        There the sampler cannot tell them apart. But each adds some 590 bytes up and 90 down. So the bytes that are
        missing from a round, up minus down, are a multiple of 500; pings are equal both ways and cancel out. The number
        counts only if less than half a call is left over in either direction; everything else stays unexplained. A
        call that ends just after the boundary of two rounds is one more in one round and one less in the other.
        """
        by_client = defaultdict[str, list[Link]](list)
        for link in self.links:
            if link.at_server:
                by_client[link.client].append(link)
        links = {client: found[0] for client, found in by_client.items() if len(found) == 1}
        costs = {client: cost for client in links if (cost := self.call_overhead(client)) is not None}
        clients = {links[client].key: client for client in costs}
        missing = defaultdict[tuple[str, int], list[float]](lambda: [0.0, 0.0])  # up and down, by client and round
        seconds = defaultdict[tuple[str, int], float](float)

        def book(client: str, round_: int, up: float, down: float) -> None:
            missing[client, round_][0] += up
            missing[client, round_][1] += down

        for client in costs:
            for round_, (up, down), duration in links[client].exchanged():
                book(client, round_, up, down)
                seconds[client, round_] += duration
        for row in self._carried():
            if (cost := costs.get(row.client)) is not None:
                calls = [row.calls * cost.call[end] + cost.pings[end] for end in (0, 1)]
                own, other = row.bytes + row.tls_records * self._record, row.control_bytes
                up, down = (own, other) if row.direction == "up" else (other, own)
                book(row.client, row.round, -up - calls[0], -down - calls[1])
                if row.direction == "up":
                    poll = cost.poll
                    book(row.client, row.round, -poll[0], -poll[1])
        first = {client: min(round_ for name, round_ in missing if name == client) for client, _ in missing}
        for bundle in self._fetched_bundles():
            if (cost := costs.get(bundle.client)) is not None:
                records = bundle.tls_records * self._record
                calls = [BUNDLE_CALLS * cost.call[end] for end in (0, 1)]
                round_ = first.get(bundle.client, 0)
                book(bundle.client, round_, -bundle.up - calls[0], -bundle.down - records - calls[1])
        for seen in self.activity:
            client = clients.get(seen.key, "")
            if client and seen.kind in BY_COUNTER:
                book(client, seen.round, -seen.up, -seen.down)
        counts = defaultdict[str, int](int)
        for (client, round_), left in missing.items():
            poll = costs[client].poll
            found = round((left[0] - left[1]) / (poll[0] - poll[1]))
            possible = -1 <= found <= 2 + seconds[client, round_] / POLL_INTERVAL
            if possible and all(abs(left[end] - found * poll[end]) < poll[0] / 2 for end in (0, 1)):
                counts[client] += found
        return counts

    def _reconcile(self, direction: str) -> dict[str, int]:
        pieces = [(link, piece) for link in self.links for _, piece, _ in getattr(link, direction)()]
        if not pieces:
            return {}
        found = dict.fromkeys(CATEGORIES, 0)
        for _, piece in pieces:
            found["retransmissions"] += piece.retransmitted
        for link in self.links:
            count, data, header = segments(link, direction)
            found["TCP/IP headers"] += header * data
            found["acknowledgements"] += header * (count - data)
        payload = sum(piece.payload for _, piece in pieces)
        tensors = {(tensor.client, tensor.round, tensor.direction, tensor.kind): 0 for tensor in self.tensors}
        for tensor in self.tensors:
            tensors[tensor.client, tensor.round, tensor.direction, tensor.kind] += tensor.bytes
        own, control, tls_records, meant, sketched = 0, 0, 0, 0, 0
        calls, polls, groups = (defaultdict[str, int](int) for _ in range(3))
        for row in self._carried():
            calls[row.client] += row.calls
            groups[row.client] += 1
            # After each answer the SuperNode polls at once, too close to the answer to be seen apart.
            polls[row.client] += row.direction == "up"
            if row.direction == direction:
                own += row.bytes
                tls_records += row.tls_records
                meant += tensors.pop((row.client, row.round, direction, row.kind), 0)
                sketched += tensors.pop((row.client, row.round, direction, SKETCH), 0)
            else:
                control += row.control_bytes
        for bundle in self._fetched_bundles():
            found["app bundle"] += bundle.to(direction)
            calls[bundle.client] += BUNDLE_CALLS
            tls_records += bundle.tls_records if direction == "down" else 0
        found["tensors"] = meant
        found["sketches"] = sketched
        found["message framing"] = own - meant - sketched
        found["Flower control"] = control
        found["TLS records"] = tls_records * self._record
        counted = {link.key for link in self.links if link.at_server}
        for seen in self.activity:
            if seen.kind in BY_COUNTER and seen.key in counted:
                found[BY_COUNTER[seen.kind]] += seen.to(direction)
        for client in calls:
            overhead = self.call_overhead(client)
            if overhead is not None:  # else it stays unexplained
                end = 0 if direction == "up" else 1
                found["gRPC calls"] += round(calls[client] * overhead.call[end])
                found["HTTP/2 pings"] += round(groups[client] * overhead.pings[end])
                found["polling, heartbeats"] += round(
                    (polls[client] + self._unseen.get(client, 0)) * overhead.poll[end]
                )
        headers = found["TCP/IP headers"] + found["acknowledgements"]
        found["unexplained"] = payload + headers - sum(found.values())
        return found

    def _carried(self) -> Iterator[MessageRow]:
        """Messages whose bytes are inside the counted wire."""
        alone: dict[str, list[tuple[int, str]]] = {client: [] for client in self.unjoined()}
        for reading in self.readings:
            if reading.end == "client" and reading.client in alone:
                alone[reading.client].append((reading.round, reading.kind))
        answered = {(row.client, row.round, row.kind) for row in self.messages if row.direction == "up"}
        wire, _, _ = self._wire()
        for row in self.messages:
            client, what = row.client, (row.round, row.kind)
            if client not in self.covered:
                continue
            if client in alone:
                # Counting starts when the first message has arrived and ends before the last answer.
                inside = alone[client][1:] if row.direction == "down" else alone[client][:-1]
                if what not in inside:
                    continue
            elif row.direction == "down" and (client, *what) not in answered:
                fetched = wire.get((row.round, client, "down"))
                if fetched is not None and fetched < row.bytes:
                    continue  # the SuperNode never fetched it
            yield row

    def _fetched_bundles(self) -> list[BundleRow]:
        """One per fetch: a SuperNode that was started again fetches the bundle again, on a connection of its own."""
        alone = set(self.unjoined())
        rows = [row for row in self.bundles if row.client in self.covered and row.client not in alone]
        sent = defaultdict[tuple[str, int, str], int](int)
        for message in self.messages:
            if message.direction == "down":
                sent[message.client, message.round, message.kind] += message.bytes
        again = []
        for row in rows:
            later = [link.at_client[0] for link in self.links if link.client == row.client and link.at_client][1:]
            for first in later:  # all bytes up to and with the connection's first message, minus that message
                arrived = first.bytes_received - sent[row.client, first.round, first.kind]
                again += [row] if arrived >= row.down else []
        return rows + again
