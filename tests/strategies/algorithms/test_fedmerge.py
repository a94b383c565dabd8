"""FedMerge: the fifteen properties that its specification lists, in that order, ``test_1`` to ``test_15``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from fedalloy_adapters.wire.codec import Encoding, payload_size
from strategies.algorithms.fedavg import FedAvg
from strategies.algorithms.fedmerge import FedMerge, FedMergeOptions
from strategies.algorithms.fedmerge_weights import (
    logit_gradient,
    logit_step,
    mean_row,
    merge_models,
    model_coefficients,
)
from tests.strategies.conftest import (
    client_of,
    dispatch_of,
    drift,
    layout_of,
    noise,
    personal,
    play,
)
from tests.strategies.toys import COUNTS, LAYOUT, NAMES, NOT_A, VARIANTS, Toy, draw, fedmerge


@pytest.mark.parametrize("w_step", ["maxnorm", "maxnorm-per-row", "adam"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_1_one_model_is_fedavg_on_the_same_displacements(variant: str, w_step: str) -> None:
    one = fedmerge(models=1, variant=variant, w_step=w_step)
    average = FedAvg(seed=3)
    for client in one.clients.values():
        average.enrol(client)
    trained = LAYOUT.select(NOT_A) if variant == "frozen-a" else LAYOUT

    def move(name: str, round_: int, received: Adapter) -> Adapter:
        whole = received if received.layout.contains(trained) else None
        part = received.part(trained) if whole is not None else received
        moved = Adapter(trained, 0.7 * part.vector + 0.3 * noise(name, round_, trained).vector)
        return received.with_part(moved) if whole is not None else moved

    for round_ in range(1, 6):
        present = [name for index, name in enumerate(NAMES) if (index + round_) % 4]
        play(one, present, round_, move)
        play(average, present, round_, move)
        mine, theirs = personal(one, "ada").part(trained).vector, personal(average, "ada").part(trained).vector
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
        assert torch.equal(one.logits, torch.zeros(4, 1, dtype=torch.float64))
    if variant == "frozen-a":
        untouched = personal(average, "ada").select([Factor.A]).vector
        torch.testing.assert_close(untouched, Adapter.initial(LAYOUT, 3).select([Factor.A]).vector, rtol=0, atol=1e-6)


def test_2_rows_columns_and_logit_steps_add_up() -> None:
    toy = Toy()
    theta, logits = toy.state
    torch.testing.assert_close(merge_models(torch.ones_like(theta), logits), torch.ones(7, 40, dtype=torch.float64))
    c = model_coefficients(logits, toy.shares)
    torch.testing.assert_close(c.sum(dim=0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-14)
    gradient = logit_gradient(theta, logits, toy.local_gradients())
    bound = 100.0
    assert gradient.abs().max() > 0.1
    assert gradient.sum(dim=1).abs().max() < 1e-13
    for per_row, shares in itertools.product((False, True), (toy.shares, torch.ones(7, dtype=torch.float64))):
        step = logit_step(gradient, shares, 0.05, bound, per_row=per_row)
        assert step.abs().max() > 0.01
        assert step.sum(dim=1).abs().max() < 1e-15


def gradient_error(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """Largest error of ``p_i * formula`` against autograd's dF/dW, relative to its largest entry."""
    toy = Toy()
    theta, logits = toy.state
    _, exact = toy.objective_gradients()
    found = toy.shares[:, None] * formula(theta, logits, toy.local_gradients())
    return float((found - exact).abs().max() / exact.abs().max())


def test_3_gradients_are_those_of_the_objective() -> None:
    toy = Toy()
    theta, logits = toy.state
    exact_theta, exact_logits = toy.objective_gradients()
    local = toy.local_gradients()
    assert exact_logits.abs().max() > 0.1
    found_logits = toy.shares[:, None] * logit_gradient(theta, logits, local)
    torch.testing.assert_close(found_logits, exact_logits, rtol=0, atol=1e-10)
    found_theta = model_coefficients(logits, toy.shares, norm="none", min_mass=0).T @ local
    torch.testing.assert_close(found_theta, exact_theta, rtol=0, atol=1e-10)


