"""Closed-form weights against brute force, their invariants, and every degenerate case of the specification."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.algorithms.potara_weights import (
    MODES,
    Evidence,
    best_of,
    closed_form,
    fisher_weight,
    grid,
    heterogeneity,
    plug_in,
    random_effects,
    shared_variance,
    weigh,
)

positive = st.floats(1e-6, 1e6)
share = st.floats(-0.999, 0.999)


def error_of(weight: float, a: float, b: float, c: float) -> float:
    """``V(w)``: mean squared error of the merge."""
    return weight**2 * a + (1 - weight) ** 2 * b + 2 * weight * (1 - weight) * c


# ---------------------------------------------------------------------------------------------------------- closed form


@given(positive, positive, share)
def test_the_weight_minimises_the_error_and_beats_both_endpoints(a: float, b: float, correlation: float) -> None:
    c = correlation * math.sqrt(a * b)
    found = closed_form(a, b, c)
    if found.flag == "identical":
        return
    best = error_of(found.value, a, b, c)
    assert best <= min(a, b) * (1 + 1e-9)
    assert all(best <= error_of(w, a, b, c) * (1 + 1e-9) for w in grid(201))
    if not found.flag:
        distance = a + b - 2 * c
        assert best == pytest.approx((a * b - c * c) / distance, rel=1e-6)
        assert a - best == pytest.approx((a - c) ** 2 / distance, rel=1e-6, abs=1e-9 * a)
        assert b - best == pytest.approx((b - c) ** 2 / distance, rel=1e-6, abs=1e-9 * b)


@given(positive, positive, share, st.floats(-0.5, 0.5))
def test_an_error_in_the_weight_costs_its_square_times_the_distance(a: float, b: float, rho: float, e: float) -> None:
    c = rho * math.sqrt(a * b)
    found = closed_form(a, b, c)
    cost = error_of(found.raw + e, a, b, c) - error_of(found.raw, a, b, c)
    if found.flag != "identical":
        assert cost == pytest.approx(found.denominator * e * e, rel=1e-6, abs=1e-9 * (a + b))


@given(positive, positive, st.floats(1e-3, 1e3))
def test_scaling_all_variances_and_swapping_the_roles(a: float, b: float, z: float) -> None:
    weight = fisher_weight(a, b).raw
    assert fisher_weight(z * a, z * b).raw == pytest.approx(weight, rel=1e-9)
    assert fisher_weight(b, a).raw == pytest.approx(1 - weight, rel=1e-9)


def test_closed_form_is_the_minimum_on_quadratic_losses() -> None:
    """Estimates with a true cross covariance around the optimum of an isotropic quadratic; brute force on a grid."""
    generator = torch.Generator().manual_seed(4)
    size, draws = 12, 40_000
    mixing = torch.randn(2, 2, size, size, generator=generator, dtype=torch.float64) / size**0.5
    mixing[1] *= 1.3
    noise = torch.randn(2, draws, size, generator=generator, dtype=torch.float64)
    fed = noise[0] @ mixing[0, 0] + 0.5 * noise[1] @ mixing[0, 1]
    local = noise[1] @ mixing[1, 1] + 0.3 * noise[0] @ mixing[1, 0]
    a, b, c = (float((x * y).sum(dim=1).mean()) for x, y in ((fed, fed), (local, local), (fed, local)))
    losses = {w: float((w * fed + (1 - w) * local).square().sum(dim=1).mean()) / 2 for w in grid(1001)}
    found = closed_form(a, b, c)
    assert 0.05 < found.value < 0.95
    assert min(losses, key=losses.__getitem__) == pytest.approx(found.value, abs=0.0011)


@pytest.mark.parametrize(
    ("moments", "value", "flag"),
    [
        ((1.0, 1.0, 1.0), 1.0, "identical"),  # the adapters do not differ: the shared one
        ((0.0, 0.0, 0.0), 0.5, "undefined"),
        ((math.nan, 1.0, 0.0), 0.5, "undefined"),
        ((1.0, math.inf, 0.0), 0.5, "undefined"),
        ((1.0, 4.0, 1.5), 1.0, "clipped"),  # c > a: extrapolates
        ((4.0, 1.0, 1.5), 0.0, "clipped"),
        ((1.0, 3.0, 0.0), 0.75, ""),
        ((-1.0, 3.0, 0.0), 1.0, ""),  # a negative estimate of a variance counts as none
        ((1.0, 1e300, 0.0), 1.0, ""),
        ((1e308, 1e308, 0.0), 0.5, "undefined"),  # their sum overflows
    ],
)
def test_special_cases_of_the_closed_form(moments: tuple[float, float, float], value: float, flag: str) -> None:
    found = closed_form(*moments)
    assert (found.value, found.flag) == (value, flag)
    assert (found.raw != found.value) == (flag == "clipped")


def test_a_noisy_covariance_does_not_extrapolate() -> None:
    assert fisher_weight(1.0, 4.0, 100.0).value == pytest.approx((4 - 0.999) / (5 - 2 * 0.999))
    assert fisher_weight(1.0, 4.0, 100.0).flag == ""


# -------------------------------------------------------------------------------------------------- federated average


@given(st.integers(2, 6), st.floats(0, 20), st.integers(0, 10**6))
def test_moments_of_the_random_effects_model(clients: int, t: float, seed: int) -> None:
    """From the model's expected distances, t comes back exactly, and each weight follows from its moments."""
    drawn = torch.rand(2, clients, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    b, p = drawn[0], drawn[1] / drawn[1].sum()
    squares = p.square().sum()
    a = (p.square() * b).sum() + t * (1 - 2 * p + squares)
    q = a + b - 2 * p * b
    assert heterogeneity(b, q, p) == pytest.approx(t, rel=1e-9, abs=1e-9)
    for found, a_k, b_k, p_k in zip(random_effects(b, q, p), a.tolist(), b.tolist(), p.tolist(), strict=True):
        assert found.raw == pytest.approx((1 - p_k) * b_k / (a_k + b_k - 2 * p_k * b_k), rel=1e-9)
    for plain, effects in zip(plug_in(b, q, p), random_effects(b, q, p), strict=True):
        assert plain.raw == pytest.approx(effects.raw, rel=1e-6)  # q is what it should be: the two agree


def test_random_effects_against_simulation() -> None:
    """Clients' optima and estimates are drawn; the average weight is close to the best one in each draw."""
    generator = torch.Generator().manual_seed(11)
    clients, size, t = 20, 60, 1.0
    counts = torch.arange(80.0, 400.0, 16.0, dtype=torch.float64)
    p, b = counts / counts.sum(), size / counts
    ratios = {"random-effects": 0.0, "variance only": 0.0, "half": 0.0}
    for _ in range(30):
        optimum = torch.randn(clients, size, generator=generator, dtype=torch.float64) * (t / size) ** 0.5
        local = optimum + torch.randn(clients, size, generator=generator, dtype=torch.float64) / counts.sqrt()[:, None]
        fed = p @ local
        q = (fed - local).square().sum(dim=1)

        def loss(weights: torch.Tensor, fed: torch.Tensor = fed, local: torch.Tensor = local) -> float:
            merged = weights[:, None] * fed + (1 - weights)[:, None] * local
            return float((merged - optimum).square().sum())  # noqa: B023

        best = ((local - optimum) * (local - fed)).sum(dim=1) / q
        for name, found in (
            ("random-effects", random_effects(b, q, p)),
            ("variance only", shared_variance(b, p)),
        ):
            ratios[name] += loss(torch.tensor([w.value for w in found], dtype=torch.float64)) / loss(best) / 30
        ratios["half"] += loss(torch.full((clients,), 0.5, dtype=torch.float64)) / loss(best) / 30
    assert ratios["random-effects"] < 1.03
    assert ratios["variance only"] > 2  # cannot see that the clients differ
    assert ratios["half"] > 1.1


def test_equal_clients_without_differences_get_the_federated_adapter_back() -> None:
    b, p = torch.full((5,), 2.0, dtype=torch.float64), torch.full((5,), 0.2, dtype=torch.float64)
    q = (p.square() * b).sum() + b - 2 * p * b  # what chance alone gives
    assert [w.value for w in random_effects(b, q, p)] == [w.value for w in shared_variance(b, p)] == [1.0] * 5


def test_one_client_alone_and_a_client_that_took_no_part() -> None:
    one = torch.ones(1, dtype=torch.float64)
    for rule in (random_effects, plug_in):
        for q in (0 * one, one, 7 * one):  # whatever the distance: the federated adapter is its own
            assert [w.value for w in rule(one, q, one)] == [1.0]
    b, q, p = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 2, 3], [2.0, 3, 9], [0.5, 0.5, 0.0]))
    for rule in (random_effects, plug_in):
        absent = rule(b, q, p)[2]
        assert absent.c == 0
        assert 0 < absent.value < 1


