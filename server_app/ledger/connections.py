"""TCP connections of a run, from the counters at both ends: bytes per round in each direction.

One connection has two ends. The client's readings (taken when a message has arrived) and the server's are joined by
address and port. Behind address translation this is not possible, and only the client's end counts, from its first
reading on. Each direction is counted at its sender; the receiver's end is shown beside it. A connection belongs to at
most one client. If a client claims to have sent more than the server has received, the server's end counts.

* up: bytes between two arrivals at the client belong to the earlier message (its answer travels in between); those
  before the first arrival belong to the first, and what the server received after the last belongs to the last.
* down: bytes between two pushes to the client belong to the earlier message.

So the sum over rounds is the run's total, by construction. What was sent before the run started is subtracted. Three
things are not in the kernel's counters of a connection: the server's answer in the handshake (74 bytes), the options of
the client's part of it (8), and the 12 bytes or more of a selective acknowledgement if segments came out of order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from server_app.ledger.rows import ConnectionRow, Key, ReadingRow, Sample

OTHER = "(other)"  # connections of SuperNodes that match none of this run's clients
Claim = tuple[str, Key]
"""A client, and the address, port and cookie of the connection that it claims."""
MAX_HEADER = 134
"""Bytes: Ethernet 14, and at most 60 each for IP and TCP."""
LOST_SEGMENTS = 100
"""A client's count of segments is rejected if it is above twice the server's count plus this."""


@dataclass(frozen=True)
class Tally:
    """One direction of one connection; ``data`` is None if the reader could not tell data segments apart."""

    payload: int = 0
    retransmitted: int = 0
    segments: int = 0
    data: int | None = 0
    header: int = 0

    @property
    def wire(self) -> int:
        """Bytes as a packet capture shows them."""
        return self.payload + self.header * self.segments

    def since(self, earlier: Tally) -> Tally:
        """The difference from ``earlier``."""
        data = None if self.data is None or earlier.data is None else self.data - earlier.data
        return Tally(
            self.payload - earlier.payload,
            self.retransmitted - earlier.retransmitted,
            self.segments - earlier.segments,
            data,
            self.header,
        )


def sent(row: ConnectionRow) -> Tally:
    """What the reader of ``row`` sent."""
    return Tally(
        row.bytes_sent,
        row.bytes_retransmitted,
        row.segments_out,
        row.data_segments_out,
        row.header_bytes,
    )


def received(row: ConnectionRow) -> Tally:
    """What the reader of ``row`` received; without retransmissions that arrived twice."""
    return Tally(row.bytes_received, 0, row.segments_in, row.data_segments_in, row.header_bytes)


@dataclass
class Link:
    """One TCP connection: its readings at both ends, in order. ``born``: it was opened during the run."""

    client: str
    at_client: list[Sample] = field(default_factory=list)
    at_server: list[Sample] = field(default_factory=list)
    born: bool = False

    @property
    def key(self) -> Key:
        """The SuperNode's address and port and the cookie of the SuperLink's socket."""
        row = self.at_server[0]
        return row.remote_address, row.remote_port, row.cookie

    def up(self) -> Iterator[tuple[int, Tally, str]]:
        """Pieces of what the client sent, with their round and source."""
        if not self.at_client:
            yield from ((round_, piece, "server") for round_, piece in self.up_at_server())
            return
        first, last = self.at_client[0], self.at_client[-1]
        before = self._client_base(first)
        round_ = first.round
        for reading in self.at_client:
            yield round_, sent(reading).since(before), "client"
            before, round_ = sent(reading), reading.round
        if self.at_server:
            end = received(self.at_server[-1])
            arrived = before.payload - before.retransmitted
            tail = Tally(max(0, end.payload - arrived), 0, max(0, end.segments - before.segments), None, end.header)
            yield last.round, tail, "client"

    def _client_base(self, first: Sample) -> Tally:
        """The client's counters at the start of the run, when only the server was reading."""
        if not self.at_server:
            return sent(first)
        if self.born:
            return Tally(header=first.header_bytes)
        start = received(self.at_server[0])
        older = first.bytes_retransmitted
        return Tally(start.payload + older, older, start.segments, None, start.header)

    def up_at_server(self) -> Iterator[tuple[int, Tally]]:
        """Pieces of what the server received, with their round, cut at the moments of the client's readings."""
        yield from self._cut(self.at_server, received, lambda reading: reading.event == "handler")

    def down(self) -> Iterator[tuple[int, Tally, str]]:
        """Pieces of what the server sent, with their round and source."""
        if not self.at_server:
            yield from ((round_, piece, "client") for round_, piece in self.down_at_client())
            return
        for round_, piece in self._cut(self.at_server, sent, lambda reading: reading.event == "push"):
            yield round_, piece, "server"

    def down_at_client(self) -> Iterator[tuple[int, Tally]]:
        """Pieces of what the client received, with the round of the message that had just arrived."""
        before: Tally | None = None
        if self.at_server and self.at_client:
            start = sent(self.at_server[0])
            base = Tally(start.payload - start.retransmitted, 0, start.segments, None, start.header)
            before = Tally(header=start.header) if self.born else base
        for reading in self.at_client:
            if before is not None:
                yield reading.round, received(reading).since(before)
            before = received(reading)

    def exchanged(self) -> Iterator[tuple[int, tuple[int, int], float]]:
        """Round, payload bytes up and down, and seconds between two readings of the server, cut at each push.

        Retransmissions are left out.
        """

        def is_push(reading: Sample) -> bool:
            return bool(reading.event == "push")

        times = [reading.time for reading in self.at_server]
        ups, downs = (self._cut(self.at_server, of, is_push) for of in (received, sent))
        for (round_, up), (_, down), now, before in zip(ups, downs, times, [*times[:1], *times], strict=False):
            yield round_, (up.payload, down.payload - down.retransmitted), now - before

    def _cut(
        self, readings: list[Sample], of: Callable[[Sample], Tally], is_boundary: Callable[[Sample], bool]
    ) -> Iterator[tuple[int, Tally]]:
        if not readings:
            return
        boundaries = [reading for reading in readings if is_boundary(reading)]
        round_ = boundaries[0].round if boundaries else readings[0].round
        before = Tally(header=readings[0].header_bytes, data=0) if self.born else of(readings[0])
        for reading in readings:
            yield round_, of(reading).since(before)
            before = of(reading)
            if is_boundary(reading):
                round_ = reading.round


