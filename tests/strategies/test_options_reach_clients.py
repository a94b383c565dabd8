"""Options that no published table sets: each changes what a client is asked to do, or what is merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedalloy_adapters.factors import factor_to_proto
from fedalloy_adapters.layout import Factor
from proto.fedalloy.v1 import plan_pb2
from tests.strategies.fleet import Fleet


def steps_of(name: str, kind: str, **options: Any) -> list[Any]:
    brief = Fleet(name, **options).brief("ada")
    return [getattr(step, kind) for step in brief.steps if step.HasField(kind)]


@pytest.mark.parametrize("name", ["apfl", "fedalt"])
def test_gates_learn_at_a_rate_of_their_own(name: str) -> None:
    found: list[plan_pb2.TrainStep] = steps_of(name, "train", gate_rate=0.5)
    gate = factor_to_proto(Factor.GATE)
    scales = [(step.learning_rate, item.scale) for step in found for item in step.rate_scales if item.factor == gate]
    assert scales
    assert all(rate * scale == pytest.approx(0.5) for rate, scale in scales)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedamp", {"sigma": 0.01}),
        ("fedex-lora", {"uniform": True}),
        ("co-pfl", {"direction_share": 0.0}),
        ("pfedhn", {"rate": 0.25}),
    ],
)
def test_other_adapters_come_of_another_merge(name: str, options: dict[str, Any]) -> None:
    def after(fleet: Fleet) -> torch.Tensor:
        for _ in range(2):
            fleet.play()
        return torch.cat([adapter.vector for adapter in fleet.brief("ada").adapters.values()])

    plain, other = after(Fleet(name)), after(Fleet(name, **options))
    assert plain.shape == other.shape
    assert not torch.equal(plain, other)
    assert torch.equal(plain, after(Fleet(name)))
