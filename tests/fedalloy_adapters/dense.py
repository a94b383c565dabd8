"""Sums of adapters as dense matrices: the second, naive way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import (
    Coefficient,
)
from tests.fedalloy_adapters.samples import dense, layout_of, random_adapter

# Three clients with ranks and scalings of their own; rank 7 exceeds both sizes of q_proj.
LAYOUTS = (
    layout_of(ranks={"q_proj": 2, "v_proj": 3}, scalings={"q_proj": 2.0, "v_proj": 0.5}),
    layout_of(ranks={"q_proj": 4, "v_proj": 1}, scalings={"q_proj": 0.3, "v_proj": 12.5 / 7}),
    layout_of(ranks={"q_proj": 7, "v_proj": 2}, scalings=1.0),
)
ADAPTERS = [random_adapter(layout, seed, torch.float64) for seed, layout in enumerate(LAYOUTS)]
PER_MODULE = [
    {"q_proj": 0.5, "v_proj": -1.25, "classifier": 2.0},
    {"q_proj": 0.0, "v_proj": 3.0, "classifier": 1 / 3},
    {"q_proj": 1e3, "v_proj": 1e-3, "classifier": -1.0},
]


def dense_sum(adapters: Sequence[Adapter], coefficients: Sequence[Coefficient]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for adapter, coefficient in zip(adapters, coefficients, strict=True):
        for name, delta in dense(adapter).items():
            module = name.removesuffix(".weight").removesuffix(".bias")
            factor = coefficient if isinstance(coefficient, float) else coefficient[module]
            total[name] = total.get(name, torch.zeros_like(delta)) + factor * delta
    return total


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        scale = max(float(matrix.norm()), 1e-300)
        assert float((found[name] - matrix).norm()) <= relative * scale, name
