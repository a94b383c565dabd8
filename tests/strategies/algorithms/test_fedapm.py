"""FedAPM: the dual variable, and its consensus for quadratic losses."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from strategies.algorithms.fedapm import FedAPM, FedAPMOptions
from tests.strategies.conftest import client_of
from tests.strategies.fleet import COUNTS, LAYOUT, NAMES, SHARES, Fleet

BODY = ("q_proj", "v_proj")
GOALS = dict(zip(NAMES, (1.0, -2.0, 4.0), strict=True))
CURVATURES = dict(zip(NAMES, (1.0, 3.0, 0.5), strict=True))


def played(rho: float, rounds: int) -> Fleet:
    """Clients that minimise exactly: ``c/2 (u - goal)^2 + rho/2 (u - centre)^2``."""
    fleet = Fleet("fedapm", rho=rho)

    def minimise(name: str, round_: int, received: Adapter) -> Adapter:
        if received.layout.modules == ("head",):
            return received
        node = fleet[name]
        centre = node.slots["centre"].part(received.layout).vector
        c, goal = CURVATURES[name], GOALS[name]
        return Adapter(received.layout, (c * goal + rho * centre) / (c + rho))

    for node in fleet.nodes:
        node.move = minimise
    for _ in range(rounds):
        fleet.play()
    return fleet


def test_the_consensus_minimises_the_weighted_sum_of_the_losses() -> None:
    """ADMM's fixed point, which is no average of minimisers: with weights p, sum p c (u - goal) = 0."""
    found = played(1.0, 60).brief("ada").adapters["global"].select(modules=BODY).vector
    above = sum(p * CURVATURES[n] * GOALS[n] for p, n in zip(SHARES, NAMES, strict=True))
    below = sum(p * CURVATURES[n] for p, n in zip(SHARES, NAMES, strict=True))
    torch.testing.assert_close(found, torch.full_like(found, above / below), rtol=0, atol=1e-3)


def test_the_dual_is_the_sum_of_what_the_client_was_away_and_never_travels() -> None:
    fleet = Fleet("fedapm", rho=0.5)
    assert next(s.merge.target for s in fleet.brief("ada").steps if s.HasField("merge")) == "dual"
    fleet.play()
    dual, away = fleet["ada"].slots["dual"], fleet["ada"].slots
    moved = away["global"].vector - away["received"].vector
    torch.testing.assert_close(dual.vector, moved)
    torch.testing.assert_close(away["sent"].vector, away["global"].vector + dual.vector)
    targets = [step.merge.target for step in fleet.brief("ada").steps if step.HasField("merge")]
    assert targets == ["received", "centre", "dual", "sent"]  # the dual goes on
    (pulled,) = [s.train for s in fleet.brief("ada").steps if s.HasField("train") and s.train.HasField("proximal")]
    assert (pulled.proximal.slot, pulled.proximal.mu, list(pulled.part.modules)) == ("centre", 0.5, list(BODY))
    heads = {fleet[who].slots["global"].select([Factor.WEIGHT]).digest for who in NAMES}
    assert len(heads) == 3


def test_state_knows_who_holds_a_dual() -> None:
    fleet = Fleet("fedapm")
    fleet.play(only=("ada", "ben"))
    again = FedAPM(FedAPMOptions(), seed=3)
    for index, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)):
        again.enrol(client_of(name, LAYOUT, count, node_id=index + 1))
    again.load_state(fleet.strategy.state())
    assert again.duals == {"ada", "ben"}


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="rho"):
        FedAPMOptions(rho=-1.0)
