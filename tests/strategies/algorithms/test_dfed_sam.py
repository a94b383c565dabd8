"""DFedSAM: sharpness-aware steps, links in both directions, and averages that keep the sum and reach the mean."""

from __future__ import annotations

import pytest
import torch

from strategies.algorithms.dfed_sam import DFedSAM, DFedSAMOptions
from strategies.families.gossip import links_between
from tests.strategies.families.test_gossip import still
from tests.strategies.fleet import LAYOUT, NAMES, Fleet


@pytest.mark.parametrize("count", [1, 2, 7])
def test_weights_are_symmetric_and_rows_and_columns_sum_to_one(count: int) -> None:
    strategy = DFedSAM()
    links = strategy.links(links_between(count, 2, "seed"))
    found = strategy.mixing(links)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(count, dtype=torch.float64))
    assert bool((found >= 0).all())
    assert torch.equal(found > 0, (links > 0) | (torch.eye(count) > 0))
    if count == 7:
        degrees = links.sum(dim=0) - 1
        assert float(found[0, 1]) == float(links[0, 1]) / (1 + max(float(degrees[0]), float(degrees[1])))


@pytest.mark.parametrize("turns", [1, 3])
def test_gossip_keeps_the_sum_and_more_of_it_is_nearer_to_the_mean(turns: int) -> None:
    fleet = Fleet("dfed-sam", neighbours=1, gossip_steps=turns)
    for node in fleet.nodes:
        node.move = still
    record = fleet.play()
    vectors = torch.stack([fleet.brief(name).adapters["local"].vector.double() for name in NAMES])
    torch.testing.assert_close(vectors.mean(dim=0), torch.full((LAYOUT.size,), 2.0).double(), rtol=0, atol=1e-5)
    strategy = fleet.strategy
    assert isinstance(strategy, DFedSAM)
    links = strategy.links(links_between(3, 1, "3:1"))
    expected = torch.linalg.matrix_power(strategy.mixing(links), turns) @ torch.tensor([1.0, 2.0, 3.0]).double()
    torch.testing.assert_close(vectors[:, 0], expected, rtol=0, atol=1e-6)
    assert record == {"merged": 3, "peer_numbers": turns * (int(links.sum()) - 3) * LAYOUT.size}


def test_every_step_is_sharpness_aware() -> None:
    fleet = Fleet("dfed-sam", rho=0.25)
    (train,) = [step.train for step in fleet.brief("ada").steps if step.HasField("train")]
    assert train.sharpness_radius == 0.25
    assert not train.part.modules
    with pytest.raises(ValueError, match="rho"):
        DFedSAMOptions(rho=-1.0)
