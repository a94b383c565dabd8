from __future__ import annotations

import io
import signal
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console

from client_app.sockets import Connection
from proto.fedalloy.v1 import report_pb2
from server_app.ledger import sampler as fleet_sampler
from server_app.ledger.connections import OTHER
from server_app.ledger.flower_costs import BundleCost, bundle_size, extra_records, message_cost
from server_app.ledger.reconciliation import CATEGORIES
from server_app.ledger.sampler import FleetSampler
from server_app.ledger.store import Ledger, LedgerError
from server_app.tools.print_traffic import print_traffic

ROOT = Path(__file__).parents[3]
HEADER = 66


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages can only be made inside a run."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 2**63 + 7)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite", "test") as opened:
        yield opened


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
    rows = [row for row in ledger.per_client_round() if row.direction == direction and row.wire is not None]
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


# ----------------------------------------------------------------------------------------------- both ends


def test_each_direction_is_cut_at_its_sender(ledger: Ledger) -> None:
    two_rounds(ledger)
    # Up: from the start to the second arrival belongs to the query, the rest to the round.
    assert wire_rows(ledger, "up") == [
        (0, "berlin", 3000 - 1000 + HEADER * (25 - 10), "client"),
        (1, "berlin", 8000 - 3000 + HEADER * (60 - 25), "client"),
    ]
    # Down: from the start to the second push belongs to the query.
    assert wire_rows(ledger, "down") == [
        (0, "berlin", 960 - 500 + HEADER * (13 - 5), "server"),
        (1, "berlin", 5100 - 960 + HEADER * (45 - 13), "server"),
    ]


def test_rounds_add_up_to_the_total(ledger: Ledger) -> None:
    two_rounds(ledger)
    totals = ledger.totals()
    assert totals["up"]["wire"] == 7000 + HEADER * 50
    assert totals["down"]["wire"] == 4600 + HEADER * 40
    for direction in ("up", "down"):
        assert sum(row[2] or 0 for row in wire_rows(ledger, direction)) == totals[direction]["wire"]


def test_the_other_end_stands_beside(ledger: Ledger) -> None:
    two_rounds(ledger)
    other = {(row.round, row.direction): row.other_end for row in ledger.per_client_round()}
    assert other[0, "up"] == 3000 - 1000 + HEADER * (25 - 10)
    assert other[1, "up"] == 8000 - 3000 + HEADER * (60 - 25)
    # The client last looked when the second message had arrived.
    assert other[0, "down"] == 900 - 500 + HEADER * (10 - 5)
    assert other[1, "down"] == 5000 - 900 + HEADER * (40 - 10)


def test_retransmissions_count_at_the_sender(ledger: Ledger) -> None:
    ledger.server_reading(0, "", "start", [], unix_time=1)
    ledger.server_reading(0, "berlin", "push", [at_server(0, 0)], unix_time=2)
    ledger.client_reading(0, "berlin", reading(at_client(1300, 0, out=9, lost=300)))
    ledger.server_reading(0, "", "final", [at_server(1000, 0, into=8)], unix_time=3)
    assert wire_rows(ledger, "up") == [(0, "berlin", 1300 + HEADER * 9, "client")]
    assert ledger.reconciliation()["up"]["retransmissions"] == 300


def test_a_replaced_connection_is_added(ledger: Ledger) -> None:
    ledger.server_reading(0, "", "start", [at_server(0, 0)], unix_time=1)
    ledger.server_reading(0, "berlin", "push", [at_server(0, 0)], unix_time=2)
    ledger.client_reading(0, "berlin", reading(at_client(1000, 100, out=10, into=1)))
    ledger.server_reading(0, "berlin", "gone", [at_server(1500, 120, into=12, out=2)], unix_time=3)
    ledger.server_reading(1, "berlin", "push", [at_server(40, 4, into=1, out=1, port=6)], unix_time=4)
    ledger.client_reading(1, "berlin", reading(at_client(700, 90, out=7, into=3, port=6)))
    ledger.server_reading(1, "", "final", [at_server(900, 95, into=9, out=4, port=6)], unix_time=5)
    assert ledger.totals()["up"]["wire"] == 1500 + HEADER * 12 + 900 + HEADER * 9
    assert ledger.totals()["down"]["wire"] == 120 + HEADER * 2 + 95 + HEADER * 4


def test_a_port_used_again_is_another_connection(ledger: Ledger) -> None:
    """Same address and port, but the server has received less than the client has had acknowledged."""
    ledger.server_reading(0, "", "start", [at_server(10, 10)], unix_time=1)
    ledger.client_reading(0, "berlin", reading(at_client(5000, 5)))
    assert ledger.accounts().unjoined() == ["berlin"]


