"""One-shot merge rules: each on numbers computed by hand, and in cases in which it is a plain mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import norm
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.parts import layout_of_gram
from strategies import STRATEGIES
from strategies.algorithms.dare import drop_and_rescale
from strategies.algorithms.nan_merge import inverse_norm_coefficients
from strategies.algorithms.regmean import regression_mean, symmetric
from strategies.algorithms.ties import elect_and_average, trim
from strategies.families.by_modules import bank_of
from tests.strategies.conftest import random_adapter
from tests.strategies.fleet import NAMES, SHARES, Fleet, dense

WIDE = Layout(
    (
        Entry("q", Factor.A, (6, 5)),
        Entry("q", Factor.B, (4, 6)),
        Entry("h", Factor.WEIGHT, (3, 4)),
        Entry("h", Factor.BIAS, (3,)),
    ),
    {"q": 2.0},
    "base",
)
"""A rank above both sizes: nothing is lost by truncation."""
RULES = ("nan", "task-arithmetic", "ties", "dare", "fisher-merge", "regmean")


def adapters(count: int = 3) -> list[Adapter]:
    return [random_adapter(WIDE, seed, dtype=torch.float64) for seed in range(count)]


def merged(name: str, found: list[Adapter], shares: list[float] = SHARES, extra: Any = None, **options: Any) -> Adapter:
    kind = STRATEGIES[name]
    strategy: Any = kind(kind.Options(**options), seed=4)
    more = extra or [{} for _ in found]
    slots = {"local": found} | {slot: [m[slot] for m in more] for slot in more[0]}
    return strategy.merge({slot: bank_of(uploads) for slot, uploads in slots.items()}, shares)  # type: ignore[no-any-return]


def close(found: Adapter, expected: Tensor, head: Tensor) -> None:
    torch.testing.assert_close(dense(found, "q"), expected.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found["h", Factor.WEIGHT].double(), head.double(), rtol=0, atol=1e-5)


def deltas(found: list[Adapter]) -> tuple[Tensor, Tensor]:
    return torch.stack([dense(a, "q") for a in found]), torch.stack([a["h", Factor.WEIGHT] for a in found])


def test_nan_weighs_by_inverse_norms() -> None:
    assert inverse_norm_coefficients([1.0, 2.0, 4.0]) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert inverse_norm_coefficients([3.0, 3.0]) == [0.5, 0.5]
    assert inverse_norm_coefficients([0.0, 3.0, 0.0]) == [0.5, 0.0, 0.5]
    found = adapters()
    weights = torch.tensor([1 / norm(a) for a in found], dtype=torch.float64)
    body, head = (torch.tensordot(weights / weights.sum(), part, dims=1) for part in deltas(found))
    close(merged("nan", found), body, head)


def test_task_arithmetic_scales_the_sum() -> None:
    found = adapters()
    body, head = deltas(found)
    close(merged("task-arithmetic", found, scale=0.4), 0.4 * body.sum(0), 0.4 * head.sum(0))
    close(merged("task-arithmetic", found, scale=1 / 3), body.mean(0), head.mean(0))


def test_ties_by_hand() -> None:
    rows = torch.tensor([[4.0, -1.0, 2.0, 0.5, 3.0], [-3.0, -2.0, 5.0, 0.1, -4.0], [1.0, 9.0, 8.0, -0.2, 7.0]])
    trimmed = trim(rows, 0.6)
    assert trimmed.tolist() == [[4, 0, 2, 0, 3], [-3, 0, 5, 0, -4], [0, 9, 8, 0, 7]]
    # signs of the sums: 1, 9, 15, 0 (plus), 6
    assert elect_and_average(trimmed).tolist() == [4, 9, 5, 0, 5]


def test_ties_without_trimming_and_with_equal_signs_is_the_mean() -> None:
    found = adapters()
    same = [found[0], Adapter(WIDE, 2 * found[0].vector), Adapter(WIDE, 3 * found[0].vector)]
    body, head = deltas(same)
    close(merged("ties", same, density=1.0), body.mean(0), head.mean(0))


def test_dare_without_drops_is_the_mean_and_otherwise_unbiased() -> None:
    found = adapters()
    body, head = (torch.tensordot(torch.tensor(SHARES, dtype=torch.float64), part, dims=1) for part in deltas(found))
    close(merged("dare", found, drop=0.0), body, head)
    ones = torch.ones(1, 200_000)
    thinned = drop_and_rescale(ones, 0.9, "seed")
    torch.testing.assert_close(thinned.unique(), torch.tensor([0.0, 10.0]))
    assert float(thinned.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(thinned, drop_and_rescale(ones, 0.9, "seed"))
    assert not torch.equal(thinned, drop_and_rescale(ones, 0.9, "another"))
    assert not torch.equal(
        drop_and_rescale(torch.ones(2, 99), 0.5, "s")[0], drop_and_rescale(torch.ones(2, 99), 0.5, "s")[1]
    )


def test_fisher_merging_weighs_number_by_number() -> None:
    found = adapters(2)
    first, second = (random_adapter(WIDE, seed, dtype=torch.float64).vector.square() + 0.1 for seed in (7, 8))
    extra = [{"information": Adapter(WIDE, vector)} for vector in (first, second)]
    result = merged("fisher-merge", found, [0.25, 0.75], extra, normalise=False)
    expected = (0.25 * first * found[0].vector + 0.75 * second * found[1].vector) / (0.25 * first + 0.75 * second)
    torch.testing.assert_close(result.vector, expected)
    scaled = [{"information": Adapter(WIDE, first)}, {"information": Adapter(WIDE, 100 * first)}]
    equal = merged("fisher-merge", found, [0.25, 0.75], scaled)
    torch.testing.assert_close(equal.vector, 0.25 * found[0].vector + 0.75 * found[1].vector)


def inputs(seed: int, width: int, examples: int = 40) -> Tensor:
    drawn = torch.randn(examples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * torch.arange(1, width + 1)


def moments(xs: dict[str, Tensor]) -> Adapter:
    found = Adapter.zeros(layout_of_gram(WIDE), torch.float64)
    for module, x in xs.items():
        matrix = x.T @ x / len(x)
        found[module, Factor.GRAM].copy_(matrix[tuple(torch.triu_indices(*matrix.shape))])
    return found


def test_regmean_is_the_least_squares_solution() -> None:
    found = adapters()
    xs = [{"q": inputs(k, 5), "h": inputs(10 + k, 4)} for k in range(3)]
    result = regression_mean(found, [moments(x) for x in xs], SHARES)
    for module, maps in (("q", deltas(found)[0]), ("h", deltas(found)[1])):
        roots = [share**0.5 for share in SHARES]
        rows = torch.cat([root * x[module] for root, x in zip(roots, xs, strict=True)])
        outputs = torch.cat([root * x[module] @ m.T for root, x, m in zip(roots, xs, maps, strict=True)])
        best = torch.linalg.lstsq(rows, outputs).solution.T
        merged_map = dense(result, "q") if module == "q" else result["h", Factor.WEIGHT]
        torch.testing.assert_close(merged_map, best, rtol=0, atol=1e-4)
        mean = torch.tensordot(torch.tensor(SHARES, dtype=torch.float64), maps, dims=1)
        assert float((mean - best).abs().max()) > 0.05


def test_regmean_with_equal_inputs_or_fully_shrunk_isotropic_ones_is_the_mean() -> None:
    found = adapters()
    body, head = (torch.tensordot(torch.tensor(SHARES, dtype=torch.float64), part, dims=1) for part in deltas(found))
    same = moments({"q": inputs(1, 5), "h": inputs(2, 4)})
    close(regression_mean(found, [same] * 3, SHARES), body, head)
    blind = Adapter.zeros(layout_of_gram(WIDE), torch.float64)  # no inputs at all
    close(regression_mean(found, [blind] * 3, SHARES), body, head)
    matrix = symmetric(torch.arange(1.0, 7.0), 3, shrink=0.5)
    assert matrix.tolist() == [[1, 1, 1.5], [1, 4, 2.5], [1.5, 2.5, 6]]


@pytest.mark.parametrize("name", RULES)
def test_identical_clients_return_the_client(name: str) -> None:
    one = adapters(1)[0]
    scale = {"task-arithmetic": {"scale": 1 / 3}, "ties": {"density": 1.0}, "dare": {"drop": 0.0}}.get(name, {})
    extra = {
        "fisher-merge": [{"information": Adapter(WIDE, one.vector.square() + 1)}] * 3,
        "regmean": [{"gram": moments({"q": inputs(1, 5), "h": inputs(2, 4)})}] * 3,
    }.get(name)
    close(merged(name, [one] * 3, SHARES, extra, **scale), dense(one, "q"), one["h", Factor.WEIGHT])


@pytest.mark.parametrize("name", RULES)
def test_nothing_travels_before_the_last_round(name: str) -> None:
    fleet = Fleet(name)
    fleet.strategy.rounds = 3
    for _ in range(2):
        brief = fleet.brief("ada")
        assert not brief.adapters
        assert [step.WhichOneof("kind") for step in brief.steps] == ["initialise", "evaluate", "train"]
        assert fleet.play() == {"merged": 0}
    uploads = [step for step in fleet.brief("ada").steps if step.HasField("send") or step.HasField("gram")]
    assert len(uploads) == (2 if name in ("fisher-merge", "regmean") else 1)
    assert fleet.play() == {"merged": 3}
    saved = fleet.deliver()
    assert len({adapter.digest for adapter in saved.values()}) == 1
    assert saved["ada"].digest != fleet["ada"].slots["local"].digest


def test_a_merge_may_have_another_rank() -> None:
    for rank, expected in ((1, 1), (7, 7), (99, 12)):  # three adapters of rank 4
        fleet = Fleet("nan", rank=rank)
        fleet.play()
        assert set(fleet.deliver()[NAMES[0]].layout.ranks.values()) == {expected}
