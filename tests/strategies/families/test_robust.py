"""Averages that one client alone cannot take over."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from strategies.algorithms.fedavg import FedAvgOptions
from strategies.algorithms.fedmosaic_relevance import capped, relevance
from strategies.algorithms.potara_weights import heterogeneity, plug_in, random_effects, shared_variance, tempered
from strategies.families.robust import robust_average
from strategies.framework.options import OptionError
from tests.faults.reports import LAYOUT


def uploads(*values: float) -> list[Adapter]:
    return [Adapter(LAYOUT, torch.full((LAYOUT.size,), value)) for value in values]


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("median", (1.0, 2.0, 9e8), 2.0),
        ("median", (1.0, 2.0, 4.0, -9e8), 1.5),
        ("trimmed", (1.0, 2.0, 4.0, 9e8), 3.0),
        ("krum", (1.0, 1.5, 3.0, 9e8), 1.0),
        ("median", (1.0, 2.0), 1.5),
    ],
)
def test_one_upload_of_any_size_hardly_moves_the_result(rule: str, values: tuple[float, ...], expected: float) -> None:
    found = robust_average(uploads(*values), rule)
    torch.testing.assert_close(found.vector, torch.full((LAYOUT.size,), expected))


def test_options_say_what_goes_together() -> None:
    with pytest.raises(OptionError, match=r"fedavg\.robust = 'median' with fedavg\.space = 'delta'"):
        FedAvgOptions(space="delta", robust="median")
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        robust_average(uploads(1.0, 2.0, 3.0), "best")


def test_one_clients_numbers_do_not_decide_the_others_weights() -> None:
    shares = torch.full((4,), 0.25, dtype=torch.float64)
    b = torch.tensor([1.0, 1.2, 0.9, 1.1], dtype=torch.float64)
    q = torch.tensor([2.0, 2.1, 1.9, 2.2], dtype=torch.float64)
    lied_b, lied_q = b.clone(), q.clone()
    lied_b[3], lied_q[3] = 1e60, 1e60
    honest = {
        "shared": (shared_variance(b, shares), shared_variance(lied_b, shares)),
        "random": (random_effects(b, q, shares), random_effects(lied_b, lied_q, shares)),
        "plugin": (plug_in(b, q, shares), plug_in(lied_b, lied_q, shares)),
    }
    for before, after in honest.values():
        assert all(weight.value > 0.05 for weight in after[:3])
        assert all(abs(one.value - other.value) < 0.6 for one, other in zip(before[:3], after[:3], strict=True))
    assert heterogeneity(lied_b, lied_q, shares) < 10 * heterogeneity(b, q, shares) + 10
    assert torch.equal(tempered(b), b)
    assert torch.equal(tempered(lied_b[2:]), lied_b[2:])  # two clients have no median


def test_a_sketch_that_looks_like_everybodys_is_not_the_whole_of_anybodys_adapter() -> None:
    similar = torch.tensor([[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.2, 0.9], [0.2, 0.2, 1.0, 0.9], [0.9, 0.9, 0.9, 1.0]])
    everyone = torch.ones(4, 4, dtype=torch.bool)
    free, kept = (relevance(similar, 0.2, everyone, most=most) for most in (1.0, 0.5))
    assert float(free[:3, 3].min()) > 0.9
    torch.testing.assert_close(kept[:3, 3], torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(kept.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(capped(free, 1.0), free)
    one = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(capped(one, 0.5), one)  # a single peer has the whole weight
