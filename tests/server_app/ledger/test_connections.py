"""Bytes per round and direction, from what both ends read of a connection."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client_app.sockets import Connection
from server_app.ledger.connections import OTHER
from server_app.ledger.store import Ledger
from tests.server_app.ledger.samples import (
    HEADER,
    at_client,
    at_server,
    reading,
    two_rounds,
    wire_rows,
)


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
    other = {(row.round, row.direction): row.other_end for row in ledger.accounts().rows()}
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
    """The same address and port, but the server has received fewer bytes than the client was told had arrived."""
    ledger.server_reading(0, "", "start", [at_server(10, 10)], unix_time=1)
    ledger.client_reading(0, "berlin", reading(at_client(5000, 5)))
    assert ledger.accounts().unjoined() == ["berlin"]


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


@pytest.mark.parametrize("counters", [(0, 0), (900, 400), (8000, 5100), (7900, 5000)])
@pytest.mark.parametrize("first", [True, False])
def test_a_connection_has_one_claimant_and_a_thief_gets_nothing(
    ledger: Ledger, counters: tuple[int, int], first: bool
) -> None:
    def steal() -> None:
        ledger.client_reading(0, "thief", reading(replace(at_client(*counters), cookie=1)))

    if first:
        steal()
    two_rounds(ledger)
    if not first:
        steal()
    assert {(row[1], row[3]) for row in wire_rows(ledger, "up")} == {("berlin", "client")}
    assert ledger.totals()["up"]["wire"] == 7000 + HEADER * 50
    assert ledger.totals()["down"]["wire"] == 4600 + HEADER * 40


@pytest.mark.parametrize(
    "claim",
    [
        at_client(2**49, 5000, out=25, lost=2**49 - 3000),  # sent again and again, it says
        replace(at_client(3000, 5000, out=25, into=40), bytes_sent=2**49),
        at_client(3000, 5000, out=2**40, into=40),
        replace(at_client(3000, 5000, out=25, into=40), header_bytes=2**31),
    ],
)
def test_a_client_sent_no_more_than_the_server_has_counted(ledger: Ledger, claim: Connection) -> None:
    ledger.server_reading(0, "", "start", [at_server(0, 0)], unix_time=1)
    ledger.server_reading(1, "berlin", "push", [at_server(100, 100, into=1, out=1)], unix_time=2)
    ledger.client_reading(1, "berlin", reading(claim))
    ledger.server_reading(1, "", "final", [at_server(8000, 5100, into=60, out=45)], unix_time=3)
    assert ledger.totals()["up"]["wire"] == 8000 + HEADER * 60
    assert {row[3] for row in wire_rows(ledger, "up")} == {"server"}