# --------------------------------------------------------------------------------------------- missing ends


def test_behind_address_translation_the_client_counts_from_its_first_reading(ledger: Ledger) -> None:
    translated = replace(at_server(90_000, 90_000), remote_address="192.0.2.7")
    ledger.server_reading(0, "", "start", [translated], unix_time=1)
    ledger.message(0, "berlin", "down", "query", 50, 3)
    ledger.client_reading(0, "berlin", reading(at_client(100, 1000, out=2, into=3)), kind="query")
    ledger.client_reading(1, "berlin", reading(at_client(400, 9000, out=5, into=9)), kind="train")
    assert ledger.accounts().unjoined() == ["berlin"]
    assert wire_rows(ledger, "up")[0] == (0, "berlin", 300 + HEADER * 3, "client")
    assert wire_rows(ledger, "down") == [(1, "berlin", 8000 + HEADER * 6, "client")]


def test_without_the_clients_end_the_receiver_counts(ledger: Ledger) -> None:
    ledger.message(0, "berlin", "down", "query", 50, 3)
    ledger.server_reading(0, "", "start", [at_server(100, 100)], unix_time=1)
    ledger.client_reading(0, "berlin", reading(not_measured="TCP counters need Linux, this is darwin"))
    ledger.server_reading(0, "", "final", [at_server(1100, 300, into=4, out=2)], unix_time=2)
    assert wire_rows(ledger, "up") == [(0, OTHER, 1000 + HEADER * 4, "server")]
    assert wire_rows(ledger, "down") == [(0, OTHER, 200 + HEADER * 2, "server")]
    assert ledger.accounts().not_measured() == {"berlin": "TCP counters need Linux, this is darwin"}


def test_a_reading_while_a_connection_is_made_again_loses_nothing(ledger: Ledger) -> None:
    ledger.message(1, "berlin", "up", "train", 50, 3)
    ledger.server_reading(0, "", "start", [at_server(100, 100)], unix_time=1)
    ledger.client_reading(1, "berlin", reading(not_measured="no established connection"))
    assert ledger.accounts().not_measured() == {"berlin": "no established connection"}
    ledger.client_reading(2, "berlin", reading(at_client(5, 5)))
    assert ledger.accounts().not_measured() == {}


def test_strangers_on_the_port_are_not_this_runs(ledger: Ledger) -> None:
    two_rounds(ledger)
    before = ledger.totals()
    ledger.message(0, "berlin", "down", "query", 50, 3)
    ledger.server_reading(1, "", "final", [at_server(77_777, 77_777, port=99)], unix_time=9)
    assert ledger.totals()["up"]["wire"] == before["up"]["wire"]


def test_not_measured_is_none_and_never_zero(ledger: Ledger) -> None:
    ledger.server_reading(0, "", "start", [], not_measured="a simulation has no network")
    ledger.client_reading(0, "berlin", reading(not_measured="no flower-supernode"))
    ledger.tensor(0, "berlin", "up", "train", 10)
    ledger.message(0, "berlin", "up", "train", 30, 6)
    assert ledger.totals() == {
        "up": {"tensor": 10, "message": 30, "wire": None},
        "down": {"tensor": 0, "message": 0, "wire": None},
    }
    assert ledger.unexplained_fraction() is None
    assert ledger.reconciliation() == {"up": {}, "down": {}}


# ------------------------------------------------------------------------------------------- reconciliation

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


def test_every_category_from_its_own_source(ledger: Ledger) -> None:
    went = reconciled(ledger)
    assert tuple(went["up"]) == tuple(went["down"]) == CATEGORIES
    assert went["up"] == {
        "tensors": 1900,
        "sketches": 0,
        "message framing": 100,
        "Flower control": 630,
        "app bundle": 110,
        "gRPC calls": 17 * CALL_UP,
        "TLS records": 44,
        "polling, heartbeats": 4 * 590,
        "HTTP/2 pings": 0,
        "connection setup": 0,
        "retransmissions": 0,
        "TCP/IP headers": 30 * HEADER,
        "acknowledgements": 10 * HEADER,
        "unexplained": 0,
    }
    assert went["down"]["app bundle"] == 4000
    assert went["down"]["TCP/IP headers"] == 25 * HEADER
    assert went["down"]["unexplained"] == 0
    for direction in ("up", "down"):
        assert sum(went[direction].values()) == ledger.totals()[direction]["wire"]


