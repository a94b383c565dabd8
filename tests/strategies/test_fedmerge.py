"""FedMerge against the objective of the paper, and against a second implementation in plain loops.

``test_1`` to ``test_15`` are the properties that its specification lists, in that order; ``Reference`` below is written
from the specification and shares no code with the strategy.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from adapters.adapter import Adapter
from adapters.codec import Encoding, payload_size
from adapters.layout import Factor
from strategies.base import AlloyStrategy, Answer, State, StrategyError
from strategies.fedavg import FedAvg
from strategies.fedmerge import (
    FedMerge,
    FedMergeOptions,
    cluster,
    logit_gradient,
    logit_step,
    mean_row,
    merge_models,
    model_coefficients,
)
from strategies.steps import Training
from tests.strategies.conftest import (
    FakeNode,
    client_of,
    dispatch_of,
    drift,
    layout_of,
    noise,
    personal,
    play,
    random_adapter,
    send_step,
)

VARIANTS = ("frozen-a", "trained-a", "factors")
NAMES = ("ada", "ben", "cyd", "dan")
COUNTS = (10, 30, 20, 7)
LAYOUT = layout_of()
NOT_A = (Factor.B, Factor.WEIGHT, Factor.BIAS)


def fedmerge(names: tuple[str, ...] = NAMES, seed: int = 3, training: Training | None = None, **options: Any) -> FedMerge:
    strategy = FedMerge(FedMergeOptions(**options), training, seed)
    for name, count in zip(names, COUNTS, strict=False):
        strategy.enrol(client_of(name, LAYOUT, count))
    return strategy


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Toy:
    """K clients with quadratic losses ``1/2 (x - c)' H (x - c)`` in float64; gradients come from autograd."""

    def __init__(self, clients: int = 7, models: int = 3, size: int = 40) -> None:
        roots = draw(clients, size, size, seed=1, scale=size**-0.5)
        self.hessians = roots @ roots.transpose(1, 2) + 0.1 * torch.eye(size, dtype=torch.float64)
        self.centres = draw(clients, size, seed=2)
        self.theta = draw(models, size, seed=3).requires_grad_()
        self.logits = draw(clients, models, seed=4).requires_grad_()
        counts = torch.arange(1, clients + 1, dtype=torch.float64)
        self.shares = counts / counts.sum()

    def loss(self, client: int, x: Tensor) -> Tensor:
        away = x - self.centres[client]
        return 0.5 * away @ self.hessians[client] @ away

    def objective_gradients(self) -> tuple[Tensor, Tensor]:
        """dF/dTheta and dF/dW of F = sum_i p_i L_i(sum_j softmax(W_i)_j Theta_j)."""
        merged = torch.softmax(self.logits, dim=1) @ self.theta
        total = torch.stack([p * self.loss(i, merged[i]) for i, p in enumerate(self.shares)]).sum()
        theta, logits = torch.autograd.grad(total, (self.theta, self.logits))
        return theta, logits

    def local_gradients(self) -> Tensor:
        """g_i, the gradient of client i's loss at its merged model, ``[K, P]``."""
        merged = (torch.softmax(self.logits, dim=1) @ self.theta).detach().requires_grad_()
        total = torch.stack([self.loss(i, merged[i]) for i in range(len(self.shares))]).sum()
        return torch.autograd.grad(total, merged)[0]

    def one_step(self, lr: float, mu: float) -> Tensor:
        """D_i after one step of gradient descent on loss and pull, ``[K, P]``."""
        received = (torch.softmax(self.logits, dim=1) @ self.theta).detach()
        model = received.clone().requires_grad_()
        losses = [
            self.loss(i, model[i]) + mu / 2 * (model[i] - received[i]).square().sum() for i in range(len(self.shares))
        ]
        return received - (received - lr * torch.autograd.grad(torch.stack(losses).sum(), model)[0])

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        return self.theta.detach(), self.logits.detach()


