"""Truncation to a lower rank is the singular value decomposition of the dense delta."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import (
    Coefficient,
    distance,
    stack,
    truncate,
)
from fedalloy_adapters.layout import Factor, LayoutError
from tests.fedalloy_adapters.dense import ADAPTERS, PER_MODULE, assert_close, dense_sum
from tests.fedalloy_adapters.samples import dense, flat, layout_of, random_adapter, tensor_of


def best_approximation(matrix: Tensor, rank: int) -> Tensor:
    u, sigma, v_t = torch.linalg.svd(matrix)
    rank = min(rank, len(sigma))
    approximation: Tensor = u[:, :rank] @ torch.diag(sigma[:rank]) @ v_t[:rank]
    return approximation


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 9])
def test_truncation_is_the_svd_of_the_dense_sum(rank: int) -> None:
    coefficients: list[Coefficient] = [0.5, -0.2, PER_MODULE[0]]
    target = layout_of(rank, scalings={"q_proj": 2.0, "v_proj": 0.5})
    found = truncate(stack(ADAPTERS, coefficients), target)
    total = dense_sum(ADAPTERS, coefficients)
    expected = {name: best_approximation(m, rank) if "." not in name else m for name, m in total.items()}
    assert found.layout is target
    assert_close(dense(found), expected, 1e-12)


def test_truncation_has_the_least_error_possible() -> None:
    layout = layout_of(6, 0.7, {"q": (20, 30)}, head=None)
    adapter = random_adapter(layout, 0, torch.float64)
    tail = torch.linalg.svdvals(dense(adapter)["q"])[2:].norm()
    cut = truncate(adapter, layout_of(2, 3.0, {"q": (20, 30)}, head=None))
    assert distance(adapter, cut) == pytest.approx(float(tail), rel=1e-12)


def test_truncation_splits_singular_values_evenly() -> None:
    layout = layout_of(3, 2.0, {"q": (8, 9)}, head=None)
    adapter = random_adapter(layout, 0, torch.float64)
    root = torch.linalg.svdvals(dense(adapter)["q"])[:3].sqrt()
    cut = truncate(adapter, layout)
    a, b = tensor_of(cut, "q", Factor.A), tensor_of(cut, "q", Factor.B)
    assert torch.allclose(a @ a.T, torch.diag(root.square()), atol=1e-12)
    assert torch.allclose(2.0 * b.T @ b * 2.0, torch.diag(root.square()), atol=1e-12)


@pytest.mark.parametrize("target_rank", [1, 2, 5])
def test_truncation_of_a_rank_deficient_delta(target_rank: int) -> None:
    """Rank 4 on paper, 1 in truth: the same rank-1 delta four times over."""
    one = random_adapter(layout_of(1, 2.0), 0, torch.float64)
    adapter = stack([one] * 4, [1.0, 2.0, -0.5, 0.25])
    found = truncate(adapter, layout_of(target_rank, 0.5))
    assert found.is_finite
    assert_close(dense(found), dense_sum([one], [2.75]), 1e-12)


def test_truncation_of_nothing_is_nothing() -> None:
    for rank in (1, 2, 9):
        found = truncate(Adapter.zeros(layout_of(3)), layout_of(rank))
        assert not found.vector.any()
    # A trained A with an untrained B, as on the first day.
    assert not flat(dense(truncate(Adapter.initial(layout_of(3), 0), layout_of(2)))).any()


def test_truncation_pads_with_zeros_where_the_target_rank_exceeds_the_adapter() -> None:
    adapter = random_adapter(layout_of(1, 2.0), 0, torch.float64)
    found = truncate(adapter, layout_of(3, 1.0))
    assert not found["q_proj", Factor.A][1:].any()
    assert not found["q_proj", Factor.B][:, 1:].any()
    assert_close(dense(found), dense(adapter), 1e-12)


def test_truncation_of_a_delta_that_is_not_finite_is_refused_by_name() -> None:
    adapter = random_adapter(layout_of(1, 2.0), 0, torch.float32)
    adapter.vector.mul_(1e30)  # finite, and B A is not
    with pytest.raises(LayoutError, match="delta of module 'q_proj' has numbers that are not finite"):
        truncate(adapter, layout_of(1))


def test_truncation_in_float32_is_accurate_to_float32() -> None:
    layout = layout_of(16, 2.0, {"q": (64, 48)}, head=(3, 5))
    adapter = random_adapter(layout, 0)
    found = truncate(adapter, layout_of(8, 2.0, {"q": (64, 48)}))
    assert found.vector.dtype == torch.float32
    assert_close({"q": dense(found)["q"]}, {"q": best_approximation(dense(adapter)["q"], 8)}, 3e-6)
    assert torch.equal(found["classifier", Factor.WEIGHT], adapter["classifier", Factor.WEIGHT])
