"""Readings at both ends, and exchanges whose every byte is known."""

from __future__ import annotations

from dataclasses import replace

from client_app.sockets import Connection
from proto.fedalloy.v1 import report_pb2
from server_app.ledger.flower_costs import BundleCost
from server_app.ledger.store import Ledger

HEADER = 66


def at_client(sent: int, received: int, *, out: int = 0, into: int = 0, port: int = 5, lost: int = 0) -> Connection:
    """The SuperNode's end."""
    return Connection(
        local_address="10.0.0.2",
        local_port=port,
        remote_address="10.0.0.1",
        remote_port=9092,
        cookie=100 + port,
        inode=1,
        header_bytes=HEADER,
        bytes_sent=sent,
        bytes_acked=sent - lost + 1,
        bytes_received=received,
        bytes_retransmitted=lost,
        segments_out=out,
        segments_in=into,
        data_segments_out=0,
        data_segments_in=0,
    )


def at_server(
    received: int, sent: int, *, into: int = 0, out: int = 0, port: int = 5, data_in: int = 0, data_out: int = 0
) -> Connection:
    """The SuperLink's end."""
    near = at_client(sent, received, out=out, into=into)
    return replace(
        near,
        local_address="10.0.0.1",
        local_port=9092,
        remote_address="10.0.0.2",
        remote_port=port,
        cookie=200 + port,
        data_segments_in=data_in,
        data_segments_out=data_out,
    )


def reading(*connections: Connection, not_measured: str = "") -> report_pb2.WireReading:
    ends = [connection.to_proto() for connection in connections]
    return report_pb2.WireReading(unix_time=1.0, connections=ends, not_measured=not_measured)


def wire_rows(ledger: Ledger, direction: str) -> list[tuple[int, str, int | None, str]]:
    rows = [row for row in ledger.accounts().rows() if row.direction == direction and row.wire is not None]
    return [(row.round, row.client, row.wire, row.source) for row in rows]


def two_rounds(ledger: Ledger) -> None:
    """An old connection: 1,000 bytes up and 500 down before the run; then a query and one round of training."""
    ledger.server_reading(0, "", "start", [at_server(1000, 500, into=10, out=5)], unix_time=1)
    ledger.server_reading(0, "berlin", "push", [at_server(1100, 510, into=11, out=6)], unix_time=2)
    ledger.client_reading(0, "berlin", reading(at_client(1600, 900, out=15, into=10)))
    ledger.server_reading(0, "berlin", "handler", [at_server(1600, 900, into=15, out=10)], unix_time=3)
    ledger.server_reading(0, "berlin", "reply", [at_server(2600, 950, into=20, out=12)], unix_time=4)
    ledger.server_reading(1, "berlin", "push", [at_server(2700, 960, into=21, out=13)], unix_time=5)
    ledger.client_reading(1, "berlin", reading(at_client(3000, 5000, out=25, into=40)))
    ledger.server_reading(1, "berlin", "handler", [at_server(3000, 5000, into=25, out=40)], unix_time=6)
    ledger.server_reading(1, "", "final", [at_server(8000, 5100, into=60, out=45)], unix_time=7)


CALL_UP, CALL_DOWN = 577, 86  # what a lone poll costs here beyond its 13 and 0 bytes


def reconciled(ledger: Ledger, *, extra_up: int = 0, extra_down: int = 0) -> dict[str, dict[str, int]]:
    """One exchange whose every byte is known, plus ``extra`` bytes that nobody accounts for."""
    ledger.note("tls", "1")
    ledger.tensor(0, "berlin", "down", "train", 800)
    ledger.message(0, "berlin", "down", "train", 1000, 6, calls=8, control_bytes=630)
    ledger.tensor(0, "berlin", "up", "train", 1900)
    ledger.message(0, "berlin", "up", "train", 2000, 6, calls=7, control_bytes=520, tls_records=2)
    ledger.bundle("berlin", BundleCost(up=110, down=4000, tls_records=1))
    key = ("10.0.0.2", 5, "205")
    ledger.activity(
        [(0, *key, "idle", 3, 3 * 590, 3 * 86, 3, 3, 3, 3), (0, *key, "burst", 1, 9, 9, 9, 9, 9, 9)],
        [(*key, "poll", 590, 86, 1, 1, 3), (*key, "heartbeat", 638, 39, 2, 1, 1)],
    )
    calls = 8 + 7 + 2
    up = 2000 + 630 + 110 + calls * CALL_UP + 2 * 22 + 590 + 3 * 590 + extra_up
    down = 1000 + 520 + 4000 + calls * CALL_DOWN + 1 * 22 + CALL_DOWN + 3 * CALL_DOWN + extra_down
    ledger.server_reading(0, "", "start", [at_server(50, 50, into=2, out=2, data_in=1, data_out=1)], unix_time=1)
    ledger.client_reading(0, "berlin", reading(at_client(60, 60, out=2, into=2)), kind="train")
    end = at_server(50 + up, 50 + down, into=42, out=32, data_in=31, data_out=26)
    ledger.server_reading(0, "", "final", [end], unix_time=2)
    return ledger.reconciliation()
