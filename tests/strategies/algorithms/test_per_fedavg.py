"""Per-FedAvg: how a round's steps are divided, and that a turn adds the steps that start from the adapted adapter."""

from __future__ import annotations

import torch

from fedalloy_adapters.adapter import Adapter
from strategies.algorithms.per_fedavg import PerFedAvg, PerFedAvgOptions
from tests.strategies.fleet import Fleet


def towards_one(name: str, round_: int, received: Adapter) -> Adapter:
    """A gradient step on half the squared distance to one, at rate 0.1."""
    return Adapter(received.layout, received.vector + 0.1 * (1 - received.vector))


def test_a_turn_moves_the_global_adapter_by_the_gradient_at_the_adapted_one() -> None:
    fleet = Fleet("per-fedavg", turns=2)
    for node in fleet.nodes:
        node.move = towards_one
    start = fleet.brief("ada").adapters["global"].vector.clone()
    fleet.play()
    for _ in range(2):
        adapted = start + 0.1 * (1 - start)
        start = start + 0.1 * (1 - adapted)
    torch.testing.assert_close(fleet.strategy.state().tensors["model"], start, rtol=0, atol=1e-6)
    saved = fleet.deliver()["ada"].vector
    torch.testing.assert_close(saved, start + 0.1 * (1 - start), rtol=0, atol=1e-6)


def test_local_steps_are_divided_among_turns_and_lines() -> None:
    for turns, total in ((5, 30), (5, 13), (50, 7), (1, 1)):
        shares = PerFedAvg(PerFedAvgOptions(turns=turns)).shares(total)
        assert sum(adapt + move for adapt, move in shares) == total
        assert all(move >= 1 and 0 <= move - adapt <= 1 for adapt, move in shares)