def test_bytes_without_a_source_stay_unexplained(ledger: Ledger) -> None:
    went = reconciled(ledger, extra_up=777, extra_down=-333)
    assert went["up"]["unexplained"] == 777
    assert went["down"]["unexplained"] == -333
    up, down = (sum(went[direction].values()) for direction in ("up", "down"))
    assert ledger.unexplained_fraction() == max(777 / up, 333 / down)


@pytest.mark.parametrize("count", [1, 2])
def test_polls_between_a_messages_calls_are_recognised_by_both_directions(ledger: Ledger, count: int) -> None:
    went = reconciled(ledger, extra_up=count * 590 + 40, extra_down=count * CALL_DOWN - 25)
    assert went["up"]["polling, heartbeats"] == (4 + count) * 590
    assert (went["up"]["unexplained"], went["down"]["unexplained"]) == (40, -25)


@pytest.mark.parametrize(
    ("up", "down"),
    [(590, 590), (590, -500), (100, 86), (5 * 590, 5 * CALL_DOWN), (20_000, 3000), (-590, 400)],
    ids=[
        "as much down as up",
        "less down",
        "a fraction",
        "more than the time allows",
        "far more",
        "less up, more down",
    ],
)
def test_what_does_not_look_like_polls_in_both_directions_stays_unexplained(ledger: Ledger, up: int, down: int) -> None:
    went = reconciled(ledger, extra_up=up, extra_down=down)
    assert went["up"]["unexplained"] == up
    assert went["down"]["unexplained"] == down


@pytest.mark.parametrize(("arrived", "fetches"), [(1000 + 4000, 2), (1000 + 3999, 1)])
def test_a_supernode_that_was_started_again_fetches_the_bundle_again(
    ledger: Ledger, arrived: int, fetches: int
) -> None:
    """A network that was cut makes a new connection, too, but no new SuperNode."""
    ledger.bundle("berlin", BundleCost(up=110, down=4000, tls_records=1))
    ledger.message(1, "berlin", "down", "train", 1000, 6, calls=8)
    ledger.server_reading(0, "", "start", [at_server(0, 0)], unix_time=1)
    ledger.client_reading(0, "berlin", reading(at_client(100, 4000)), kind="query")
    ledger.server_reading(0, "berlin", "gone", [at_server(100, 4000)], unix_time=2)
    ledger.server_reading(1, "berlin", "push", [at_server(0, 0, port=6)], unix_time=3)
    ledger.client_reading(1, "berlin", reading(at_client(100, arrived, port=6)), kind="train")
    ledger.server_reading(1, "", "final", [at_server(100, arrived, port=6)], unix_time=4)
    assert ledger.reconciliation()["down"]["app bundle"] == fetches * 4000


def test_without_a_lone_call_the_calls_stay_unexplained(ledger: Ledger) -> None:
    ledger.message(0, "berlin", "up", "train", 2000, 6, calls=7)
    ledger.server_reading(0, "", "start", [at_server(0, 0)], unix_time=1)
    ledger.client_reading(0, "berlin", reading(at_client(0, 0)), kind="train")
    ledger.server_reading(0, "", "final", [at_server(2000 + 7 * CALL_UP, 0)], unix_time=2)
    assert ledger.accounts().call_overhead() is None
    assert ledger.reconciliation()["up"]["unexplained"] == 7 * CALL_UP


def test_a_message_that_nobody_fetched_explains_nothing(ledger: Ledger) -> None:
    ledger.server_reading(0, "", "start", [at_server(0, 0)], unix_time=1)
    ledger.server_reading(0, "berlin", "push", [at_server(0, 0)], unix_time=2)
    ledger.client_reading(0, "berlin", reading(at_client(0, 0)), kind="train")
    ledger.server_reading(1, "berlin", "push", [at_server(0, 0)], unix_time=3)
    ledger.message(1, "berlin", "down", "train", 50_000, 6, calls=8)
    ledger.server_reading(1, "", "final", [at_server(0, 40)], unix_time=4)
    assert ledger.reconciliation()["down"]["message framing"] == 0
    assert ledger.reconciliation()["down"]["unexplained"] == 40


# --------------------------------------------------------------------------------------------------- file


