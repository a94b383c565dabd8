"""LoRA-FAIR: the correction against a least-squares problem with dense matrices, and its limits."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.layout import Factor
from strategies.algorithms.lora_fair import correction
from strategies.families.fedavg import average
from tests.strategies.conftest import random_adapter
from tests.strategies.fleet import LAYOUT, SHARES, Fleet, dense


def test_the_correction_minimises_the_damped_squared_distance() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(2, 6, generator=draw), torch.randn(5, 2, generator=draw)) for _ in range(3)]
    shares, damping = [0.5, 0.2, 0.3], 0.1
    found = correction(pairs, shares, damping)
    a = sum(s * p[0].double() for s, p in zip(shares, pairs, strict=True))
    b = sum(s * p[1].double() for s, p in zip(shares, pairs, strict=True))
    meant = sum(s * p[1].double() @ p[0].double() for s, p in zip(shares, pairs, strict=True))
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    strength = damping * float((a @ a.T).diagonal().mean())
    x = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    loss = ((b + x) @ a - meant).square().sum() + strength * x.square().sum()
    solution = torch.linalg.lstsq(
        torch.cat([a.T, strength**0.5 * torch.eye(2, dtype=torch.float64)]),
        torch.cat([(meant - b @ a).T, torch.zeros(2, 5, dtype=torch.float64)]),
    ).solution.T  # the same problem, stacked
    torch.testing.assert_close(found, solution)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.norm() > 1  # zero is not the solution


def test_a_large_damping_is_fedavg_and_a_small_one_is_nearer_to_the_exact_average() -> None:
    uploads = {f"c{i}": random_adapter(LAYOUT, i) for i in range(3)}
    counts = dict.fromkeys(uploads, 1)
    exact = average(list(uploads.values()), [1, 1, 1], "delta")

    def distance(damping: float) -> float:
        fleet = Fleet("lora-fair", damping=damping)
        merged = fleet.strategy.average(uploads, counts)  # type: ignore[attr-defined]
        return float(sum((dense(merged, m) - dense(exact, m)).norm() for m in LAYOUT.lora_modules))

    plain = average(list(uploads.values()), [1, 1, 1])
    assert distance(1e9) == pytest.approx(
        float(sum((dense(plain, m) - dense(exact, m)).norm() for m in LAYOUT.lora_modules)), rel=1e-4
    )
    assert distance(0.01) < distance(1.0) < distance(1e9)


def test_equal_uploads_need_no_correction_and_heads_are_averaged() -> None:
    fleet = Fleet("lora-fair")
    for node in fleet.nodes:
        node.move = lambda name, round_, received: random_adapter(LAYOUT, 7)
    fleet.play()
    sent = fleet.brief("ada").adapters["global"]
    expected = random_adapter(LAYOUT, 7)
    for module in LAYOUT.lora_modules:
        torch.testing.assert_close(dense(sent, module), dense(expected, module), rtol=0.02, atol=0.05)
    torch.testing.assert_close(sent["head", Factor.BIAS], expected["head", Factor.BIAS])
    assert sum(SHARES) == pytest.approx(1)
