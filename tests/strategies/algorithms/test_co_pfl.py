"""CO-PFL: weights by contribution, with a bound for clients that report a large loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.algorithms.co_pfl import contributions
from tests.strategies.fleet import NAMES, Fleet


@given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_weights_are_shares(count: int, share: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    found = contributions(torch.randn(count, 5, generator=draw), torch.rand(count, generator=draw) * 9, share)
    assert found.sum() == pytest.approx(1)
    assert bool((found >= 0).all())


def test_whoever_goes_another_way_counts_more() -> None:
    updates = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    found = contributions(updates, torch.ones(3), 1.0)
    assert found.argmax() == 2
    naive = []
    for index in range(3):
        others = sum((updates[j] for j in range(3) if j != index), torch.zeros(2))
        naive.append(1 - float(torch.dot(updates[index], others) / updates[index].norm() / others.norm()))
    assert found.tolist() == pytest.approx([n / sum(naive) for n in naive], abs=1e-6)


def test_a_loss_counts_at_most_twice_the_median() -> None:
    honest, lied = torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 1e9])
    updates = torch.ones(4, 3)
    assert torch.equal(contributions(updates, honest, 0.0), contributions(updates, lied, 0.0))
    assert contributions(updates, lied, 0.0)[3] == pytest.approx(2 / 5)
    assert contributions(torch.zeros(4, 3), torch.zeros(4), 0.0).tolist() == [0.25] * 4


def test_the_shared_part_is_averaged_by_contribution() -> None:
    fleet = Fleet("co-pfl")
    before = fleet.brief("ada").adapters["global"].vector
    record = fleet.play()
    weights = record["weights"]
    assert set(weights) == set(NAMES)
    expected = sum(
        weights[who] * fleet[who].slots["global"].select(modules=("q_proj", "v_proj")).vector.double() for who in NAMES
    )
    after = fleet.brief("ada").adapters["global"].vector
    torch.testing.assert_close(after.double(), torch.as_tensor(expected), rtol=0, atol=1e-5)
    assert not torch.equal(before, after)