# ---------------------------------------------------------------------------------------------------------- line search


def test_line_search_takes_the_smallest_loss_and_of_equals_the_more_federated() -> None:
    assert grid(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert best_of([3.0, 1.0, 2.0, 5.0, 4.0]).value == 0.25
    assert best_of([1.0, 1.0, 1.0, 1.0]).value == 1.0
    with pytest.raises(ValueError, match="2 points, expected at least 3"):
        grid(2)


@given(st.floats(0.0, 1.0), st.floats(0.1, 10), st.floats(-5, 5))
def test_three_losses_of_a_parabola_give_its_vertex(vertex: float, curvature: float, bottom: float) -> None:
    losses = [curvature * (w - vertex) ** 2 + bottom for w in (0.0, 0.5, 1.0)]
    assert best_of(losses).value == pytest.approx(vertex, abs=1e-6)


def test_three_losses_that_open_downwards_give_the_better_endpoint() -> None:
    assert best_of([1.0, 3.0, 2.0]).value == 0.0
    assert best_of([2.0, 3.0, 1.0]).value == 1.0
    assert best_of([1.0, 1.0, 1.0]).value == 1.0
    found = best_of([1.0, 9.0, 20.0])
    assert (found.value, found.flag, found.raw < 0) == (0.0, "clipped", True)


# ---------------------------------------------------------------------------------------------------------------- modes


def evidence(seed: int, examples: int = 30, modules: int = 3, takes_part: bool = True, has_b: bool = True) -> Evidence:
    drawn = (torch.rand(7, modules, generator=torch.Generator().manual_seed(seed)).double() + 0.1).tolist()
    return Evidence(
        examples=examples,
        takes_part=takes_part,
        variance_fed=drawn[0],
        variance_local=drawn[1],
        covariance=[min(x, y, z) for x, y, z in zip(*drawn[:3], strict=True)],
        distance=drawn[3],
        b=drawn[4] if has_b else [],
        q=drawn[5],
        losses=drawn[6],
    )


@pytest.mark.parametrize("mode", MODES)
def test_scalar_and_per_module_weights_are_one_with_a_single_module(mode: str) -> None:
    found = [evidence(seed, 20 + seed, modules=1) for seed in range(4)]
    if mode == "line-search":
        found = [replace(client, losses=[2.0, 1.0, 3.0]) for client in found]
    assert weigh(found, mode) == weigh(found, mode, module=0)
    assert all(0 <= weight.value <= 1 for weight in weigh(found, mode))


def test_modes_use_what_they_say() -> None:
    found = [evidence(seed) for seed in range(3)]
    a, b = sum(found[1].variance_fed), sum(found[1].variance_local)
    assert weigh(found, "client-fisher")[1].value == pytest.approx(b / (a + b))
    assert weigh(found, "client-fisher", module=2)[1].value == pytest.approx(
        found[1].variance_local[2] / (found[1].variance_fed[2] + found[1].variance_local[2])
    )
    assert weigh(found, "client-fisher", fed_scale="total")[1].value == pytest.approx(b / (a / 3 + b))
    clipped = weigh(found, "client-fisher-clipped")[1]
    assert clipped.c == pytest.approx(min(sum(found[1].covariance), 0.999 * min(a, b)))
    assert [weight.value for weight in weigh(found, "half")] == [0.5] * 3
    scalar = weigh(found, "server-scalar")[1]
    assert scalar.a == pytest.approx(sum(sum(client.variance_local) / 30 for client in found) / 9)
    searched = weigh(found, "line-search")[0]
    assert (searched.value, searched.raw) == (best_of(found[0].losses).value, best_of(found[0].losses).raw)
    bare = [replace(client, variance_fed=[], variance_local=[], covariance=[]) for client in found]
    for mode in ("half", "line-search", "plugin", "random-effects"):  # which need no Fisher information
        assert [w.value for w in weigh(bare, mode)] == [w.value for w in weigh(found, mode)]


def test_per_module_weights_lower_the_bound() -> None:
    """Sum over modules of V at its own weight is at most V at one common weight."""
    for seed in range(50):
        client = evidence(seed, modules=6)
        rows = list(zip(client.variance_fed, client.variance_local, strict=True))
        own = sum(
            error_of(weigh([client], "client-fisher", module)[0].value, a, b, 0.0) for module, (a, b) in enumerate(rows)
        )
        common = weigh([client], "client-fisher")[0].value
        assert own <= sum(error_of(common, a, b, 0.0) for a, b in rows) * (1 + 1e-12)


@pytest.mark.parametrize("mode", ["random-effects", "plugin"])
def test_a_client_that_cannot_tell_its_variance_gets_the_others_by_its_size(mode: str) -> None:
    known = [evidence(seed, 40) for seed in range(3)]
    single = evidence(9, examples=1, has_b=False)
    weights = weigh([*known, single], mode)
    assert weights[3].b == pytest.approx(sum(sum(client.b) for client in known) / 3 * 40)
    assert all(math.isfinite(weight.value) for weight in weights)
    nobody = weigh([replace(client, b=[]) for client in known], mode)
    assert [(weight.value, weight.flag) for weight in nobody] == [(0.5, "undefined")] * 3


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "half"])
def test_adapters_that_do_not_differ_get_the_shared_one(mode: str) -> None:
    found = [replace(evidence(seed, modules=2), losses=[3.0, 1.0, 2.0]) for seed in range(3)]
    found[1] = replace(found[1], distance=[0.0, 0.0])
    weights = weigh(found, mode)
    assert (weights[1].value, weights[1].flag) == (1.0, "identical")
    assert [weight.flag == "identical" for weight in weights] == [False, True, False]
    found[1] = replace(found[1], distance=[0.0, 1.0])
    assert weigh(found, mode, module=0)[1].flag == "identical"
    assert weigh(found, mode, module=1)[1].flag != "identical"


def test_a_common_scale_scales_the_covariance_by_its_root_and_needs_somebody_who_trained() -> None:
    found = [evidence(seed, 10) for seed in range(4)]
    plain, scaled = (weigh(found, "client-fisher-clipped", fed_scale=scale)[0] for scale in ("client", "total"))
    assert scaled.a == pytest.approx(plain.a / 4)
    assert scaled.c == pytest.approx(min(sum(found[0].covariance) / 2, 0.999 * min(scaled.a, scaled.b)))
    nobody = [replace(client, takes_part=False) for client in found]
    assert weigh(nobody, "client-fisher", fed_scale="total") == weigh(nobody, "client-fisher")


@pytest.mark.parametrize("mode", MODES)
def test_nobody_trained_the_federated_adapter(mode: str) -> None:
    found = [replace(evidence(seed), takes_part=False, losses=[2.0, 1.0, 3.0]) for seed in range(2)]
    assert all(0 <= weight.value <= 1 for weight in weigh(found, mode))