class Reference:
    """The round of section 6 of the specification in loops over Python floats; no code of the strategy."""

    def __init__(self, options: FedMergeOptions, theta: Tensor, logits: Tensor, counts: list[int], mask: Tensor) -> None:
        self.options, self.counts = options, counts
        self.theta: list[list[float]] = theta.double().tolist()
        self.logits: list[list[float]] = logits.double().tolist()
        self.used = [index for index, flag in enumerate(mask.tolist()) if flag]
        self.adam = [[(0.0, 0.0, 0)] * len(self.theta) for _ in counts]

    def weights(self, client: int) -> list[float]:
        row = self.logits[client]
        exponentials = [math.exp(value - max(row)) for value in row]
        return [value / sum(exponentials) for value in exponentials]

    def merged(self, client: int) -> list[float]:
        weights = self.weights(client)
        return [sum(w * model[k] for w, model in zip(weights, self.theta, strict=True)) for k in range(len(self.theta[0]))]

    def round(self, displacement: dict[int, list[float]]) -> None:
        options, models = self.options, len(self.theta)
        total = sum(self.counts[i] for i in displacement)
        shares = {i: self.counts[i] / total for i in displacement}
        gradient: dict[int, list[float]] = {}
        for i, moved in displacement.items():
            weights, merged = self.weights(i), self.merged(i)
            pull = shares[i] if options.w_client_weight else 1.0
            gradient[i] = [
                pull * weights[j] * sum((self.theta[j][k] - merged[k]) * moved[k] for k in self.used) for j in range(models)
            ]
        largest = max(abs(value) for row in gradient.values() for value in row)
        for i, row in gradient.items():
            scale = max(abs(value) for value in row) if options.w_step == "maxnorm-per-row" else largest
            for j in range(models):
                if options.w_step == "adam":
                    first, second, count = self.adam[i][j]
                    first, second = 0.9 * first + 0.1 * row[j], 0.999 * second + 0.001 * row[j] ** 2
                    count += 1
                    self.adam[i][j] = (first, second, count)
                    step = first / (1 - 0.9**count) / math.sqrt(second / (1 - 0.999**count))
                else:
                    step = row[j] / scale
                self.logits[i][j] -= options.lr_w * step
        for j in range(models):
            carried = {i: shares[i] * self.weights(i)[j] for i in displacement}
            mass = sum(carried.values())
            if mass < options.min_mass:
                continue
            for i, moved in displacement.items():
                c = carried[i] / mass if options.theta_norm == "column" else carried[i]
                for k in range(len(moved)):
                    self.theta[j][k] -= options.lr_theta * c * moved[k]


# ----------------------------------------------------------------------------------------- the specification's own list


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
    strategy = FedMerge(FedMergeOptions(models=models, jitter=0.0, w_step=w_step, variant="factors"), seed=3)
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
        equal[0] *= 1 + 1e-6  # a difference that is small, but not rounding
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
    assert torch.equal(steps[1], steps[2])  # a power of two rounds nothing
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
    products = sum(w[j] * b[j] @ other_a[j] for j in range(3))
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
        products = sum(w[j] * whole[j][module, Factor.B] @ whole[j][module, Factor.A] for j in range(3))
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
    strategy = FedMerge(FedMergeOptions(models=models, jitter=jitter), seed=1)
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
                assert len(slots[0].data) == len(slots[1].data)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------ the class against the reference


