"""Where every byte went: each category has a source of its own, and the rest is unexplained."""

from __future__ import annotations

from typing import Any

import pytest

from server_app.ledger.flower_costs import BundleCost
from server_app.ledger.reconciliation import CATEGORIES
from server_app.ledger.store import Ledger
from tests.server_app.ledger.samples import (
    CALL_DOWN,
    CALL_UP,
    HEADER,
    at_client,
    at_server,
    reading,
    reconciled,
    two_rounds,
)


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
    """A client whose network was cut makes a new connection, but it is no new SuperNode."""
    ledger.bundle("berlin", BundleCost(up=110, down=4000, tls_records=1))
    ledger.message(1, "berlin", "down", "train", 1000, 6, calls=8)
    ledger.server_reading(0, "", "start", [at_server(0, 0)], unix_time=1)
    ledger.client_reading(0, "berlin", reading(at_client(100, 4000)), kind="query")
    ledger.server_reading(0, "berlin", "gone", [at_server(100, 4000)], unix_time=2)
    ledger.server_reading(1, "berlin", "push", [at_server(0, 0, port=6)], unix_time=3)
    ledger.client_reading(1, "berlin", reading(at_client(100, arrived, port=6)), kind="train")
    ledger.server_reading(1, "", "final", [at_server(100, arrived, port=6)], unix_time=4)
    assert ledger.reconciliation()["down"]["app bundle"] == fetches * 4000


def test_a_node_that_has_become_a_client_has_fetched_one_bundle(ledger: Ledger) -> None:
    ledger.bundle("node 7", BundleCost(100, 4000, 1))
    ledger.bundle("node 8", BundleCost(100, 4000, 1))
    ledger.forget_bundle("node 7")
    assert [row.client for row in ledger.accounts().bundles] == ["node 8"]


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


def test_rows_have_one_place(ledger: Ledger) -> None:
    """There is one row per client, direction and round, however often something was booked."""
    two_rounds(ledger)
    for _ in range(3):
        ledger.message(1, "berlin", "up", "train", 10, 1)
    keys: list[Any] = [(row.round, row.client, row.direction) for row in ledger.accounts().rows()]
    assert len(keys) == len(set(keys)) == 4
