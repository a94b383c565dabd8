"""Watches the server's end of every Fleet connection while a run goes on.

About ten times a second a thread reads the kernel's counters. Between messages every poll, heartbeat and HTTP/2 ping of
a SuperNode is a jump of its own. So their cost is read from the counter and not assumed, and so is the cost of one
small gRPC call on these connections. The round loop says when a message is pushed and when an answer has come; the
counters at these moments go into the ledger.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from client_app.sockets import Connection, SocketTable, WireError, find_ancestor, fleet_port, server_connections
from proto.fedalloy.v1 import report_pb2
from server_app.ledger.reconciliation import PING, TLS_RECORD
from server_app.ledger.store import Ledger

Key = tuple[str, int, int]  # the SuperNode's address and port, the socket's cookie
Change = tuple[int, int, int, int, int, int]  # up, down (once each), segments in, out, data segments in, out

# Silence that ends a burst, in seconds: longer than a pause between a message's calls, shorter than between two polls.
GAP = 0.25
# A lone poll or heartbeat is about 600 bytes up (mostly the SuperNode's key and signature) and 90 down, with its pings.
LONE_CALL_UP, LONE_CALL_DOWN = (300, 1000), 300
# A TLS handshake, gRPC's settings, activation and the first poll are about 4,100 bytes up and 3,000 down.
MAX_SETUP = 8000
MAX_CPU = 0.015
MOST_LOOKS = 0.2
"""The largest share of time for looks at all connections; beyond it, what was seen last is used again."""
REMEMBERED = 600


@dataclass(frozen=True)
class _Moment:
    """The result of one look at the kernel's table; ``of_all``: it has all connections, not one client's alone."""

    time: float
    connections: list[Connection]
    of_all: bool = True


@dataclass
class _Burst:
    """Changes of one connection without a pause of ``GAP`` in between."""

    started_idle: bool
    setup: bool
    exchange: int
    change: Change = (0, 0, 0, 0, 0, 0)
    last_change: float = 0.0

    def is_over(self, now: float) -> bool:
        """Whether it has been quiet for long enough; a new connection may take longer to send its first byte."""
        return now - self.last_change >= GAP and not (self.setup and self.change[0] == 0)


@dataclass
class _Watched:
    """One connection as the sampler knows it."""

    connection: Connection
    round: int
    seen: deque[tuple[float, Connection]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    burst: _Burst | None = None
    exchange: int = 0  # messages pushed so far
    busy: bool = False  # has fetched the last of them and not answered it yet
    cut: int = -1  # the round of the last push in its rows


class FleetSampler:
    """Samples from :meth:`start` to :meth:`stop`; :meth:`push` and :meth:`reply` are called by the round loop.

    Args:
        ledger: takes the readings.
        port: the Fleet port; by default found from the SuperLink's command line.
        interval: seconds between samples; longer if samples would take more than 1.5 % of a core.
    """

    def __init__(self, ledger: Ledger, port: int | None = None, interval: float = 0.1) -> None:
        self.ledger = ledger
        self.interval = interval
        self.not_measured = "not started"
        self.cpu_seconds = 0.0
        self.samples = 0
        self._port = port
        self._lock = threading.Lock()
        self._tables = threading.local()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="fleet-sampler", daemon=True)
        self._watched: dict[Key, _Watched] = {}
        self._client_of: dict[tuple[str, int], str] = {}
        self._under_way: Counter[str] = Counter()
        self._round = 0
        self._activity: dict[tuple[int, Key, str], list[int]] = defaultdict(lambda: [0] * 7)
        self._small_calls: Counter[tuple[Key, str, int, int, int, int]] = Counter()
        self._tls: bool | None = None
        self._tls_noted = False
        self._looks: deque[tuple[float, float]] = deque()  # looks at all connections for messages: when, and how long

    def __enter__(self) -> FleetSampler:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def is_measuring(self) -> bool:
        """Whether the counters can be read here; ``not_measured`` says why not."""
        return not self.not_measured

    def start(self) -> None:
        """Take the run's first reading and start the thread."""
        try:
            if self._port is None:
                self._port = fleet_port()
            superlink = find_ancestor("flower-superlink")
            if superlink is not None:
                self._tls = "--insecure" not in superlink[1]
            now, connections = time.time(), server_connections(self._table(), self._port)
        except Exception as error:  # the run matters more than its wire level
            self.decline(str(error) or repr(error))
            return
        self.not_measured = ""
        self.ledger.server_reading(0, "", "start", connections, unix_time=now)
        with self._lock:
            for connection in connections:
                self._watched[_key(connection)] = _Watched(connection, 0)
        self._thread.start()

    def decline(self, reason: str) -> None:
        """Measure nothing, and note the reason in the ledger."""
        self.not_measured = reason
        self.ledger.server_reading(0, "", "start", [], not_measured=reason)

    def push(self, round_: int, client: str, kind: str) -> None:
        """Call this just before a message is pushed to ``client`` (or to a node whose client is not known yet)."""
        self._round = round_
        with self._look(client) as moment:
            if moment is None:
                return
            self._under_way[client] += 1
            for watched in self._watched_of(client, moment):
                watched.round, watched.exchange, watched.busy = round_, watched.exchange + 1, False
        self._book(round_, client, "push", kind, moment)

    def reply(self, round_: int, client: str, kind: str, reading: report_pb2.WireReading | None = None) -> None:
        """Call this when an answer (or an error, or nothing in time) ends what :meth:`push` started.

        ``client`` is the name that was given to ``push``. The answer's own reading is recorded, and this end looks up
        the moment at which the client took it.
        """
        if reading is not None:
            self.ledger.client_reading(round_, client, reading, kind=kind)
        with self._look(client) as moment:
            if moment is None:
                return
            self._under_way[client] -= 1
            if self._under_way[client] <= 0:
                del self._under_way[client]
            arrivals = []
            for end in reading.connections if reading is not None else ():
                arrival, exact = self._arrival(end)
                arrivals.append(arrival)
                if exact:  # anybody can name an address and port, but nobody knows another's counters
                    self._client_of[end.local_address, end.local_port] = client
                elif arrival is not None:  # the connection exists, and the claim is not more than it has brought
                    self._client_of.setdefault((end.local_address, end.local_port), client)
            for watched in self._watched_of(client, moment):
                watched.busy = False
        for arrival in arrivals:
            if arrival is not None:
                self._book(round_, client, "handler", kind, arrival)
        self._book(round_, client, "reply", kind, moment)

    def rename(self, old: str, new: str) -> None:
        """Use a client's name now that it is known; also in the ledger."""
        with self._lock:
            self._client_of = {key: new if name == old else name for key, name in self._client_of.items()}
            if old in self._under_way:
                self._under_way[new] += self._under_way.pop(old)
        self.ledger.rename(old, new)

    def stop(self) -> None:
        """Take the last reading and end the thread."""
        if not self.is_measuring:
            return
        self._stop.set()
        self._thread.join(timeout=10)
        with self._look() as moment:
            for key in list(self._watched):
                self._end_burst(key)
        if moment is not None:
            self._book(self._round, "", "final", "", moment)
        self._table().close()
        self.not_measured = "stopped"

    # ------------------------------------------------------------------------------------------------ inside

    def _sample(self) -> None:
        while not self._stop.is_set():
            started = time.thread_time()
            with suppress(WireError):  # one sample less; the counters lose nothing
                self._observe(_Moment(time.time(), self._table().connections(self._port or 0)))
            cost = time.thread_time() - started
            self.cpu_seconds += cost
            self.samples += 1
            self._stop.wait(max(self.interval, cost / MAX_CPU))
        self._tables.table.close()

    def _table(self) -> SocketTable:
        if not hasattr(self._tables, "table"):  # a netlink socket is used by the thread that opened it
            self._tables.table = SocketTable()
        table: SocketTable = self._tables.table
        return table

    @contextmanager
    def _look(self, client: str = "") -> Iterator[_Moment | None]:
        """Take one more sample now; the lock is held inside. None if nothing can be read.

        If a client's connections are known, only these are read, so that a message's cost does not grow with the
        number of clients. The thread sees which others have come or gone.
        """
        moment = None
        if self.is_measuring:
            with suppress(WireError):
                moment = self._of_one(client) or self._of_all()
        with self._lock:
            yield moment

    def _of_one(self, client: str) -> _Moment | None:
        """A look at the client's connections; None if they are not known, or one has ended."""
        with self._lock:
            known = [watched.connection for key, watched in self._watched.items() if self._is_of(key, client)]
        now = time.time()
        found = [self._table().again(connection) for connection in known]
        if not found or None in found:
            return None
        moment = _Moment(now, [connection for connection in found if connection is not None], of_all=False)
        self._observe(moment)
        return moment

    def _of_all(self) -> _Moment:
        now = time.time()
        while self._looks and self._looks[0][0] < now - 1:
            self._looks.popleft()
        if sum(seconds for _, seconds in self._looks) > MOST_LOOKS:
            with self._lock:  # counters never fall: keep the newest values of each connection that any thread has seen
                return _Moment(now, [watched.connection for watched in self._watched.values()])
        started = time.thread_time()
        moment = _Moment(now, self._table().connections(self._port or 0))
        self._observe(moment)
        self._looks.append((now, time.thread_time() - started))
        return moment

    def _is_of(self, key: Key, client: str) -> bool:
        return bool(client) and self._client_of.get(key[:2]) == client

    def _book(self, round_: int, client: str, event: str, kind: str, moment: _Moment) -> None:
        with self._lock:
            found = [c for c in self._of(client, moment) if self._is_due(round_, client, event, _key(c))]
        self.ledger.server_reading(round_, client, event, found, kind=kind, unix_time=moment.time)
        self._write_activity()

    def _is_due(self, round_: int, client: str, event: str, key: Key) -> bool:
        """Of a connection that may be anybody's one row a round is enough, and N clients write N rows, not N^2."""
        watched = self._watched.get(key)
        if watched is None or event == "handler" or not client or self._is_of(key, client):
            return True
        before, watched.cut = watched.cut, round_ if event == "push" else watched.cut
        return before != round_

    def _of(self, client: str, moment: _Moment) -> list[Connection]:
        """The client's connections, or all connections while the client's are not known."""
        mine = [c for c in moment.connections if self._is_of(_key(c), client)]
        return mine or moment.connections

    def _watched_of(self, client: str, moment: _Moment) -> list[_Watched]:
        """Those of the client's connections that have not ended since."""
        keys = map(_key, self._of(client, moment))
        return [self._watched[key] for key in keys if key in self._watched]

    def _observe(self, moment: _Moment) -> None:
        now = moment.time
        gone: list[tuple[float, Connection]] = []
        with self._lock:
            current = {_key(connection): connection for connection in moment.connections}
            for key, connection in current.items():
                watched = self._watched.get(key)
                if watched is None:
                    watched = self._watched[key] = _Watched(connection, self._round)
                    self._changed(key, watched, _counts(connection), now, setup=True)
                    watched.seen.append((now, connection))
                elif any(change := _change(connection, watched.connection)):
                    self._changed(key, watched, change, now)
                    watched.connection = connection
                    watched.seen.append((now, connection))
                elif watched.burst is not None and watched.burst.is_over(now):
                    self._end_burst(key)
            for key in [key for key in self._watched if key not in current] if moment.of_all else ():
                self._end_burst(key)
                gone.append((now, self._watched.pop(key).connection))
        for when, connection in gone:
            # Its last bytes may be missing, but no more than since the last sample.
            client = self._client_of.pop((connection.remote_address, connection.remote_port), "")
            self.ledger.server_reading(self._round, client, "gone", [connection], unix_time=when)

    def _changed(self, key: Key, watched: _Watched, change: Change, now: float, *, setup: bool = False) -> None:
        if watched.burst is not None and watched.burst.is_over(now):
            self._end_burst(key)
        if watched.burst is None:
            watched.burst = _Burst(not self._is_under_way(key), setup, watched.exchange)
        burst = watched.burst
        burst.change = tuple(a + b for a, b in zip(burst.change, change, strict=True))  # type: ignore[assignment]
        burst.last_change = now

    def _end_burst(self, key: Key) -> None:
        watched = self._watched[key]
        burst, watched.burst = watched.burst, None
        if burst is None:
            return
        up, down, _, _, data_in, data_out = burst.change
        pings = max(up, down) < LONE_CALL_UP[0]
        lone_call = LONE_CALL_UP[0] <= up <= LONE_CALL_UP[1] and down <= LONE_CALL_DOWN and data_in > 0 and data_out > 0
        at_rest = burst.started_idle and not self._is_under_way(key)
        # Anything larger than what it seems to be (an answer after its deadline, a message on a new connection)
        # must not hide among the polls.
        few_calls = up <= 2 * LONE_CALL_UP[1] and down <= 2 * LONE_CALL_DOWN
        if burst.setup and max(up, down) <= MAX_SETUP:
            kind = "setup"
        elif pings and not burst.setup:
            kind = "ping"
        else:
            kind = "idle" if not burst.setup and (lone_call or (at_rest and few_calls)) else "burst"
        row = self._activity[watched.round, key, kind]
        for position, value in enumerate((1, *burst.change)):
            row[position] += value
        if lone_call and not burst.setup and (at_rest or watched.busy):
            self._small_calls[key, "poll" if at_rest else "heartbeat", up, down, data_in, data_out] += 1
        if kind == "burst" and burst.exchange == watched.exchange and self._is_under_way(key):
            watched.busy = True
        if self._tls is None and pings and up and up == down:
            self._tls = up % (PING + TLS_RECORD) == 0

    def _is_under_way(self, key: Key) -> bool:
        """Whether a message is under way on this connection, or on one that might be the same."""
        client = self._client_of.get(key[:2])
        known = set(self._client_of.values())
        return any(name == client or name not in known for name in self._under_way)

    def _arrival(self, end: report_pb2.ConnectionReading) -> tuple[_Moment | None, bool]:
        """The sample in which this end had received and sent exactly what the client had sent and received.

        If no sample fell into that moment (False): the first in which everything from the client was there.
        """
        arrived = end.bytes_sent - end.bytes_retransmitted
        for key, watched in self._watched.items():
            if key[:2] == (end.local_address, end.local_port):
                near = [look for look in watched.seen if look[1].bytes_received >= arrived]
                same = (arrived, end.bytes_received)
                exact = [
                    (when, seen)
                    for when, seen in near
                    if (seen.bytes_received, seen.bytes_sent - seen.bytes_retransmitted) == same
                ]
                for when, seen in exact or near:
                    return _Moment(when, [seen]), bool(exact) and arrived > 0
        return None, False

    def _write_activity(self) -> None:
        with self._lock:
            activity = [(r, k[0], k[1], str(k[2]), kind, *row) for (r, k, kind), row in self._activity.items()]
            calls = [(k[0], k[1], str(k[2]), *sizes, n) for (k, *sizes), n in self._small_calls.items()]
            self._activity.clear()
            self._small_calls.clear()
        if activity or calls:
            self.ledger.activity(activity, calls)
        if self._tls is not None and not self._tls_noted:
            self.ledger.note("tls", "1" if self._tls else "0")
            self._tls_noted = True


def _key(connection: Connection) -> Key:
    return connection.remote_address, connection.remote_port, connection.cookie


def _counts(seen: Connection) -> Change:
    return (
        seen.bytes_received, seen.bytes_sent - seen.bytes_retransmitted, seen.segments_in, seen.segments_out,
        seen.data_segments_in, seen.data_segments_out,
    )  # fmt: skip


def _change(new: Connection, old: Connection) -> Change:
    return tuple(a - b for a, b in zip(_counts(new), _counts(old), strict=True))  # type: ignore[return-value]
