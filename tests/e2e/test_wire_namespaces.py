"""The ledger against counters that know nothing of TCP: a SuperLink and two SuperNodes in network namespaces.

Only Fleet traffic crosses a SuperNode's cable, from its first packet on, and the SuperNodes start after the run does.
So what the cable's interface has counted when the ledger takes its last reading is what the ledger must have found.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from server_app.ledger.reconciliation import POLL_INTERVAL, Accounts
from server_app.ledger.store import Ledger
from tests.e2e.fleet import Fleet, fleet
from tests.e2e.namespaces import NamespacesUnavailableError
from tests.in_process import EXACT

APP = Path(__file__).parents[2]
RUN = "wire"
CLIENTS = 2
# The kernel counts the SYN-ACK at the listening socket, and of the SYN all but 8 bytes of its options.
HANDSHAKE_UP, HANDSHAKE_DOWN = 8, 74
# Bytes that may cross while the ledger looks for the last time: a poll with its pings.
ONE_POLL = 2000


@dataclass
class Outcome:
    """A finished run: its accounts, and bytes up and down on each cable shortly before and after its last look."""

    accounts: Accounts
    before: list[tuple[int, int]]
    after: list[tuple[int, int]]


@pytest.fixture(scope="module", params=["tls", "plain"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Outcome:
    """One small run of the real app per transport."""
    directory = tmp_path_factory.mktemp(request.param)
    try:
        with fleet(directory, CLIENTS, tls=request.param == "tls") as federation:
            return _run(federation, directory, base_cache)
    except NamespacesUnavailableError as error:
        pytest.skip(str(error))


def _run(federation: Fleet, directory: Path, base_cache: Path) -> Outcome:
    ledger = directory / "runs" / RUN / "ledger.sqlite"
    config = {"runs-dir": str(directory / "runs"), "run-name": RUN, "scenario": "digits", "strategy": "fedavg"}
    config |= EXACT  # as in test_cluster.py
    numbers = {"num-server-rounds": 1, "min-clients": CLIENTS, "local-steps": 5, "lora-r": 32}
    values = [f'{key}="{value}"' for key, value in config.items()] + [
        f"{key}={value}" for key, value in numbers.items()
    ]
    federation.submit(APP, " ".join(values))
    _wait_for(lambda: bool(_reading_times(ledger, "start")), federation)
    for number in range(CLIENTS):
        state = directory / f"state{number}"
        state.mkdir()
        (state / ".cache").symlink_to(base_cache)
        node = f'partition-id={number} num-partitions={CLIENTS} client-id="client-{number}" state-dir="{state}"'
        federation.start_supernode(number, node)
        # The run waits for all of them; meanwhile the first one's lone polls show what a call costs.
        time.sleep(2.5 * POLL_INTERVAL if number == 0 else 0)
    looks: list[tuple[float, list[tuple[int, int]], float]] = []

    def finished() -> bool:
        begun = time.time()
        found = [federation.namespaces.counters(cable) for cable in federation.namespaces.cables]
        looks.append((begun, found, time.time()))
        return bool(_reading_times(ledger, "final"))

    _wait_for(finished, federation)
    finished()
    (end,) = _reading_times(ledger, "final")
    before = [found for _, found, ended in looks if ended <= end][-1]
    after = next(found for begun, found, _ in looks if begun >= end)
    _wait_for(lambda: federation.status().startswith("finished"), federation)
    assert federation.status() == "finished:completed", federation.log("superlink")
    with Ledger(ledger, read_only=True) as opened:
        return Outcome(opened.accounts(), before, after)


def _wait_for(condition: object, federation: Fleet) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 400
    while not condition():
        stopped = [process.args for process in federation.processes if process.poll() is not None]
        if stopped or time.monotonic() > deadline:
            raise AssertionError(f"stopped: {stopped}, or too slow\n{federation.log('superlink')}")
        time.sleep(0.05)


def _reading_times(ledger: Path, event: str) -> list[float]:
    try:
        with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as db:
            query = "SELECT time FROM reading WHERE end = 'server' AND event = ?"
            return [row[0] for row in db.execute(query, (event,))]
    except sqlite3.OperationalError:  # not there yet
        return []


def test_ledger_is_what_crossed_the_cable(outcome: Outcome) -> None:
    for number, (before, after) in enumerate(zip(outcome.before, outcome.after, strict=True)):
        wire = {direction: 0 for direction in ("up", "down")}
        for row in outcome.accounts.rows():
            if row.client == f"client-{number}":
                assert row.wire is not None
                wire[row.direction] += row.wire
        found = wire["up"] + HANDSHAKE_UP, wire["down"] + HANDSHAKE_DOWN
        for least, counted, most in zip(before, found, after, strict=True):
            assert least - ONE_POLL <= counted <= most + ONE_POLL
            assert most - least < counted / 20, "too long between two looks: they would hide an error"
        assert min(wire.values()) > 20 * ONE_POLL, "the tolerance would hide an error"


def test_both_ends_agree_to_the_byte(outcome: Outcome) -> None:
    """When a message has arrived, nothing is on its way: the client has all of it and has not answered yet."""
    links = [link for link in outcome.accounts.links if link.at_client and link.at_server]
    assert sorted(link.client for link in links) == [f"client-{number}" for number in range(CLIENTS)]
    for link in links:
        at_client = {
            (row.bytes_sent - row.bytes_retransmitted, row.bytes_received, row.round) for row in link.at_client
        }
        at_server = {
            (row.bytes_received, row.bytes_sent - row.bytes_retransmitted, row.round)
            for row in link.at_server
            if row.event == "handler"
        }
        # A heartbeat may be on its way just then, so not all; but such numbers do not agree by chance.
        assert at_client & at_server, link.client


def test_every_byte_has_a_reason(outcome: Outcome) -> None:
    fraction = outcome.accounts.unexplained_fraction()
    assert fraction is not None
    assert fraction < 0.01, outcome.accounts.reconciliation()
    for direction, categories in outcome.accounts.reconciliation().items():
        assert sum(categories.values()) == outcome.accounts.totals()[direction]["wire"]
        for name, count in categories.items():
            assert count >= 0 or name == "unexplained", (direction, name, count)
    assert outcome.accounts.reconciliation()["up"]["connection setup"] > 0


def test_levels_contain_each_other(outcome: Outcome) -> None:
    for levels in outcome.accounts.totals().values():
        assert levels["tensor"] is not None
        assert levels["message"] is not None
        assert levels["wire"] is not None
        assert 0 < levels["tensor"] < levels["message"] < levels["wire"]
    assert not outcome.accounts.not_measured()
    assert not outcome.accounts.unjoined()
