"""The ledger's arithmetic: from counters to bytes per client and round, and from bytes to where they went.

One TCP connection has two ends. The client's readings (taken when a message has arrived) and the server's are joined by
address and port; behind address translation they cannot be, and then the client's end counts alone, from its first
reading on. Each direction is counted at its sender; the receiver's end is shown beside it.

* up: from one arrival at the client to the next belongs to the message that arrived (its answer travels in between);
  before the first, to the first; after the last, what the server received from there on belongs to the last.
* down: from one push to the client to the next belongs to the message that was pushed.

So a sum over rounds is the run's total, by construction. What was sent before the run started is subtracted.

Reconciliation: every category is obtained without looking at the total. Headers, acknowledgements and retransmissions
are counters of their own; polling, heartbeats, pings and connection setup are what the counters did while no message
was under way; tensors, message framing, Flower's control messages and the bundle are serialised sizes. A gRPC call's
overhead (HTTP/2 headers with the SuperNode's key and signature, frames, TLS record) is the measured cost of the lone
polls of this run, less their protobuf, and so are the pings that gRPC sends along when calls begin after a pause. Only
for DATA frames beyond a call's first there is a formula: 9 bytes, with TLS 22 more. ``unexplained`` is the counter
minus all of these; nothing is scaled to fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Key = tuple[str, int, str]  # the SuperNode's address and port, and the cookie of this end's socket

OTHER = "(other)"  # connections of SuperNodes that this run's clients cannot be matched with
FRAME_HEADER, TLS_RECORD = 9, 22  # RFC 9113, 4.1; RFC 8446, 5.2: header 5, content type 1, tag 16
PING = FRAME_HEADER + 8  # RFC 9113, 6.7
BUNDLE_CALLS = 2
# Serialised request and answer with a 64-bit node id: PullMessages (nothing there), SendNodeHeartbeat.
POLL_PROTO, HEARTBEAT_PROTO = (13, 0), (22, 2)

CATEGORIES = (
    "tensors",
    "message framing",
    "Flower control",
    "app bundle",
    "gRPC calls",
    "bulk frames",
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


@dataclass(frozen=True)
class Tally:
    """One direction of one connection; ``data`` is None where the reader could not tell data segments apart."""

    payload: int = 0
    retransmitted: int = 0
    segments: int = 0
    data: int | None = 0
    header: int = 0

    @property
    def wire(self) -> int:
        """Bytes as a capture shows them."""
        return self.payload + self.header * self.segments

    def since(self, earlier: Tally) -> Tally:
        """What was added since ``earlier``."""
        data = None if self.data is None or earlier.data is None else self.data - earlier.data
        return Tally(
            self.payload - earlier.payload,
            self.retransmitted - earlier.retransmitted,
            self.segments - earlier.segments,
            data,
            self.header,
        )


def sent(row: Row) -> Tally:
    """What the reader of ``row`` sent."""
    return Tally(
        row["bytes_sent"],
        row["bytes_retransmitted"],
        row["segments_out"],
        row["data_segments_out"],
        row["header_bytes"],
    )


def received(row: Row) -> Tally:
    """What the reader of ``row`` received; retransmissions that arrived twice are not in it."""
    return Tally(row["bytes_received"], 0, row["segments_in"], row["data_segments_in"], row["header_bytes"])


@dataclass(frozen=True)
class CallCost:
    """Bytes up and down of one small gRPC call without its protobuf, and of the pings with a group of calls."""

    call: tuple[float, float]
    pings: tuple[float, float]


@dataclass(frozen=True)
class _LoneCall:
    phase: str
    key: Key
    up: int
    down: int
    pings_up: int
    pings_down: int
    count: int


@dataclass
class Link:
    """One TCP connection: its readings at both ends, in order. ``born``: it was opened during the run."""

    client: str
    at_client: list[Row] = field(default_factory=list)
    at_server: list[Row] = field(default_factory=list)
    born: bool = False

    @property
    def key(self) -> Key:
        """The SuperNode's address and port and the cookie of the SuperLink's socket."""
        row = self.at_server[0]
        return row["remote_address"], row["remote_port"], row["cookie"]

    def up(self) -> Iterator[tuple[int, Tally, str]]:
        """Pieces of what the client sent, with their round and source."""
        if not self.at_client:
            yield from ((round_, piece, "server") for round_, piece in self.up_at_server())
            return
        first, last = self.at_client[0], self.at_client[-1]
        before = self._client_base(first)
        round_ = first["round"]
        for reading in self.at_client:
            yield round_, sent(reading).since(before), "client"
            before, round_ = sent(reading), reading["round"]
        if self.at_server:
            end = received(self.at_server[-1])
            arrived = before.payload - before.retransmitted
            tail = Tally(max(0, end.payload - arrived), 0, max(0, end.segments - before.segments), None, end.header)
            yield last["round"], tail, "client"

    def _client_base(self, first: Row) -> Tally:
        """The client's counters at the start of the run; only the server was looking then."""
        if not self.at_server:
            return sent(first)
        if self.born:
            return Tally(header=first["header_bytes"])
        start = received(self.at_server[0])
        older = first["bytes_retransmitted"]
        return Tally(start.payload + older, older, start.segments, None, start.header)

    def up_at_server(self) -> Iterator[tuple[int, Tally]]:
        """Pieces of what the server received, with their round: cut where the client took its readings."""
        yield from self._cut(self.at_server, received, lambda reading: reading["event"] == "handler")

    def down(self) -> Iterator[tuple[int, Tally, str]]:
        """Pieces of what the server sent, with their round and source."""
        if not self.at_server:
            yield from ((round_, piece, "client") for round_, piece in self.down_at_client())
            return
        for round_, piece in self._cut(self.at_server, sent, lambda reading: reading["event"] == "push"):
            yield round_, piece, "server"

    def down_at_client(self) -> Iterator[tuple[int, Tally]]:
        """Pieces of what the client received, with the round of the message that had then arrived."""
        before: Tally | None = None
        if self.at_server and self.at_client:
            start = sent(self.at_server[0])
            base = Tally(start.payload - start.retransmitted, 0, start.segments, None, start.header)
            before = Tally(header=start.header) if self.born else base
        for reading in self.at_client:
            if before is not None:
                yield reading["round"], received(reading).since(before)
            before = received(reading)

    def _cut(
        self, readings: list[Row], of: Callable[[Row], Tally], is_boundary: Callable[[Row], bool]
    ) -> Iterator[tuple[int, Tally]]:
        if not readings:
            return
        boundaries = [reading for reading in readings if is_boundary(reading)]
        round_ = boundaries[0]["round"] if boundaries else readings[0]["round"]
        before = Tally(header=readings[0]["header_bytes"], data=0) if self.born else of(readings[0])
        for reading in readings:
            yield round_, of(reading).since(before)
            before = of(reading)
            if is_boundary(reading):
                round_ = reading["round"]


