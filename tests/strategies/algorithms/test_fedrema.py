"""FedReMa: which clients are relevant, and that only heads are personal."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from strategies.algorithms.fedrema import FedReMa, FedReMaOptions, most_relevant
from tests.strategies.conftest import client_of
from tests.strategies.fleet import COUNTS, LAYOUT, NAMES, Fleet

HEAD = (Factor.WEIGHT, Factor.BIAS)


def mean(fleet: Fleet, counts: dict[str, int], *factors: Factor) -> torch.Tensor:
    """The average of what the clients trained, of these factors."""
    found = [count * fleet[who].slots["local"].select(factors).vector.double() for who, count in counts.items()]
    return (torch.stack(found).sum(dim=0) / sum(counts.values())).float()


def test_the_cut_is_at_the_largest_difference() -> None:
    similarity = torch.tensor(
        [
            [1.0, 0.9, 0.8, 0.1, 0.0],
            [0.9, 1.0, 0.2, 0.1, 0.0],
            [0.8, 0.2, 1.0, 0.7, 0.1],
            [0.1, 0.1, 0.7, 1.0, -0.9],
            [0.0, 0.0, 0.1, -0.9, 1.0],
        ]
    )
    found = [[peer for peer in range(5) if row[peer]] for row in most_relevant(similarity)]
    assert found == [[0, 1, 2], [0, 1], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 4]]


def test_one_peer_is_relevant_and_without_any_a_client_is_its_own() -> None:
    assert most_relevant(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).all()
    assert most_relevant(torch.ones(1, 1)).tolist() == [[True]]


def alike(name: str, round_: int, received: Adapter) -> Adapter:
    """The heads of ada and cyd move in one direction, ben's in the other; each client's factors move in their own."""
    moved = received.clone()
    for entry, tensor in moved.items():
        way = NAMES.index(name) + 1.0 if entry.factor not in HEAD else {"ben": -1.0}.get(name, 1.0)
        tensor += way * round_ if entry.factor is not Factor.BIAS else 0.1 * NAMES.index(name)
    return moved


def played(rounds: int, **options: int) -> Fleet:
    fleet = Fleet("fedrema", **options)
    for node in fleet.nodes:
        node.move = alike
    for _ in range(rounds):
        fleet.play()
    return fleet


def test_heads_are_averaged_with_relevant_peers_and_the_rest_with_everybody() -> None:
    fleet = played(1)
    everybody = dict(zip(NAMES, COUNTS, strict=True))
    (sent,) = fleet.brief("ada").adapters.values()
    expected = mean(fleet, everybody, Factor.A, Factor.B)
    torch.testing.assert_close(sent.select([Factor.A, Factor.B]).vector, expected, rtol=0, atol=1e-5)
    near = {who: everybody[who] for who in ("ada", "cyd")}
    torch.testing.assert_close(sent.select(HEAD).vector, mean(fleet, near, *HEAD), rtol=0, atol=1e-5)
    saved = fleet.deliver()["ada"]
    torch.testing.assert_close(saved.vector, sent.vector, rtol=0, atol=1e-5)


def test_the_record_shows_how_much_each_head_counts() -> None:
    rows = played(2).play()["relations"]
    assert rows["ada"] == [round(10 / 30, 6), 0.0, round(20 / 30, 6)]
    assert all(sum(row) == pytest.approx(1) for row in rows.values())


def test_after_the_period_peers_are_those_of_the_record() -> None:
    found = {}
    for period in (2, 9):
        fleet = played(1, co_learning_rounds=period)
        before = fleet.play()["relations"]["ada"]
        for node in fleet.nodes:  # ben becomes like ada, and cyd does not
            node.move = lambda name, round_, received: alike({"ben": "cyd", "cyd": "ben"}.get(name, name), 99, received)
        found[period] = fleet.play()["relations"]["ada"] == before
    assert found == {2: True, 9: False}


def test_state_holds_the_record() -> None:
    fleet = played(3, co_learning_rounds=1)
    again = FedReMa(FedReMaOptions(co_learning_rounds=1), seed=3)
    for index, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)):
        again.enrol(client_of(name, LAYOUT, count, node_id=index + 1))
    again.load_state(fleet.strategy.state())
    assert again.weights == fleet.strategy.weights  # type: ignore[attr-defined]