def segments(link: Link, direction: str) -> tuple[int, int, int]:
    """Segments, those of them with data, and the header bytes of each."""
    pieces = [piece for _, piece, _ in getattr(link, direction)()]
    count = sum(piece.segments for piece in pieces)
    header = pieces[-1].header if pieces else 0
    data = [piece.data for piece in pieces]
    if any(count is None for count in data):
        # The wire message of a client's reading has no data segments; the server counts those that arrive.
        data = [piece.data for _, piece in link.up_at_server()] if direction == "up" else data
    known = [count for count in data if count is not None]
    return count, min(count, sum(known)) if known and len(known) == len(data) else count, header


def join(readings: list[ReadingRow], connections: list[ConnectionRow]) -> list[Link]:
    """The run's connections, with both ends if they can be matched; a server's end alone belongs to ``OTHER``."""
    by_seq = {row.seq: row for row in readings}
    at_client: dict[tuple[str, Key], list[Sample]] = defaultdict(list)
    at_server: dict[Key, list[Sample]] = defaultdict(list)
    first_server: int | None = None
    for row in readings:
        if row.end == "server" and not row.not_measured and first_server is None:
            first_server = row.seq
    for connection in connections:
        reading = by_seq[connection.seq]
        sample = Sample.of(connection, reading)
        if reading.end == "client":
            key = (connection.local_address, connection.local_port, connection.cookie)
            at_client[reading.client, key].append(sample)
        else:
            at_server[connection.remote_address, connection.remote_port, connection.cookie].append(sample)
    for rows in at_server.values():  # the moment of a client's reading is found afterwards
        rows.sort(key=lambda row: (row.time, row.seq))
    owners = _owners(at_client, at_server)
    links, claimed = [], {key: claim[0] for claim, key in owners.items()}
    for claim, rows in at_client.items():
        link = Link(claim[0], at_client=rows)
        if claim in owners:
            link.at_server = at_server[owners[claim]]
            link.born = link.at_server[0].seq != first_server
            if not _counted(link):
                link.at_client = []
        elif any(claimed.get(key, claim[0]) != claim[0] for key in at_server if key[:2] == claim[1][:2]):
            continue  # it is another client's
        links.append(link)
    for rows in [rows for key, rows in at_server.items() if key not in claimed]:
        links.append(Link(OTHER, at_server=rows, born=rows[0].seq != first_server))
    return links


def _same(at_client: Sample, at_server: Sample) -> bool:
    """Whether two ends with the same address and port can be one connection: their counters agree."""
    return bool(
        at_client.bytes_acked - 1 <= at_server.bytes_received and at_client.bytes_received <= at_server.bytes_sent
    )


def _owners(at_client: Mapping[Claim, list[Sample]], at_server: Mapping[Key, list[Sample]]) -> dict[Claim, Key]:
    """The claim that each of the server's ends belongs to, at most one.

    Any client can name another's address and port, but it cannot know the counters: the claim whose readings the server
    has seen exactly wins, then the one that is nearest at the end.
    """
    fits: list[tuple[int, int, Claim, Key]] = []
    for claim, rows in at_client.items():
        for key, seen in at_server.items():
            if key[:2] == claim[1][:2] and _same(rows[-1], seen[-1]):
                known = {(row.bytes_received, row.bytes_sent - row.bytes_retransmitted) for row in seen} - {(0, 0)}
                exact = {(row.bytes_sent - row.bytes_retransmitted, row.bytes_received) for row in rows} & known
                apart = seen[-1].bytes_received - rows[-1].bytes_acked + seen[-1].bytes_sent - rows[-1].bytes_received
                fits.append((-len(exact), apart, claim, key))
    found: dict[Claim, Key] = {}
    for _, _, claim, key in sorted(fits, key=lambda fit: fit[:2]):
        if claim not in found and key not in found.values():
            found[claim] = key
    return found


def _counted(link: Link) -> bool:
    """Whether the server has counted what the client says that it sent; if not, the server's own counters are used.

    They lose nothing if acknowledgements were lost, or if the connection broke before everything had arrived.
    """
    last, seen = link.at_client[-1], link.at_server[-1]
    grows = all(
        getattr(earlier, name) <= getattr(later, name)
        for earlier, later in pairwise(link.at_client)
        for name in ("bytes_sent", "bytes_retransmitted", "bytes_received", "segments_out", "segments_in")
    )
    return (
        grows
        and 0 <= last.bytes_retransmitted <= last.bytes_sent
        and last.bytes_sent - last.bytes_retransmitted <= seen.bytes_received
        and last.bytes_retransmitted <= seen.bytes_received
        and last.segments_out <= 2 * seen.segments_in + LOST_SEGMENTS
        and all(row.header_bytes <= MAX_HEADER for row in link.at_client)
    )