class Accounts:
    """A ledger's rows at one moment; see :mod:`server_app.ledger` for the tables."""

    def __init__(
        self,
        meta: dict[str, str],
        tensors: list[Row],
        messages: list[Row],
        bundles: list[Row],
        readings: list[Row],
        connections: list[Row],
        activity: list[Row],
        small_calls: list[Row],
    ) -> None:
        self.meta = meta
        self.tensors = tensors
        self.messages = messages
        self.bundles = bundles
        self.readings = readings
        self.activity = activity
        self.small_calls = small_calls
        links = _links(readings, connections)
        own = [link for link in links if link.client != OTHER]
        found = {link.client for link in own}
        # Somebody else's SuperNodes share the Fleet port. Only where a client of this run could not read its own end,
        # and nobody hides behind address translation, can what is left over be this run's.
        missing = {row["client"] for row in messages} - found
        self.counts_other = bool(missing) and all(link.at_server for link in own)
        self.links = links if self.counts_other else own
        self.covered = found | (missing if self.counts_other else set())

    # ---------------------------------------------------------------------------------------------- per round

    def rows(self) -> list[ClientRound]:
        """One row per client, round and direction, in that order."""
        tensor, message = defaultdict[tuple[int, str, str], int](int), defaultdict[tuple[int, str, str], int](int)
        for row in self.tensors:
            tensor[row["round"], row["client"], row["direction"]] += row["bytes"]
        for row in self.messages:
            message[row["round"], row["client"], row["direction"]] += row["bytes"]
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
        """Who could not read the wire, and why; the server is ``server``."""
        return {
            row["client"] if row["end"] == "client" else "server": row["not_measured"]
            for row in self.readings
            if row["not_measured"]
        }

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
        """Bytes per direction and category, in the order of ``CATEGORIES``; empty where the wire was not measured."""
        return {direction: self._reconcile(direction) for direction in ("up", "down")}

    def unexplained_fraction(self) -> float | None:
        """The larger direction's ``|unexplained| / wire``; None where the wire was not measured."""
        fractions = [
            abs(categories["unexplained"]) / max(1, sum(categories.values()))
            for categories in self.reconciliation().values()
            if categories
        ]
        return max(fractions, default=None)

    def call_overhead(self, client: str = "") -> CallCost | None:
        """What one gRPC call costs beyond its protobuf: the median lone poll of ``client``.

        Without one, of all clients; without any, the cheapest lone heartbeat (some carry a timeout as well); None when
        there was no lone call at all. gRPC sends HTTP/2 pings after a pause; they travel in segments of their own.
        """
        calls = [call for row in self.small_calls if (call := self._lone_call(row)) is not None]
        if not calls:
            return None
        keys = {link.key for link in self.links if link.client == client and link.at_server}
        polls = [call for call in calls if call.phase == "poll"]
        polls = [call for call in polls if call.key in keys] or polls
        count = sum(call.count for call in calls)
        pings = [sum(getattr(call, name) * call.count for call in calls) / count for name in ("pings_up", "pings_down")]
        if polls:
            up = _median([(call.up, call.count) for call in polls]) - POLL_PROTO[0]
            down = _median([(call.down, call.count) for call in polls]) - POLL_PROTO[1]
        else:
            up = min(call.up for call in calls) - HEARTBEAT_PROTO[0]
            down = min(call.down for call in calls) - HEARTBEAT_PROTO[1]
        return CallCost((up, down), (pings[0], pings[1]))

    def _lone_call(self, row: Row) -> _LoneCall | None:
        """A row of ``small_call`` without its pings; None for half a call (the answer came too late)."""
        pings_up, pings_down = (self._ping * (row[name] - 1) for name in ("data_in", "data_out"))
        up, down = row["up"] - pings_up, row["down"] - pings_down
        if min(up, down) <= self._ping:
            return None
        key = (row["address"], row["port"], row["cookie"])
        return _LoneCall(row["phase"], key, up, down, pings_up, pings_down, row["count"])

    @property
    def _ping(self) -> int:
        return PING + (TLS_RECORD if self.meta.get("tls") == "1" else 0)

    def _reconcile(self, direction: str) -> dict[str, int]:
        pieces = [(link, piece) for link in self.links for _, piece, _ in getattr(link, direction)()]
        if not pieces:
            return {}
        found = dict.fromkeys(CATEGORIES, 0)
        for _, piece in pieces:
            found["retransmissions"] += piece.retransmitted
        for link in self.links:
            segments, data, header = _segments(link, direction)
            found["TCP/IP headers"] += header * data
            found["acknowledgements"] += header * (segments - data)
        payload = sum(piece.payload for _, piece in pieces)
        tensors = {(row["client"], row["round"], row["direction"], row["kind"]): 0 for row in self.tensors}
        for row in self.tensors:
            tensors[row["client"], row["round"], row["direction"], row["kind"]] += row["bytes"]
        own, control, frames, meant = 0, 0, 0, 0
        calls, polls, groups = (defaultdict[str, int](int) for _ in range(3))
        for row in self._carried():
            calls[row["client"]] += row["calls"]
            groups[row["client"]] += 1
            # After each answer the SuperNode polls at once, too close to the answer to be seen apart.
            polls[row["client"]] += row["direction"] == "up"
            if row["direction"] == direction:
                own += row["bytes"]
                frames += row["frames"]
                meant += tensors.pop((row["client"], row["round"], direction, row["kind"]), 0)
            else:
                control += row["control_bytes"]
        for row in self._fetched_bundles():
            found["app bundle"] += row[direction]
            calls[row["client"]] += BUNDLE_CALLS
            frames += row["frames"] if direction == "down" else 0
        found["tensors"] = meant
        found["message framing"] = own - meant
        found["Flower control"] = control
        found["bulk frames"] = frames * (FRAME_HEADER + (TLS_RECORD if self.meta.get("tls") == "1" else 0))
        counted = {link.key for link in self.links if link.at_server}
        for row in self.activity:
            if row["kind"] in BY_COUNTER and (row["address"], row["port"], row["cookie"]) in counted:
                found[BY_COUNTER[row["kind"]]] += row[direction]
        for client in calls:
            overhead = self.call_overhead(client)
            if overhead is not None:  # else it stays unexplained
                end = 0 if direction == "up" else 1
                found["gRPC calls"] += round(calls[client] * overhead.call[end])
                found["HTTP/2 pings"] += round(groups[client] * overhead.pings[end])
                found["polling, heartbeats"] += round(polls[client] * (overhead.call[end] + POLL_PROTO[end]))
        headers = found["TCP/IP headers"] + found["acknowledgements"]
        found["unexplained"] = payload + headers - sum(found.values())
        return found

    def _carried(self) -> Iterator[Row]:
        """Messages whose bytes are inside the counted wire."""
        alone: dict[str, list[tuple[int, str]]] = {client: [] for client in self.unjoined()}
        for reading in self.readings:
            if reading["end"] == "client" and reading["client"] in alone:
                alone[reading["client"]].append((reading["round"], reading["kind"]))
        answered = {(row["client"], row["round"], row["kind"]) for row in self.messages if row["direction"] == "up"}
        wire, _, _ = self._wire()
        for row in self.messages:
            client, what = row["client"], (row["round"], row["kind"])
            if client not in self.covered:
                continue
            if client in alone:
                # Counting starts when the first message has arrived and ends before the last answer.
                inside = alone[client][1:] if row["direction"] == "down" else alone[client][:-1]
                if what not in inside:
                    continue
            elif row["direction"] == "down" and (client, *what) not in answered:
                fetched = wire.get((row["round"], client, "down"))
                if fetched is not None and fetched < row["bytes"]:
                    continue  # the SuperNode never came for it
            yield row

    def _fetched_bundles(self) -> list[Row]:
        alone = set(self.unjoined())
        return [row for row in self.bundles if row["client"] in self.covered and row["client"] not in alone]


