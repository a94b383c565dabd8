"""TCP connections of a run, from what both ends read of them: bytes that crossed, per round, either way.

One connection has two ends. The client's readings (taken when a message has arrived) and the server's are joined by
address and port; behind address translation they cannot be, and then the client's end counts alone, from its first
reading on. Each direction is counted at its sender; the receiver's end is shown beside it.

* up: from one arrival at the client to the next belongs to the message that arrived (its answer travels in between);
  before the first, to the first; after the last, what the server received from there on belongs to the last.
* down: from one push to the client to the next belongs to the message that was pushed.

So a sum over rounds is the run's total, by construction. What was sent before the run started is subtracted. Three
things are not in the kernel's counters of a connection: the server's answer in the handshake (74 bytes), the options of
the client's part of it (8), and the 12 bytes or more of a selective acknowledgement where segments came out of order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server_app.ledger.rows import ConnectionRow, Key, ReadingRow, Sample

OTHER = "(other)"  # connections of SuperNodes that this run's clients cannot be matched with


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
    """What the reader of ``row`` received; retransmissions that arrived twice are not in it."""
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
        """The client's counters at the start of the run; only the server was looking then."""
        if not self.at_server:
            return sent(first)
        if self.born:
            return Tally(header=first.header_bytes)
        start = received(self.at_server[0])
        older = first.bytes_retransmitted
        return Tally(start.payload + older, older, start.segments, None, start.header)

    def up_at_server(self) -> Iterator[tuple[int, Tally]]:
        """Pieces of what the server received, with their round: cut where the client took its readings."""
        yield from self._cut(self.at_server, received, lambda reading: reading.event == "handler")

    def down(self) -> Iterator[tuple[int, Tally, str]]:
        """Pieces of what the server sent, with their round and source."""
        if not self.at_server:
            yield from ((round_, piece, "client") for round_, piece in self.down_at_client())
            return
        for round_, piece in self._cut(self.at_server, sent, lambda reading: reading.event == "push"):
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
                yield reading.round, received(reading).since(before)
            before = received(reading)

    def exchanged(self) -> Iterator[tuple[int, tuple[int, int], float]]:
        """Round, payload bytes up and down, and seconds between two readings of the server; cut at each push.

        What was sent again is left out.
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
    """The run's connections, with both ends where they can be matched; the server's alone belong to ``OTHER``."""
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
    links = []
    for (client, key), rows in at_client.items():
        link = Link(client, at_client=rows)
        for candidate, seen in at_server.items():
            if candidate[:2] == key[:2] and _same(rows[-1], seen[-1]):
                link.at_server = at_server.pop(candidate)
                link.born = link.at_server[0].seq != first_server
                break
        links.append(link)
    for rows in at_server.values():
        links.append(Link(OTHER, at_server=rows, born=rows[0].seq != first_server))
    return links


def _same(at_client: Sample, at_server: Sample) -> bool:
    """Whether two ends with the same address and port can be one connection: both got at least what the other had."""
    return bool(
        at_client.bytes_acked - 1 <= at_server.bytes_received and at_client.bytes_received <= at_server.bytes_sent
    )
