"""The sampler tells polls, heartbeats and messages apart."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest

from client_app.sockets import Connection
from server_app.ledger import sampler as fleet_sampler
from server_app.ledger.connections import join
from server_app.ledger.rows import ConnectionRow
from server_app.ledger.sampler import FleetSampler
from server_app.ledger.store import Ledger
from tests.server_app.ledger.samples import (
    HEADER,
    at_client,
    at_server,
    reading,
    wire_rows,
)


class Kernel:
    """A scripted socket table and clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.sockets: dict[int, Connection] = {}
        self.looks: list[str] = []  # "all", or the port of the one that was looked at
        self.cost = 0.0  # processor seconds of a look at all
        self.used = 0.0
        monkeypatch.setattr(fleet_sampler, "SocketTable", lambda: self)
        monkeypatch.setattr(fleet_sampler, "server_connections", lambda table, port: table.connections(port))
        monkeypatch.setattr(fleet_sampler, "find_ancestor", lambda program: (7, ["flower-superlink", "--ssl-certfile"]))
        monkeypatch.setattr(fleet_sampler, "time", self)
        monkeypatch.setattr(FleetSampler, "_sample", lambda sampler: None)

    def time(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.used

    def connections(self, port: int) -> list[Connection]:
        self.looks.append("all")
        self.used += self.cost
        return list(self.sockets.values())

    def again(self, connection: Connection) -> Connection | None:
        self.looks.append(str(connection.remote_port))
        return next((c for c in self.sockets.values() if c.remote_port == connection.remote_port), None)

    def close(self) -> None:
        return None

    def traffic(self, sampler: FleetSampler, port: int, up: int, down: int, segments: int = 1) -> None:
        """Bytes cross, the sampler looks, then half a second of silence in which it looks again."""
        old = self.sockets[port]
        self.sockets[port] = replace(
            old,
            bytes_received=old.bytes_received + up,
            bytes_sent=old.bytes_sent + down,
            segments_in=old.segments_in + segments,
            segments_out=old.segments_out + segments,
            data_segments_in=old.data_segments_in + segments,
            data_segments_out=old.data_segments_out + segments,
        )
        for _ in range(2):
            self.now += 0.5
            with sampler._look():
                pass


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def activity(ledger: Ledger, column: str = "up") -> dict[str, int]:
    found: dict[str, int] = {}
    for row in ledger.accounts().activity:
        found[row.kind] = found.get(row.kind, 0) + getattr(row, column)
    return found


def test_sampler_tells_polls_from_messages(ledger: Ledger, kernel: Kernel) -> None:
    kernel.sockets[5] = at_server(9000, 9000)
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    kernel.traffic(sampler, 5, 590, 86)  # a poll
    kernel.traffic(sampler, 5, 668, 164, segments=3)  # another, with two pings
    sampler.push(1, "berlin", "train")
    kernel.traffic(sampler, 5, 590, 86)  # a third, which finds nothing yet: neither poll nor heartbeat for certain
    kernel.traffic(sampler, 5, 5300, 100_000, segments=70)  # the message
    kernel.traffic(sampler, 5, 39, 39)  # a ping
    kernel.traffic(sampler, 5, 599, 88)  # a heartbeat: busy SuperNodes do not poll
    end = kernel.sockets[5]
    arrived = reading(at_client(end.bytes_received, end.bytes_sent))
    kernel.traffic(sampler, 5, 105_000, 1200, segments=80)
    sampler.reply(1, "berlin", "train", arrived)
    sampler.stop()
    assert activity(ledger) == {"idle": 590 + 668 + 590 + 599, "burst": 5300 + 105_000, "ping": 39}
    calls = {(row.phase, row.up, row.count) for row in ledger.accounts().small_calls}
    assert calls == {("poll", 590, 1), ("poll", 668, 1), ("heartbeat", 599, 1)}
    cost = ledger.accounts().call_overhead("berlin")
    assert cost is not None
    assert cost.call == (577, 86)
    assert ledger.accounts().meta["tls"] == "1"
    # Nothing is lost between the kinds.
    last = kernel.sockets[5]
    assert sum(activity(ledger).values()) == last.bytes_received - 9000
    assert sum(activity(ledger, "down").values()) == last.bytes_sent - 9000


def test_an_answer_after_its_deadline_does_not_hide_among_the_polls(ledger: Ledger, kernel: Kernel) -> None:
    kernel.sockets[5] = at_server(0, 0)
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    sampler.push(1, "berlin", "train")
    kernel.traffic(sampler, 5, 5000, 100_000)
    sampler.reply(1, "berlin", "train")  # the round went on without it
    kernel.traffic(sampler, 5, 100_000, 1000)
    kernel.traffic(sampler, 5, 1190, 172)  # a poll and a heartbeat together
    sampler.stop()
    assert activity(ledger) == {"burst": 105_000, "idle": 1190}


def test_a_message_on_a_new_connection_is_not_its_setup(ledger: Ledger, kernel: Kernel) -> None:
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    kernel.sockets[5] = at_server(0, 0)
    with sampler._look():
        pass
    kernel.traffic(sampler, 5, 50_000, 3000)
    sampler.stop()
    assert activity(ledger) == {"burst": 50_000}


def test_sampler_finds_the_moment_of_the_clients_reading(ledger: Ledger, kernel: Kernel) -> None:
    kernel.sockets[5] = at_server(0, 0)
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    sampler.push(1, "berlin", "train")
    kernel.traffic(sampler, 5, 5000, 100_000)
    there = kernel.sockets[5]
    kernel.traffic(sampler, 5, 100_000, 1000)
    sampler.reply(1, "berlin", "train", reading(at_client(there.bytes_received, there.bytes_sent)))
    (link,) = ledger.accounts().links
    (moment,) = [row for row in link.at_server if row.event == "handler"]
    assert (moment.bytes_received, moment.bytes_sent) == (5000, 100_000)
    sampler.stop()


def test_a_message_to_a_known_client_looks_at_no_other_connection(ledger: Ledger, kernel: Kernel) -> None:
    kernel.sockets = {5: at_server(0, 0), 6: at_server(0, 0, port=6)}
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    sampler.push(1, "berlin", "train")
    kernel.traffic(sampler, 5, 5000, 3000)
    sampler.reply(1, "berlin", "train", reading(at_client(5000, 3000)))
    kernel.looks.clear()
    kernel.traffic(sampler, 6, 400, 90)
    sampler.push(2, "berlin", "train")
    (own,) = [look for look in kernel.looks if look != "all"]
    assert own == str(kernel.sockets[5].remote_port)
    kernel.sockets[7] = at_server(10, 10, port=7)
    del kernel.sockets[5]  # it is on another connection now
    sampler.reply(2, "berlin", "train")
    assert kernel.looks[-2:] == [own, "all"]
    pushed = [
        row for link in ledger.accounts().links for row in link.at_server if (row.event, row.round) == ("push", 2)
    ]
    assert [(row.remote_port, row.bytes_received) for row in pushed] == [(int(own), 5000)]
    sampler.stop()


def test_looks_at_all_connections_take_a_share_of_the_time_at_most(ledger: Ledger, kernel: Kernel) -> None:
    kernel.sockets[5] = at_server(0, 0)
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    kernel.looks.clear()
    kernel.cost = 0.05
    for number in range(100):
        sampler.push(0, f"node {number}", "query")
        kernel.now += 0.01
    assert len(kernel.looks) == 5  # a fifth of a second's time, and the one that went beyond it
    pushes = [row.time for row in ledger.accounts().readings if row.event == "push"]
    assert pushes == [pytest.approx(1000 + number / 100) for number in range(100)]  # each has its own moment
    kernel.now += 2
    del kernel.sockets[5]
    sampler.push(0, "node 7", "query")
    assert len(kernel.looks) == 6
    sampler.stop()


def test_clients_that_are_not_known_yet_write_a_row_for_each_connection_and_round(
    ledger: Ledger, kernel: Kernel
) -> None:
    """There are as many rows as connections, not their square; the bytes belong to the same rounds."""
    count, moved = 20, 500
    kernel.sockets = {port: at_server(0, 0, port=port) for port in range(1, count + 1)}
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    for round_ in (0, 1, 2):
        for port in kernel.sockets:
            sampler.push(round_, f"node {port}", "query")
            kernel.traffic(sampler, port, 100, moved)
            sampler.reply(round_, f"node {port}", "query")
    sampler.stop()
    readings = ledger.accounts().readings
    ledger._db.row_factory = sqlite3.Row
    links = join(readings, ledger._rows(ConnectionRow, "SELECT * FROM connection ORDER BY seq"))
    assert sum(row.event in ("push", "reply") for link in links for row in link.at_server) == 3 * count
    assert len(links) == count
    for link in links:
        found = [0, 0, 0]
        for round_, piece, _ in link.down():
            found[round_] += piece.payload
        assert found == [moved] * 3


def test_sampler_keeps_the_last_counters_of_a_connection_that_goes(ledger: Ledger, kernel: Kernel) -> None:
    kernel.sockets[5] = at_server(100, 100)
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    kernel.sockets[6] = at_server(0, 0, port=6)
    with sampler._look():
        pass
    kernel.traffic(sampler, 6, 4000, 3000, segments=9)  # TLS handshake and activation
    sampler.push(0, "node 1", "query")
    kernel.traffic(sampler, 5, 700, 50)
    sampler.reply(0, "node 1", "query", reading(at_client(800, 150)))
    sampler.rename("node 1", "berlin")
    kernel.traffic(sampler, 5, 300, 20)
    del kernel.sockets[5]
    with sampler._look():
        pass
    sampler.stop()
    assert wire_rows(ledger, "up") == [(0, "berlin", 1000 + HEADER * 2, "client")]
    assert activity(ledger)["setup"] == 4000


@pytest.mark.parametrize("thief", [(2**49, 0), (5001, 0), (900, 400), (0, 0)])
@pytest.mark.parametrize("first", [True, False])
def test_a_connection_is_not_that_of_whoever_names_it(
    ledger: Ledger, kernel: Kernel, thief: tuple[int, int], first: bool
) -> None:
    """A claim of more bytes than this end has counted is dropped; one that fits no look gives way to one that does."""
    kernel.sockets[5] = at_server(0, 0)
    sampler = FleetSampler(ledger, port=9092)
    sampler.start()
    for name in ("berlin", "thief"):
        sampler.push(1, name, "train")
    kernel.traffic(sampler, 5, 5000, 3000)
    # An impossible claim leaves nothing behind, so even a reading that fell between two looks is enough.
    berlin = at_client(4990, 2990) if thief[0] > 5000 else at_client(5000, 3000)
    claims = [("thief", reading(at_client(*thief))), ("berlin", reading(berlin))]
    for name, claim in claims if first else reversed(claims):
        sampler.reply(1, name, "train", claim)
    del kernel.sockets[5]
    with sampler._look():
        pass
    sampler.stop()
    assert [row.client for row in ledger.accounts().readings if row.event == "gone"] == ["berlin"]


def test_sampler_without_counters_books_the_reason_and_what_clients_say(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_sampler, "find_ancestor", lambda program: None)
    with FleetSampler(ledger, port=1) as sampler:  # nobody listens there
        assert not sampler.is_measuring
        sampler.push(1, "berlin", "train")
        sampler.reply(1, "berlin", "train", reading(at_client(5, 5)))
    assert "server" in ledger.accounts().not_measured()
    assert ledger.accounts().unjoined() == ["berlin"]
