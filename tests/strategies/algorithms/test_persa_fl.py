"""PersA-FL: a client's change counts, wherever it began; without delay it is Per-FedAvg."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from strategies.algorithms.persa_fl import PersAFL
from tests.strategies.algorithms.test_per_fedavg import towards_one
from tests.strategies.fleet import LAYOUT, SHARES, Fleet, exchange


def fleet_of(name: str, **options: float | str) -> Fleet:
    fleet = Fleet(name, **options)
    for node in fleet.nodes:
        node.move = towards_one
    return fleet


def model_of(fleet: Fleet) -> torch.Tensor:
    return fleet.strategy.state().tensors["model"].clone()


def test_in_time_it_is_per_fedavg() -> None:
    ends = []
    for name in ("per-fedavg", "persa-fl"):
        fleet = fleet_of(name, turns=2)
        fleet.play()
        fleet.play()
        ends.append(model_of(fleet))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_late_answer_counts_for_what_it_moved_by_its_share_and_its_age(decay: float) -> None:
    """Cyd's answer to round 1 comes two rounds late, when the others have moved on."""
    fleet = fleet_of("persa-fl", decay=decay)
    strategy = fleet.strategy
    cyd = strategy.clients["cyd"]
    ((_, late),) = exchange(strategy, fleet.grid, 1, {cyd: strategy.brief(1, cyd)})
    moved = late.adapters["global"].vector - late.received["global"].vector
    for _ in range(2):
        fleet.play(only=("ada", "ben"))
    before = model_of(fleet)
    weight = strategy.late_weight(2)
    assert weight == pytest.approx(3**-decay)
    strategy.absorb_late(3, cyd, late, weight)
    assert strategy.settle(3) == {"merged": 1, "late": {"cyd": weight}}
    torch.testing.assert_close(model_of(fleet), before + weight * moved, rtol=0, atol=1e-6)
    assert float(moved.norm()) > 0.01

    # Beside an answer in time, each counts by its share of the examples that arrived.
    before = model_of(fleet)
    ada = strategy.clients["ada"]
    ((_, here),) = exchange(strategy, fleet.grid, 4, {ada: strategy.brief(4, ada)})
    strategy.absorb(4, ada, here)
    strategy.absorb_late(4, cyd, late, 0.5)
    strategy.settle(4)
    of_ada = here.adapters["global"].vector - here.received["global"].vector
    share = SHARES[0] / (SHARES[0] + SHARES[2])
    expected = before + share * of_ada + (1 - share) * 0.5 * moved
    torch.testing.assert_close(model_of(fleet), expected, rtol=0, atol=1e-6)


def test_staleness_is_bounded() -> None:
    strategy = Fleet("persa-fl", staleness=2, decay=1.0).strategy
    assert [strategy.late_weight(rounds) for rounds in (1, 2, 3)] == [1 / 2, 1 / 3, 0.0]


def test_a_moreau_turn_moves_part_of_the_way_to_the_clients_own_and_that_is_delivered() -> None:
    fleet = fleet_of("persa-fl", envelope="moreau", turns=1, move=0.25, rate=1.0, pull=0.3)
    start = model_of(fleet)
    plan = fleet.brief("ada").steps
    (train,) = [step.train for step in plan if step.HasField("train")]
    assert (train.proximal.slot, train.proximal.mu, train.steps) == ("global", 0.3, 30)
    fleet.play()
    own = start + 0.1 * (1 - start)
    torch.testing.assert_close(model_of(fleet), start + 0.25 * (own - start), rtol=0, atol=1e-6)
    now = model_of(fleet)
    torch.testing.assert_close(fleet.deliver()["ada"].vector, now + 0.1 * (1 - now), rtol=0, atol=1e-6)


def test_state_continues_to_the_bit() -> None:
    fleet = fleet_of("persa-fl")
    fleet.play()
    again = PersAFL(fleet.strategy.options, seed=3)
    for client in fleet.strategy.clients.values():
        again.enrol(client)
    again.load_state(fleet.strategy.state())
    one, other = (s.brief(2, s.clients["ada"]).adapters["global"] for s in (fleet.strategy, again))
    assert isinstance(one, Adapter)
    assert one.layout.digest == LAYOUT.digest
    assert torch.equal(one.vector, other.vector)