WRITER = """
import sys
from pathlib import Path
from server_app.ledger.store import Ledger
ledger = Ledger(Path(sys.argv[1]), "test")
number = 0
while True:
    ledger.message(number, "berlin", "up", "train", 10, 1)
    ledger.tensor(number, "berlin", "up", "train", 7)
    number += 1
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_readable_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = 0
    while said < 200:
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    said = max([said, *(int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n"))])
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Ledger(path, read_only=True) as ledger:
        assert ledger.run_name == "test"
        assert said * 10 <= (ledger.totals()["up"]["message"] or 0) <= (said + 1) * 10
        assert said * 7 <= (ledger.totals()["up"]["tensor"] or 0) <= (said + 1) * 7
    with Ledger(path, "test") as ledger:  # and can be continued
        ledger.tensor(0, "berlin", "down", "train", 5)
        assert ledger.totals()["down"]["tensor"] == 5


def test_it_can_be_read_while_it_is_written(ledger: Ledger) -> None:
    two_rounds(ledger)
    with Ledger(ledger.path, read_only=True) as other:
        assert other.totals() == ledger.totals()
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            other.tensor(0, "berlin", "up", "train", 1)


def test_a_finished_ledger_can_be_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "ro" / "ledger.sqlite"
    path.parent.mkdir()
    with Ledger(path, "test") as ledger:
        ledger.tensor(0, "berlin", "up", "train", 7)
    before = path.read_bytes()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with Ledger(path, read_only=True) as ledger:
            assert ledger.totals()["up"]["tensor"] == 7
            assert [found.name for found in path.parent.iterdir()] == [path.name]
    finally:
        path.parent.chmod(0o755)
    assert path.read_bytes() == before


def test_renaming_moves_what_was_booked(ledger: Ledger) -> None:
    ledger.tensor(0, "node 7", "up", "train", 3)
    ledger.message(0, "node 7", "up", "train", 4, 1)
    ledger.rename("node 7", "berlin")
    (row,) = ledger.per_client_round()
    assert (row.client, row.tensor, row.message) == ("berlin", 3, 4)


def test_refuses_what_is_not_its_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger(tmp_path / "none.sqlite", read_only=True)
    (tmp_path / "text").write_text("no database, " * 100)
    with pytest.raises(LedgerError, match="cannot open the ledger"):
        Ledger(tmp_path / "text", read_only=True)
    Ledger(tmp_path / "ledger.sqlite", "one").close()
    with pytest.raises(LedgerError, match="run 'one', expected 'two'"):
        Ledger(tmp_path / "ledger.sqlite", "two")
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    with pytest.raises(LedgerError, match="format '99', expected '1'"):
        Ledger(tmp_path / "ledger.sqlite")


def test_refuses_an_unknown_direction(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="direction 'sideways', expected 'up' or 'down'"):
        ledger.tensor(0, "berlin", "sideways", "train", 1)


# ------------------------------------------------------------------------------------------ Flower messages


def packed(nbytes: int) -> Message:
    records = RecordDict({"fedalloy": ConfigRecord({"plan": b"p" * 300})})
    if nbytes:
        array = Array(dtype="uint8", shape=(nbytes,), stype="fedalloy.adapter.v1", data=b"\7" * nbytes)
        records["adapters"] = ArrayRecord({"global": array})
    return Message(records, dst_node_id=2**63 + 5, message_type="train.plan")


@pytest.mark.parametrize(("nbytes", "objects"), [(0, 3), (100_000, 6), (6_000_000, 7)])
def test_message_cost_is_what_is_serialised(nbytes: int, objects: int) -> None:
    message = packed(nbytes)
    cost = message_cost(message, "down")
    assert cost.objects == objects
    assert cost.calls == objects + 2
    bodies = sum(len(item.deflate()) for item in get_all_nested_objects(message).values())
    bare = message_to_proto(remove_content_from_message(message)).ByteSize()
    # Beyond that: the object tree and a few bytes of protobuf around each.
    assert 0 < cost.bytes - bodies - bare < 120 * objects
    assert cost.tls_records >= nbytes // 16384 - objects


def test_a_reply_costs_calls_upwards() -> None:
    request = packed(0)
    request.metadata.__dict__["_message_id"] = "0" * 64
    reply = Message(packed(50_000).content, reply_to=request)
    down, up = message_cost(request, "down"), message_cost(reply, "up")
    assert up.calls == up.objects + 1 == 7
    assert up.bytes > 50_000
    assert up.control_bytes > 6 * 64  # the SuperLink names each object that it wants
    assert down.control_bytes > 4 * 64


def test_an_answer_that_the_superlink_made_up_is_not_booked(ledger: Ledger) -> None:
    reply = packed(0)
    reply.metadata.__dict__["_src_node_id"] = 1
    assert ledger.flower_message(1, "berlin", "up", "train", reply) is None
    assert ledger.totals()["up"]["message"] == 0


def test_flower_message_books_all_levels(ledger: Ledger) -> None:
    cost = ledger.flower_message(1, "berlin", "down", "train", packed(100), 100)
    assert cost is not None
    (row,) = ledger.per_client_round()
    assert (row.tensor, row.message) == (100, cost.bytes)


@pytest.mark.parametrize(("nbytes", "records"), [(0, 0), (16379, 0), (16380, 1), (5_000_000, 305)])
def test_extra_records(nbytes: int, records: int) -> None:
    assert extra_records(nbytes) == records


def test_bundle_size_is_the_bundles(tmp_path: Path) -> None:
    app = tmp_path / "app"
    (app / "server_app").mkdir(parents=True)
    (app / "client_app").mkdir()
    (app / "pyproject.toml").write_text(
        '[project]\nname = "tiny"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = ["flwr>=1.39.0"]\n'
        '[tool.flwr.app]\npublisher = "test"\n'
        '[tool.flwr.app.components]\nserverapp = "server_app:app"\nclientapp = "client_app:app"\n'
        "[tool.flwr.app.config]\nseed = 0\n"
    )
    (app / "server_app" / "__init__.py").write_text("app = 1\n" * 5000)
    (app / "client_app" / "__init__.py").write_text("app = 2\n")
    bundle = build_fab_from_disk(app)
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        archive.extractall(unpacked)
    (unpacked / ".info" / "CONTENT").unlink()
    (unpacked / "client_app" / "__pycache__").mkdir()
    (unpacked / "client_app" / "__pycache__" / "x.pyc").write_bytes(b"made by running it")
    assert bundle_size(unpacked) == len(bundle)


# -------------------------------------------------------------------------------------------------- sampler


class Kernel:
    """A scripted socket table and clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.sockets: dict[int, Connection] = {}
        monkeypatch.setattr(fleet_sampler, "SocketTable", lambda: self)
        monkeypatch.setattr(fleet_sampler, "server_connections", lambda table, port: table.connections(port))
        monkeypatch.setattr(fleet_sampler, "find_ancestor", lambda program: (7, ["flower-superlink", "--ssl-certfile"]))
        monkeypatch.setattr(fleet_sampler, "time", self)
        monkeypatch.setattr(FleetSampler, "_sample", lambda sampler: None)

    def time(self) -> float:
        return self.now

    def connections(self, port: int) -> list[Connection]:
        return list(self.sockets.values())

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


