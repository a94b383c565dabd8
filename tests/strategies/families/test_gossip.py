"""Gossip: who sends to whom, conservation and consensus of push-sum, and the bytes of a network without a server."""

from __future__ import annotations

import torch

from fedalloy_adapters.adapter import Adapter
from strategies.algorithms.dfedpgp import DFedPGP
from strategies.families.gossip import Gossip, links_between
from tests.strategies.conftest import layout_of
from tests.strategies.fleet import LAYOUT, NAMES, Fleet

BODY = LAYOUT.select(modules=("q_proj", "v_proj"))


def still(name: str, round_: int, received: Adapter) -> Adapter:
    """In round 1 each client goes somewhere else; later nobody moves."""
    index = NAMES.index(name) if name in NAMES else 0
    return Adapter(received.layout, torch.full_like(received.vector, index + 1.0)) if round_ == 1 else received


def gossiping(**options: int) -> tuple[Fleet, Gossip]:  # type: ignore[type-arg]
    fleet = Fleet("dfedpgp", **options)
    for node in fleet.nodes:
        node.move = still
    assert isinstance(fleet.strategy, DFedPGP)
    return fleet, fleet.strategy


def test_links_are_random_directed_and_of_the_number_that_is_asked_for() -> None:
    found = links_between(6, 2, "seed")
    assert found.sum(dim=0).tolist() == [3.0] * 6  # two others, and itself
    assert bool(found.diagonal().all())
    assert not torch.equal(found, found.T)
    assert not torch.equal(found, links_between(6, 2, "other"))
    assert links_between(2, 9, "seed").tolist() == [[1, 1], [1, 1]]


def test_push_sum_conserves_the_sum_and_finds_the_mean() -> None:
    fleet, strategy = gossiping(neighbours=1)
    fleet.play()
    for _ in range(40):
        total = sum(strategy.mixed[name].vector.double() for name in NAMES)
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(total, torch.full_like(total, 6.0), rtol=0, atol=1e-4)
        assert abs(sum(strategy.push.values()) - 3) < 1e-9
        fleet.play()
    assert any(abs(weight - 1) > 1e-6 for weight in strategy.push.values())  # which the division makes good
    for name in NAMES:
        sent = fleet.brief(name).adapters["local"].vector
        torch.testing.assert_close(sent, torch.full_like(sent, 2.0), rtol=0, atol=1e-3)


def test_those_that_are_away_stay_as_they_are() -> None:
    fleet, strategy = gossiping()
    fleet.play()
    before = strategy.mixed["cyd"].vector.clone()
    fleet.play(only=("ada", "ben"))
    assert torch.equal(strategy.mixed["cyd"].vector, before)


def test_heads_stay_and_peers_numbers_are_counted() -> None:
    fleet, _ = gossiping(neighbours=1)
    record = fleet.play()
    assert record == {"merged": 3, "peer_numbers": 3 * BODY.size}
    trains = [step.train for step in fleet.brief("ada").steps if step.HasField("train")]
    assert [(list(train.part.modules), train.steps) for train in trains] == [(["head"], 15), (["q_proj", "v_proj"], 15)]
    assert fleet.brief("ada").adapters["local"].layout.digest == BODY.digest
    fleet = Fleet("dfedpgp", layouts=[layout_of(head=0)] * 3)
    assert fleet.play()["peer_numbers"] == 6 * BODY.size  # all of it, to both others


def test_state_continues_to_the_bit() -> None:
    fleet, strategy = gossiping(neighbours=1)
    fleet.play()
    fleet.play()
    again = DFedPGP(strategy.options, seed=3)
    for client in strategy.clients.values():
        again.enrol(client)
    again.load_state(strategy.state())
    for client in strategy.clients.values():
        mine, other = (s.brief(3, client).adapters["local"] for s in (strategy, again))
        assert torch.equal(mine.vector, other.vector)