def _segments(link: Link, direction: str) -> tuple[int, int, int]:
    """Segments, those of them with data, and the header bytes of each."""
    pieces = [piece for _, piece, _ in getattr(link, direction)()]
    segments = sum(piece.segments for piece in pieces)
    header = pieces[-1].header if pieces else 0
    data = [piece.data for piece in pieces]
    if any(count is None for count in data):
        # The wire message of a client's reading has no data segments; the server counts those that arrive.
        data = [piece.data for _, piece in link.up_at_server()] if direction == "up" else data
    known = [count for count in data if count is not None]
    return segments, min(segments, sum(known)) if known and len(known) == len(data) else segments, header


def _links(readings: list[Row], connections: list[Row]) -> list[Link]:
    by_seq = {row["seq"]: row for row in readings}
    at_client: dict[tuple[str, Key], list[Row]] = defaultdict(list)
    at_server: dict[Key, list[Row]] = defaultdict(list)
    first_server: int | None = None
    for row in readings:
        if row["end"] == "server" and not row["not_measured"] and first_server is None:
            first_server = row["seq"]
    for connection in connections:
        reading = by_seq[connection["seq"]]
        row = {**connection, **reading}
        if reading["end"] == "client":
            key = (connection["local_address"], connection["local_port"], connection["cookie"])
            at_client[reading["client"], key].append(row)
        else:
            at_server[connection["remote_address"], connection["remote_port"], connection["cookie"]].append(row)
    for rows in at_server.values():  # the moment of a client's reading is found afterwards
        rows.sort(key=lambda row: (row["time"], row["seq"]))
    links = []
    for (client, key), rows in at_client.items():
        link = Link(client, at_client=rows)
        for candidate, seen in at_server.items():
            if candidate[:2] == key[:2] and _same(rows[-1], seen[-1]):
                link.at_server = at_server.pop(candidate)
                link.born = link.at_server[0]["seq"] != first_server
                break
        links.append(link)
    for rows in at_server.values():
        links.append(Link(OTHER, at_server=rows, born=rows[0]["seq"] != first_server))
    return links


def _same(at_client: Row, at_server: Row) -> bool:
    """Whether two ends with the same address and port can be one connection: both got at least what the other had."""
    return bool(
        at_client["bytes_acked"] - 1 <= at_server["bytes_received"]
        and at_client["bytes_received"] <= at_server["bytes_sent"]
    )


def _median(values: list[tuple[int, int]]) -> float:
    """Median of values with counts."""
    values = sorted(values)
    half = sum(count for _, count in values) / 2
    seen = 0
    for value, count in values:
        seen += count
        if seen >= half:
            return float(value)
    raise ValueError("no values")