@pytest.mark.parametrize("theta_norm", ["column", "none"])
@pytest.mark.parametrize("w_client_weight", [True, False])
@pytest.mark.parametrize("w_step", ["maxnorm", "maxnorm-per-row", "adam"])
@pytest.mark.parametrize("variant", ["frozen-a", "factors"])
def test_rounds_are_those_of_an_implementation_in_plain_loops(
    variant: str, w_step: str, w_client_weight: bool, theta_norm: str
) -> None:
    strategy = fedmerge(
        models=3, variant=variant, w_step=w_step, w_client_weight=w_client_weight, theta_norm=theta_norm,
        jitter=0.5, lr_theta=0.8, min_mass=0.05, w_layers="q_proj.B,head.*",
    )  # fmt: skip
    part = LAYOUT.select(() if variant == "factors" else NOT_A)
    strategy.logits = draw(4, 3, seed=7)
    chosen = torch.cat(
        [torch.full((entry.size,), entry.name in ("q_proj.B", "head.weight", "head.bias")) for entry in part.entries]
    )
    rows = [strategy.rows[name] for name in NAMES]
    reference = Reference(strategy.options, strategy.theta, strategy.logits[rows], list(COUNTS), chosen)
    for round_, present in enumerate((NAMES, ("dan", "ada"), NAMES, ("ben",)), start=1):
        displacement = {}
        for name in present:
            received = Adapter(part, torch.tensor(reference.merged(NAMES.index(name))))
            moved = drift(name, round_, received)
            displacement[NAMES.index(name)] = (received.vector.double() - moved.vector.double()).tolist()
        play(strategy, present, round_)
        reference.round(displacement)
        torch.testing.assert_close(
            strategy.logits[rows], torch.tensor(reference.logits, dtype=torch.float64), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(strategy.theta, torch.tensor(reference.theta), rtol=0, atol=2e-5)


def test_trained_a_is_averaged_as_fedavg_does_and_the_rest_is_merged() -> None:
    strategy = fedmerge(models=3, variant="trained-a", jitter=0.5)
    strategy.logits = draw(4, 3, seed=7)
    sent = {name: personal(strategy, name) for name in NAMES}
    before, logits = strategy.theta.double(), strategy.logits.clone()
    play(strategy, NAMES, 1)
    trained = {name: drift(name, 1, sent[name]) for name in NAMES}
    p = [count / sum(COUNTS) for count in COUNTS]
    for name in NAMES:
        delivered = personal(strategy, name)
        for module in LAYOUT.lora_modules:
            expected = sum(p_i * trained[n][module, Factor.A].double() for p_i, n in zip(p, NAMES, strict=True))
            torch.testing.assert_close(delivered[module, Factor.A].double(), expected, rtol=0, atol=1e-6)
    part = LAYOUT.select(NOT_A)
    w = torch.softmax(strategy.logits, dim=1)
    for j in range(3):
        c = torch.stack([p_i * w[strategy.rows[name], j] for p_i, name in zip(p, NAMES, strict=True)])
        moved = torch.stack([(sent[n].part(part).vector - trained[n].part(part).vector).double() for n in NAMES])
        torch.testing.assert_close(strategy.theta[j].double(), before[j] - (c / c.sum()) @ moved, rtol=0, atol=1e-6)
    assert not torch.equal(strategy.logits, logits)


@pytest.mark.parametrize("init", ["jitter", "cluster"])
@pytest.mark.parametrize("theta_norm", ["column", "none"])
@pytest.mark.parametrize("w_step", ["maxnorm", "maxnorm-per-row", "adam"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_combination_of_options_runs(variant: str, w_step: str, theta_norm: str, init: str) -> None:
    strategy = fedmerge(models=3, variant=variant, w_step=w_step, theta_norm=theta_norm, init=init)
    start = personal(strategy, "ada").vector.clone()
    for round_ in (1, 2, 3):
        record = play(strategy, NAMES, round_)
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert set(record["weights"]) == set(NAMES)
        for weights in record["weights"].values():
            assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in strategy.state().tensors.values())
    assert strategy.logits.abs().max() > 0
    assert not torch.equal(personal(strategy, "ada").vector, start)
    assert all(personal(strategy, name).is_finite for name in NAMES)


def test_zero_displacements_change_nothing() -> None:
    for w_step in ("maxnorm", "maxnorm-per-row", "adam"):
        strategy = fedmerge(models=3, w_step=w_step)
        state = strategy.state()
        play(strategy, NAMES, 1, lambda name, round_, received: received)
        assert torch.equal(strategy.theta, state.tensors["theta"])
        assert torch.equal(strategy.logits, state.tensors["logits"])


def test_the_order_of_arrival_changes_no_bit() -> None:
    first, second = fedmerge(models=3, w_step="adam", jitter=0.1), fedmerge(models=3, w_step="adam", jitter=0.1)
    for round_ in (1, 2):
        play(first, NAMES, round_)
        play(second, NAMES[::-1], round_)
    for name, tensor in first.state().tensors.items():
        assert torch.equal(tensor, second.state().tensors[name])


def test_the_first_adam_step_of_a_row_is_the_rate_however_late_it_comes() -> None:
    strategy = fedmerge(names=NAMES[:2], models=3, w_step="adam", jitter=0.5, lr_w=0.01)
    for round_ in range(1, 30):
        play(strategy, NAMES[:2], round_)
    strategy.enrol(client_of("late", LAYOUT))
    before = strategy.logits[2].clone()
    play(strategy, ["ada", "late"], 30)
    assert (strategy.logits[2] - before).abs().tolist() == pytest.approx([0.01] * 3, rel=1e-6)


# ------------------------------------------------------------------------------------------------ initialisation, joining


def test_the_start_is_the_base_model_with_tiny_differences_between_the_models() -> None:
    strategy = fedmerge(models=5, variant="factors", jitter=1e-3)
    for entry in LAYOUT.entries:
        models = strategy.theta[:, LAYOUT.slice_of(entry.name)].double()
        spread = float((models - models.mean(dim=0)).norm() / (5 * entry.size) ** 0.5)
        if entry.factor in (Factor.B, Factor.WEIGHT):
            assert spread == pytest.approx(1e-3 / entry.shape[0] ** 0.5, rel=0.5)
        else:
            assert spread == 0
    initial = Adapter.initial(LAYOUT, 3)
    torch.testing.assert_close(personal(strategy, "ada").vector, initial.vector, rtol=0, atol=1e-7)
    assert torch.equal(fedmerge(models=1).theta[0], initial.select(NOT_A).vector)


def test_frozen_a_is_drawn_at_the_client_and_stays() -> None:
    strategy = fedmerge(models=2)
    node = FakeNode("ada", LAYOUT)
    for round_ in (1, 2):
        dispatch = dispatch_of(strategy, "ada", round_)
        blobs = {slot: array.data for slot, array in dispatch.content["adapters"].items()}  # type: ignore[union-attr]
        node.run(dispatch.plan, blobs)
        (held,) = node.slots.values()
        assert torch.equal(held.select([Factor.A]).vector, Adapter.initial(LAYOUT, 3).select([Factor.A]).vector)
        assert held[("q_proj", Factor.B)].abs().max() > 0.1


def test_a_client_that_joins_late_gets_the_mean_of_the_others_weights() -> None:
    strategy = fedmerge(models=3)
    play(strategy, NAMES, 1)
    strategy.logits = torch.tensor([[30.0, -30, 0], [-30, 30, 0], [30, -30, 0], [30, -30, 0]], dtype=torch.float64)
    strategy.enrol(client_of("late", LAYOUT))
    weights = torch.softmax(strategy.logits[strategy.rows["late"]], dim=0)
    assert weights.tolist() == pytest.approx([0.75, 0.25, 0.0], abs=1e-9)
    logits = strategy.logits.clone()
    strategy.enrol(client_of("ben", LAYOUT, 30))  # again: after a restart of its machine, say
    assert torch.equal(strategy.logits, logits)


def test_clusters_start_from_the_mean_upload_of_each_group() -> None:
    strategy = fedmerge(models=2, init="cluster")

    def move(name: str, round_: int, received: Adapter) -> Adapter:
        sign = 1 if name in ("ada", "dan") else -1
        return Adapter(received.layout, sign * torch.ones(received.layout.size) + 0.01 * noise(name, 1, received.layout).vector)

    part = LAYOUT.select(NOT_A)
    uploads = {name: move(name, 1, Adapter.zeros(part)).vector for name in NAMES}
    record = play(strategy, NAMES, 1, move)
    centres = {
        ("ada", "dan"): (uploads["ada"] + uploads["dan"]) / 2,
        ("ben", "cyd"): (uploads["ben"] + uploads["cyd"]) / 2,
    }
    for members, centre in centres.items():
        for name in members:
            weights = record["weights"][name]
            favourite = max(range(2), key=lambda j, found=weights: found[j])  # type: ignore[misc]
            torch.testing.assert_close(strategy.theta[favourite], centre, rtol=0, atol=1e-5)
            assert weights[favourite] > 0.9
    assert strategy.logits.sum(dim=1).abs().max() < 1e-9
    before = strategy.theta.clone()
    play(strategy, NAMES, 2)
    assert not torch.equal(strategy.theta, before)


def test_cluster_logits_are_minus_the_scaled_squared_distances() -> None:
    uploads = draw(6, 20, seed=3)
    centres, logits = cluster(uploads, 3, 0.25, seed=1)
    distances = torch.tensor([[float(((u - c) ** 2).sum()) for c in centres] for u in uploads], dtype=torch.float64)
    expected = -distances / (0.25 * distances.mean())
    torch.testing.assert_close(logits, expected - expected.mean(dim=1, keepdim=True), rtol=0, atol=1e-9)
    nearest = distances.argmin(dim=1)
    for j in range(3):  # Lloyd's fixed point
        torch.testing.assert_close(centres[j], uploads[nearest == j].mean(dim=0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_models_than_clients_can_be_clustered(variant: str) -> None:
    strategy = fedmerge(models=7, init="cluster", variant=variant)
    for round_ in (1, 2, 3):
        play(strategy, NAMES if round_ > 1 else NAMES[:2], round_)
    assert strategy.theta.shape[0] == 7
    assert all(bool(torch.isfinite(tensor).all()) for tensor in strategy.state().tensors.values())


def test_a_client_that_missed_the_clustering_has_the_mean_weights() -> None:
    strategy = fedmerge(models=2, init="cluster")
    weights = play(strategy, ["ada", "ben", "cyd"], 1)["weights"]
    expected = [sum(weights[name][j] for name in ("ada", "ben", "cyd")) / 3 for j in range(2)]
    assert weights["dan"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("uploads", [torch.zeros(3, 8), torch.ones(1, 8), torch.ones(4, 8)])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_clusters_of_equal_uploads_are_finite(uploads: Tensor) -> None:
    centres, logits = cluster(uploads, 3, 0.25, seed=2**62)
    assert centres.shape == (3, 8)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(centres, uploads[:1].expand(3, 8))


# ---------------------------------------------------------------------------------------------------------- transport


@pytest.mark.parametrize("variant", VARIANTS)
def test_displacements_are_measured_from_what_the_client_received(variant: str) -> None:
    """With a lossy downlink a client that does not move must move nothing: the loss is not its displacement."""
    strategy = fedmerge(models=2, variant=variant, training=Training(downlink_encoding="int8"))
    strategy.theta = draw(*strategy.theta.shape, seed=4).float()
    theta, logits = strategy.theta.clone(), strategy.logits.clone()
    for name in NAMES:
        dispatch = dispatch_of(strategy, name)
        ((slot, received),) = dispatch.received.items()
        ((_, sent),) = strategy.brief(1, strategy.clients[name]).adapters.items()
        assert (received.vector - sent.vector).abs().max() > 1e-4
        strategy.absorb(1, strategy.clients[name], Answer({slot: received}, {slot: received}, {}, 10, _report()))
    strategy.settle(1)
    assert torch.equal(strategy.theta, theta)
    assert torch.equal(strategy.logits, logits)


def _report() -> Any:
    from proto.fedalloy.v1 import report_pb2

    return report_pb2.Report()


def test_the_pull_is_to_what_was_received_and_frozen_a_is_not_trained() -> None:
    for variant, mu in itertools.product(VARIANTS, (0.0, 0.02)):
        strategy = fedmerge(models=2, variant=variant, mu=mu)
        brief = strategy.brief(1, strategy.clients["ada"])
        kinds = [step.WhichOneof("kind") for step in brief.steps]
        assert kinds == ["initialise"] * (variant == "frozen-a") + ["evaluate", "train", "send"]
        train = brief.steps[-2].train
        assert train.HasField("proximal") == (mu > 0)
        assert (train.proximal.slot, train.proximal.mu) == ((list(brief.adapters)[0], mu) if mu else ("", 0.0))
        assert list(train.part.factors) == list(send_step(brief).part.factors)
        assert bool(train.part.factors) == (variant == "frozen-a")


# --------------------------------------------------------------------------------------------------------------- state


def through_the_disk(state: State) -> State:
    return State(load(save(state.tensors)), json.loads(json.dumps(state.values, allow_nan=False)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"w_step": "adam"},
        {"w_step": "maxnorm-per-row", "variant": "trained-a"},
        {"init": "cluster", "variant": "factors"},
        {"init": "cluster", "w_step": "adam"},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options: dict[str, Any]) -> None:
    straight = fedmerge(models=3, **options)
    for round_ in (1, 2, 3, 4, 5):
        play(straight, NAMES if round_ != 2 else NAMES[:3], round_)
    for stop in (0, 1, 3):
        first = fedmerge(models=3, **options)
        for round_ in range(1, stop + 1):
            play(first, NAMES if round_ != 2 else NAMES[:3], round_)
        state = first.state()
        saved = through_the_disk(state)
        for round_ in range(stop + 1, 6):  # the first run goes on; what was saved must not follow it
            play(first, NAMES if round_ != 2 else NAMES[:3], round_)
        for name, tensor in saved.tensors.items():
            assert torch.equal(tensor, state.tensors[name]), f"the saved {name} changed afterwards"
        second = fedmerge(names=NAMES[::-1], models=3, **options)  # registered in another order
        for name, count in zip(NAMES, COUNTS, strict=True):
            second.clients[name] = client_of(name, LAYOUT, count)
        second.load_state(saved)
        for round_ in range(stop + 1, 6):
            play(second, NAMES if round_ != 2 else NAMES[:3], round_)
        for other in (first, second):
            for name in NAMES:
                assert torch.equal(personal(other, name).vector, personal(straight, name).vector)
            for name, tensor in straight.state().tensors.items():
                assert torch.equal(tensor, other.state().tensors[name])


def test_a_client_that_the_saved_state_does_not_know_is_new() -> None:
    first = fedmerge(names=NAMES[:2], models=3)
    play(first, NAMES[:2], 1)
    second = fedmerge(names=("zoe", *NAMES[:2]), models=3)
    second.load_state(through_the_disk(first.state()))
    for name in NAMES[:2]:
        assert torch.equal(personal(second, name).vector, personal(first, name).vector)
    weights = play(second, ["zoe", *NAMES[:2]], 2)["weights"]
    assert sum(weights["zoe"]) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------- errors


def test_w_layers_that_match_nothing_refuse_every_client_and_leave_nothing_behind() -> None:
    strategy = FedMerge(FedMergeOptions(w_layers="head.*, k_proj.*"))
    for _ in range(2):
        with pytest.raises(StrategyError, match=r"w-layers: 'k_proj\.\*' matches none of the tensors head\.bias, head\.wei"):
            strategy.enrol(client_of("ada", LAYOUT))
        assert not strategy.clients
    with pytest.raises(StrategyError, match="matches none"):
        FedMerge(FedMergeOptions(w_layers="*.A")).enrol(client_of("ada", LAYOUT))  # A is not merged with a frozen A
    FedMerge(FedMergeOptions(w_layers="*.A", variant="factors")).enrol(client_of("ada", LAYOUT))


def test_w_layers_choose_what_the_logits_see() -> None:
    """Clients that move the classifier only: the default patterns see nothing, head.* does."""

    def move(name: str, round_: int, received: Adapter) -> Adapter:
        moved = received.clone()
        moved["head", Factor.WEIGHT].add_(noise(name, round_, received.layout)["head", Factor.WEIGHT])
        return moved

    blind, seeing = fedmerge(models=2, jitter=0.5), fedmerge(models=2, jitter=0.5, w_layers="head.weight")
    for strategy in (blind, seeing):
        play(strategy, NAMES, 1, move)
    assert not blind.logits.any()
    assert float(seeing.logits.abs().max()) == pytest.approx(0.05)


def test_nothing_can_be_asked_before_a_client_is_enrolled() -> None:
    strategy: AlloyStrategy = FedMerge()
    with pytest.raises(StrategyError, match="no client is enrolled"):
        strategy.state()
    with pytest.raises(StrategyError, match="no client is enrolled"):
        strategy.load_state(State({"theta": torch.zeros(5, 1), "logits": torch.zeros(0, 5), "moments": torch.zeros(2, 0, 5),
                                   "updates": torch.zeros(0, dtype=torch.int64), "base": torch.zeros(1)}, {"rows": {}, "settled": 0}))  # fmt: skip  # noqa: E501


def test_columns_are_summed_in_chunks_of_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, logits, moved = draw(3, 1000), draw(5, 3, seed=1), draw(5, 1000, seed=2)
    whole = logit_gradient(theta, logits, moved)
    monkeypatch.setattr("strategies.fedmerge._CHUNK", 7)
    torch.testing.assert_close(logit_gradient(theta, logits, moved), whole, rtol=0, atol=1e-12)


def test_random_adapters_are_not_all_alike() -> None:
    """The helpers that everything above rests on."""
    assert not torch.equal(noise("ada", 1, LAYOUT).vector, noise("ada", 2, LAYOUT).vector)
    assert not torch.equal(noise("ada", 1, LAYOUT).vector, noise("ben", 1, LAYOUT).vector)
    assert torch.equal(random_adapter(LAYOUT, 4).vector, random_adapter(LAYOUT, 4).vector)