def test_3_the_check_rejects_the_uncentred_formula() -> None:
    def uncentred(theta: Tensor, logits: Tensor, displacement: Tensor) -> Tensor:
        return torch.softmax(logits, dim=1) * (displacement @ theta.T)

    assert gradient_error(logit_gradient) < 1e-10
    assert gradient_error(uncentred) > 0.5


@pytest.mark.parametrize("mu", [0.0, 0.02, 10.0])
def test_4_one_local_step_is_the_gradient_whatever_the_pull(mu: float) -> None:
    toy, lr = Toy(), 0.05
    theta, logits = toy.state
    exact_theta, exact_logits = toy.objective_gradients()
    moved = toy.one_step(lr, mu)
    torch.testing.assert_close(moved, lr * toy.local_gradients(), rtol=0, atol=1e-15)
    gradient = toy.shares[:, None] * logit_gradient(theta, logits, moved)
    torch.testing.assert_close(gradient, lr * exact_logits, rtol=0, atol=1e-14)
    mass = (toy.shares[:, None] * torch.softmax(logits, dim=1)).sum(dim=0)
    step = model_coefficients(logits, toy.shares).T @ moved
    torch.testing.assert_close(step, lr * exact_theta / mass[:, None], rtol=0, atol=1e-15)


def test_5_with_equal_logits_all_models_move_by_the_same_vector() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    c = model_coefficients(torch.zeros(3, 4, dtype=torch.float64), shares)
    torch.testing.assert_close(c, shares[:, None].expand(3, 4), rtol=0, atol=1e-16)
    strategy = fedmerge(models=3, jitter=0.5, lr_w=0.0)  # W stays at zero: the models move with the old W
    before = strategy.theta.double()
    for round_ in (1, 2, 3):
        play(strategy, NAMES, round_)
    after = strategy.theta.double()
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after - after[0], before - before[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("w_step", ["maxnorm", "maxnorm-per-row", "adam"])
@pytest.mark.parametrize(("models", "modules", "d_in"), [(2, 1, 3), (3, 2, 6), (5, 3, 31), (7, 2, 201)])
def test_6_identical_models_stay_identical_and_are_fedavg(models: int, modules: int, d_in: int, w_step: str) -> None:
    layout = layout_of(modules=[f"m{index}" for index in range(modules)], d_in=d_in, d_out=d_in + 2)
    strategy = FedMerge(
        FedMergeOptions(models=models, init="jitter", lr_w=0.05, jitter=0.0, w_step=w_step, variant="factors"), seed=3
    )
    average = FedAvg(seed=3)
    names = [f"c{index}" for index in range(12)]  # so many that a product of matrices rounds equal rows differently
    for count, name in enumerate(names, start=3):
        strategy.enrol(client_of(name, layout, count))
        average.enrol(client_of(name, layout, count))
    for round_ in range(1, 6):
        play(strategy, names, round_)
        play(average, names, round_)
        assert torch.equal(strategy.logits, torch.zeros(12, models, dtype=torch.float64)), "rounding moved the logits"
        assert all(torch.equal(model, strategy.theta[0]) for model in strategy.theta)
    torch.testing.assert_close(personal(strategy, "c0").vector, personal(average, "c0").vector, rtol=0, atol=5e-6)


def test_6_the_guard_is_relative_to_the_size_of_models_and_displacements() -> None:
    for scale in (1e-6, 1.0, 1e6):
        equal = scale * draw(1, 50).expand(3, 50).clone()
        moved = scale * draw(4, 50, seed=5)
        logits = draw(4, 3, seed=6)
        bound = float(equal.norm(dim=1).max() * moved.norm(dim=1).max())
        gradient = logit_gradient(equal, logits, moved)
        shares = torch.full((4,), 0.25, dtype=torch.float64)
        for per_row in (False, True):
            assert not logit_step(gradient, shares, 0.05, bound, per_row=per_row).any()
        equal[0] *= 1 + 1e-6  # a small difference, but more than rounding
        gradient = logit_gradient(equal, logits, moved)
        assert float(logit_step(gradient, shares, 0.05, bound).abs().max()) == 0.05
    not_a_number = torch.full((4, 3), math.nan, dtype=torch.float64)
    assert not logit_step(not_a_number, shares, 0.05, 1.0).any()


def test_6_identical_models_separate_when_the_logits_differ() -> None:
    strategy = fedmerge(models=3, jitter=0.0)
    strategy.logits = draw(4, 3, seed=9, scale=0.1)
    logits = strategy.logits.clone()
    play(strategy, NAMES, 1)
    assert torch.equal(strategy.logits, logits)
    assert (strategy.theta[0] - strategy.theta[1]).abs().max() > 1e-3


def test_7_one_hot_logits_are_clustered_averaging_with_fixed_assignment() -> None:
    strategy = fedmerge(models=2, jitter=0.1, variant="factors")
    groups = {0: ("ada", "cyd"), 1: ("ben", "dan")}
    for model, members in groups.items():
        for name in members:
            strategy.logits[strategy.rows[name]] = torch.tensor([50.0, -50.0]) * (1 if model == 0 else -1)
    logits = strategy.logits.clone()
    received = {name: personal(strategy, name) for name in NAMES}
    play(strategy, NAMES, 1)
    counts = dict(zip(NAMES, COUNTS, strict=True))
    for model, members in groups.items():
        total = sum(counts[name] for name in members)
        expected = sum(counts[name] / total * drift(name, 1, received[name]).vector.double() for name in members)
        torch.testing.assert_close(strategy.theta[model].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(strategy.logits, logits)


@pytest.mark.parametrize("w_step", ["maxnorm", "maxnorm-per-row", "adam"])
def test_8_renaming_the_models_changes_no_merged_model(w_step: str) -> None:
    first, second = (fedmerge(models=3, jitter=0.5, variant="factors", w_step=w_step) for _ in range(2))
    order = [2, 0, 1]
    first.logits = draw(4, 3, seed=2)
    second.theta, second.logits = first.theta[order].clone(), first.logits[:, order].clone()
    for round_ in (1, 2, 3):
        play(first, NAMES, round_)
        play(second, NAMES, round_)
    torch.testing.assert_close(second.theta, first.theta[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(second.logits, first.logits[:, order], rtol=0, atol=1e-4)
    for name in NAMES:
        torch.testing.assert_close(personal(second, name).vector, personal(first, name).vector, rtol=0, atol=1e-5)
    assert (first.theta[order] - first.theta).abs().max() > 0.1


def test_9_a_constant_in_a_row_of_logits_changes_nothing() -> None:
    toy = Toy()
    theta, logits = toy.state
    moved = toy.local_gradients()
    shifted = logits + draw(7, 1, seed=8, scale=20)
    for one, other in (
        (merge_models(theta, logits), merge_models(theta, shifted)),
        (logit_gradient(theta, logits, moved), logit_gradient(theta, shifted, moved)),
        (model_coefficients(logits, toy.shares), model_coefficients(shifted, toy.shares)),
        (mean_row(logits), mean_row(shifted)),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clients", [1, 4, 50, 300])
def test_10_the_largest_logit_change_is_the_rate_for_any_scale_and_number_of_clients(clients: int) -> None:
    theta, logits = draw(5, 30), draw(clients, 5, seed=2)
    moved = draw(clients, 30, seed=3)
    counts = torch.arange(1, clients + 1, dtype=torch.float64)
    shares = counts / counts.sum()
    steps = []
    for scale in (1e-8, 1.0, 2.0**40):
        gradient = logit_gradient(theta, logits, scale * moved)
        bound = float(theta.norm(dim=1).max() * (scale * moved).norm(dim=1).max())
        steps.append(logit_step(gradient, shares, 0.037, bound))
        assert float(steps[-1].abs().max()) == 0.037
        rows = logit_step(gradient, shares, 0.037, bound, per_row=True)
        assert rows.abs().amax(dim=1).tolist() == [0.037] * clients
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=0)
    assert torch.equal(steps[1], steps[2])  # a power of two, so that nothing is rounded
    assert (steps[1] * gradient >= 0).all()  # subtracting it goes down


def test_11_merging_b_with_one_a_merges_the_products_and_merging_both_does_not() -> None:
    a, other_a = draw(3, 4, 6, seed=1), draw(3, 4, 6, seed=2)
    b = draw(3, 5, 4, seed=3)
    logits = draw(1, 3, seed=4)
    w = torch.softmax(logits[0], dim=0)
    merged_b = merge_models(b.reshape(3, -1), logits).view(5, 4)
    common = sum(w[j] * b[j] @ a[0] for j in range(3))
    torch.testing.assert_close(merged_b @ a[0], common, rtol=0, atol=1e-12)
    merged_a = merge_models(other_a.reshape(3, -1), logits).view(4, 6)
    products = torch.stack([w[j] * b[j] @ other_a[j] for j in range(3)]).sum(dim=0)
    assert (merged_b @ merged_a - products).norm() > 0.1 * products.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_11_the_delivered_factors_have_that_product(variant: str) -> None:
    strategy = fedmerge(models=3, variant=variant, jitter=1.0)
    strategy.logits = draw(4, 3, seed=4)
    if variant == "factors":
        strategy.theta = strategy.theta + draw(3, strategy.theta.shape[1], seed=5).float()
    base = Adapter.initial(LAYOUT, 3)
    part = LAYOUT.select(() if variant == "factors" else NOT_A)
    whole = [base.with_part(Adapter(part, model)).to(torch.float64) for model in strategy.theta]
    w = torch.softmax(strategy.logits[strategy.rows["cyd"]], dim=0)
    delivered = base.with_part(personal(strategy, "cyd")).to(torch.float64)
    for module in LAYOUT.lora_modules:
        products = sum(
            (w[j] * whole[j][module, Factor.B] @ whole[j][module, Factor.A] for j in range(3)), torch.zeros(())
        )
        error = float((delivered[module, Factor.B] @ delivered[module, Factor.A] - products).norm() / products.norm())
        assert error > 0.05 if variant == "factors" else error < 1e-6


def two_groups(models: int, jitter: float, rounds: int = 300) -> tuple[FedMerge, float]:
    """8 clients in 2 groups with quadratic losses around +m and -m; the strategy, and the mean loss of its models.

    One model for all can do no better than about 21, one for each group about 1.3.
    """
    layout = layout_of(rank=2, modules=("q",), d_in=4, d_out=20, head=0)
    part = layout.select([Factor.B])
    direction, spread = draw(part.size, seed=1), draw(8, part.size, seed=2, scale=0.27)
    centres = {f"c{i}": (direction * (1 if i < 4 else -1) + spread[i]).float() for i in range(8)}
    strategy = FedMerge(FedMergeOptions(models=models, init="jitter", lr_w=0.05, jitter=jitter), seed=1)
    for name in centres:
        strategy.enrol(client_of(name, layout))

    def move(name: str, round_: int, received: Adapter) -> Adapter:
        x = received.vector.clone()
        for _ in range(5):  # gradient descent on 1/2 |x - c|^2 with the pull of mu = 0.02
            x = x - 0.05 * ((x - centres[name]) + 0.02 * (x - received.vector))
        return Adapter(received.layout, x)

    for round_ in range(1, rounds + 1):
        play(strategy, centres, round_, move)
    losses = [0.5 * float((personal(strategy, name).vector - centres[name]).square().sum()) for name in centres]
    return strategy, sum(losses) / len(losses)


def test_12_two_groups_polarise_and_beat_a_single_model_tenfold() -> None:
    _, single = two_groups(models=1, jitter=1e-3)
    assert 15 < single < 30
    strategy, personalised = two_groups(models=2, jitter=1e-3)
    assert personalised < single / 10
    weights = torch.softmax(strategy.logits, dim=1)
    assert float(weights.max(dim=1).values.min()) > 0.85
    favourite = weights.argmax(dim=1).tolist()
    assert len(set(favourite[:4])) == len(set(favourite[4:])) == 1
    assert favourite[0] != favourite[4]
    _, stuck = two_groups(models=2, jitter=0.0, rounds=60)
    assert stuck > 15  # equal models and equal logits are a saddle


@pytest.mark.parametrize("theta_norm", ["column", "none"])
def test_13_a_model_that_nobody_uses_is_frozen(theta_norm: str) -> None:
    strategy = fedmerge(models=3, jitter=0.5, theta_norm=theta_norm, lr_w=0.0)
    weights = torch.tensor([0.4, 0.6 - 0.9e-3, 0.9e-3], dtype=torch.float64)
    strategy.logits = weights.log().expand(4, 3).clone()
    before = strategy.theta.clone()
    play(strategy, NAMES, 1)
    assert torch.equal(strategy.theta[2], before[2])
    assert not torch.equal(strategy.theta[1], before[1])
    alive = torch.tensor([[0.4, 0.6 - 1.1e-3, 1.1e-3]], dtype=torch.float64).log()
    share = torch.ones(1, dtype=torch.float64)
    assert float(model_coefficients(alive, share)[0, 2]) == pytest.approx(1)
    assert float(model_coefficients(alive, share, norm="none")[0, 2]) == pytest.approx(1.1e-3)
    assert float(model_coefficients(weights[None].log(), share, norm=theta_norm)[0, 2]) == 0


@pytest.mark.parametrize("w_step", ["maxnorm", "maxnorm-per-row", "adam"])
def test_14_an_absent_client_keeps_its_row(w_step: str) -> None:
    strategy = fedmerge(models=3, jitter=0.5, w_step=w_step)
    play(strategy, NAMES, 1)
    before = {name: strategy.logits[row].clone() for name, row in strategy.rows.items()}
    moments = strategy.moments[:, strategy.rows["ben"]].clone()
    play(strategy, ["ada", "dan"], 2)
    for name, row in strategy.rows.items():
        assert torch.equal(strategy.logits[row], before[name]) == (name in ("ben", "cyd"))
    assert torch.equal(strategy.moments[:, strategy.rows["ben"]], moments)
    theta, logits = strategy.theta.clone(), strategy.logits.clone()
    assert play(strategy, [], 3)["merged"] == 0
    assert torch.equal(strategy.theta, theta)
    assert torch.equal(strategy.logits, logits)


def test_15_bytes_per_round_are_those_of_fedavg_and_of_b_alone_with_a_frozen_a() -> None:
    average = FedAvg(seed=3)
    for client in fedmerge().clients.values():
        average.enrol(client)
    theirs = dispatch_of(average, "ada")
    (full,), (whole,) = theirs.tensor_bytes.values(), theirs.expected.values()
    assert full == 4 * LAYOUT.size
    for variant in VARIANTS:
        for models in (1, 5):
            mine = dispatch_of(fedmerge(models=models, variant=variant), "ada")
            (down,), (up,) = mine.tensor_bytes.values(), mine.expected.values()
            if variant == "frozen-a":
                without_a = LAYOUT.size - sum(entry.size for entry in LAYOUT.entries if entry.factor is Factor.A)
                assert down == payload_size(up, Encoding.FP32) == 4 * without_a
                assert {entry.factor for entry in up.entries} == set(NOT_A)
            else:
                assert up.digest == whole.digest
                assert down == full
                slots = [*mine.content["adapters"].values(), *theirs.content["adapters"].values()]
                assert len(slots[0].data) == len(slots[1].data)
