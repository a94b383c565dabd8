"""A client that keeps failing is asked less often; one good answer brings it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from proto.fedalloy.v1 import plan_pb2
from server_app.run.clients.client_status import FAILED, LATE, LEFT, OK, REJECTED, RESTED, of_silence
from server_app.run.clients.strikes import LONGEST_REST, Strikes
from tests.faults.nodes import NodeGrid, nodes, run_nodes, statuses
from tests.strategies.conftest import client_of, layout_of


def asked(strikes: Strikes, rounds: int, status: str, least: int = 0) -> list[int]:
    """The rounds in which ``a`` is asked if its answers end like this; ``b`` and ``c`` are good."""
    clients: list[Any] = [client_of(name, layout_of()) for name in ("a", "b", "c")]
    found = []
    for round_ in range(1, rounds + 1):
        due = [client.id for client in strikes.due(round_, clients, least)]
        assert {"b", "c"} <= set(due)
        found += [round_] if "a" in due else []
        strikes.book(round_, {name: {"status": status if name == "a" else OK} for name in due})
        strikes = Strikes(strikes.allowed, json.loads(json.dumps(strikes.saved())))  # as a resumed run has them
    return found


@pytest.mark.parametrize("status", [LATE, REJECTED])
def test_rests_become_longer(status: str) -> None:
    found = asked(Strikes(3), 80, status)
    assert found[:6] == [1, 2, 3, 5, 8, 13]
    assert found[-1] - found[-2] == LONGEST_REST + 1


@pytest.mark.parametrize("status", [OK, FAILED, LEFT])
def test_who_costs_no_wait_is_always_asked(status: str) -> None:
    assert asked(Strikes(3), 8, status) == list(range(1, 9))


def test_who_is_slower_than_a_quorum_gets_no_strike() -> None:
    strikes = Strikes(1)
    for round_ in range(1, 6):
        strikes.book(round_, {"a": of_silence(20.0, 60.0, quorum=2), "b": of_silence(60.5, 60.0, quorum=2)})
    assert set(strikes.saved()) == {"b"}
    assert of_silence(20.0, 60.0, quorum=2)["reason"] == "no answer within 20 s, when the quorum's grace period ended"
    early = of_silence(20.0, 60.0)
    assert early == {"status": LATE, "reason": "no answer within 20 s, when most had long answered (grace-ratio)"}
    assert of_silence(60.5, 60.0) == {"status": LATE, "reason": "no answer within 60 s"}


def test_zero_is_no_strikes_and_where_it_is_needed_it_is_asked() -> None:
    assert asked(Strikes(0), 8, LATE) == list(range(1, 9))
    assert asked(Strikes(3), 8, LATE, least=3) == list(range(1, 9))


def test_no_more_than_are_needed_are_asked_while_they_rest() -> None:
    clients: list[Any] = [client_of(name, layout_of()) for name in ("a", "b", "c", "d")]
    strikes = Strikes(1, {"a": [1, 9], "b": [1, 7], "c": [1, 7]})
    assert [client.id for client in strikes.due(5, clients, 2)] == ["b", "d"]
    assert [client.id for client in strikes.due(7, clients, 2)] == ["b", "c", "d"]


def test_a_run_asks_it_less_says_so_and_takes_it_back(tmp_path: Path) -> None:
    def lies(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        if plan.round < 5:
            honest.content.clear()
        return [honest]

    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: lies}), num_server_rounds=6)
    assert [round_["cyd"] for round_ in statuses(directory)] == [REJECTED] * 3 + [RESTED, OK, OK]
    rested = next(r for r in directory.rounds() if r["phase"] == "train" and r["round"] == 4)["clients"]["cyd"]
    assert rested["reason"] == "not asked after 3 rounds in a row without a usable answer; again in round 5"