# -------------------------------------------------------------------------------------------------- report


def printed(path: Path) -> str:
    out = io.StringIO()
    print_traffic(path, Console(file=out, width=80))
    return out.getvalue()


def test_report_fits_80_columns_and_adds_up(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite", "test") as ledger:
        reconciled(ledger, extra_up=777)
        ledger.tensor(1000, "a-client-with-a-very-long-name", "down", "train", 12_345_678_901)
        ledger.message(1000, "a-client-with-a-very-long-name", "down", "train", 12_345_678_999, 6)
        text, totals = printed(tmp_path), ledger.totals()
    assert max(map(len, text.splitlines())) <= 80
    assert "12,345,678,901" in text
    for levels in totals.values():
        assert f"{levels['wire']:,}" in text
    assert "unexplained" in text
    assert "777" in text


@pytest.mark.parametrize("measured", [True, False])
def test_report_says_what_was_not_measured(tmp_path: Path, measured: bool) -> None:
    with Ledger(tmp_path / "ledger.sqlite", "test") as ledger:
        assert "Nothing has been sent yet." in printed(tmp_path)
        ledger.message(0, "berlin", "up", "train", 30, 6)
        if not measured:
            ledger.server_reading(0, "", "start", [], not_measured="a simulation has no network")
        ledger.client_reading(0, "berlin", reading(at_client(100, 100)))
    text = " ".join(printed(tmp_path).split())
    assert ("wire not measured at server: a simulation has no network" in text) is not measured
    assert "the server does not see this client under its own address" in text


def test_report_of_a_folder_without_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger at"):
        printed(tmp_path)


def test_rows_have_one_place(ledger: Ledger) -> None:
    """Client and direction of a row are unique per round, whatever was booked how often."""
    two_rounds(ledger)
    for _ in range(3):
        ledger.message(1, "berlin", "up", "train", 10, 1)
    keys: list[Any] = [(row.round, row.client, row.direction) for row in ledger.per_client_round()]
    assert len(keys) == len(set(keys)) == 4
