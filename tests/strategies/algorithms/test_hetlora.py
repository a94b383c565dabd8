"""HetLoRA: padding and cutting of factors, weights by size, clients of different ranks."""

from __future__ import annotations

import torch

from fedalloy_adapters.algebra import norm
from fedalloy_adapters.layout import Factor
from strategies.algorithms.hetlora import fitted
from tests.strategies.conftest import layout_of, random_adapter
from tests.strategies.fleet import Fleet, dense

LOW, HIGH = layout_of(rank=2), layout_of(rank=4)


def test_padding_keeps_the_delta_and_cutting_keeps_the_first_ranks() -> None:
    small = random_adapter(LOW, 1)
    padded = fitted(small, HIGH)
    for module in LOW.lora_modules:
        torch.testing.assert_close(dense(padded, module), dense(small, module))
        assert not padded[module, Factor.A][2:].any()
    torch.testing.assert_close(fitted(padded, LOW).vector, small.vector)
    large = random_adapter(HIGH, 2)
    cut = fitted(large, LOW)
    for module in LOW.lora_modules:
        a, b = large[module, Factor.A][:2].double(), large[module, Factor.B][:, :2].double()
        torch.testing.assert_close(dense(cut, module), HIGH.scalings[module] * b @ a, rtol=1e-5, atol=1e-5)


def test_clients_of_different_ranks_are_averaged_by_the_size_of_their_deltas() -> None:
    fleet = Fleet("hetlora", layouts=[LOW, HIGH, LOW])
    fleet.play()
    uploads = {node.name: node.slots["global"] for node in fleet.nodes}
    sizes = {name: norm(adapter) for name, adapter in uploads.items()}
    merged = sum(
        sizes[name] / sum(sizes.values()) * fitted(adapter, HIGH).vector.double() for name, adapter in uploads.items()
    )
    assert isinstance(merged, torch.Tensor)
    torch.testing.assert_close(fleet.brief("ben").adapters["global"].vector, merged.float(), rtol=0, atol=1e-5)
    sent = fleet.brief("ada").adapters["global"]
    assert sent.layout.digest == LOW.digest
    torch.testing.assert_close(sent.vector, fitted(fleet.brief("ben").adapters["global"], LOW).vector)
