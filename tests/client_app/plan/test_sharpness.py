"""Sharpness-aware steps: the gradient is that at the top, of the same batch with the same dropout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client_app.plan.names import PlanError
from client_app.plan.sharpness import at_the_top
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app.plan.tap_toys import LOCAL, SAME, W, X
from tests.client_app.plan.test_optimizers import PLAIN, Bench, train
from tests.toys.multi_task_toys import ToyClient


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("radius", [0.0, 0.05, 0.5])
def test_a_step_moves_by_the_gradient_at_the_top(tmp_path: Path, radius: float, micro_batch: int) -> None:
    bench = Bench(tmp_path)
    bench.run(1, steps.initialise("local", 3), train(replace(PLAIN, learning_rate=1.0)))
    before = bench.numbers(2)
    gradient = bench.gradient(before)
    top = bench.gradient(before + radius * gradient / gradient.norm())
    bench.model.micro_batch = micro_batch
    bench.run(2, train(PLAIN, sharpness_radius=radius))
    torch.testing.assert_close(bench.numbers(3), before - 0.1 * top, atol=1e-6, rtol=1e-5)
    assert radius == 0 or float((top - gradient).norm()) > 1e-4


def test_the_pull_and_gates_are_part_of_what_climbs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run(1, steps.initialise("local", 3), steps.initialise("global", 4))
    v, w = bench.numbers(2), bench.numbers(2, "global")
    whole = bench.gradient(v) + 0.7 * (v - w)
    top = v + 0.3 * whole / whole.norm()
    bench.run(2, train(PLAIN, proximal=("global", 0.7), sharpness_radius=0.3))
    expected = v - 0.1 * (bench.gradient(top) + 0.7 * (top - w))
    torch.testing.assert_close(bench.numbers(3), expected, atol=1e-6, rtol=1e-5)
    gates = steps.each_gated({"local": "one", "global": "two"})
    starts = [steps.initialise_gates(name, "scalar") for name in ("one", "two")]
    plain = steps.train(Training(local_steps=3, batch_size=8), gates, ["one", "two"])
    sharp = steps.train(Training(local_steps=3, batch_size=8), gates, ["one", "two"], sharpness_radius=0.5)
    ends = []
    for index, step in enumerate((plain, sharp)):
        other = Bench(tmp_path / str(index))
        other.run(1, steps.initialise("local", 3), train(PLAIN), steps.initialise("global", 4), *starts, step)
        ends.append(torch.cat([other.numbers(2, "one"), other.numbers(2, "two")]))
    assert not torch.equal(*ends)


def test_dropout_is_the_same_at_the_top_and_goes_on_as_without_climbing(tmp_path: Path) -> None:
    """With a radius of nearly nothing the second gradient is the first one, whatever dropout has drawn."""
    ends, losses = [], []
    for index, radius in enumerate((0.0, 1e-20)):
        client = ToyClient(tmp_path / str(index), dropout=0.3)
        step = steps.train(LOCAL, steps.mixture(X), [X], draw=SAME, sharpness_radius=radius)
        ends.append(client.run(1, [steps.initialise(X, 5), step])[X].vector)
        losses.append(client.report.results[1].train.mean_loss)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_a_teacher_says_is_counted_once_a_batch(tmp_path: Path) -> None:
    found = []
    for index, radius in enumerate((0.0, 1e-20, 3.0)):
        client = ToyClient(tmp_path / str(index), tasks=("digit",), counts=(9,))
        student = steps.train(replace(LOCAL, local_steps=1), steps.mixture(X), [X], draw=SAME, sharpness_radius=radius)
        step = steps.distill(student, steps.mixture(W), {"digit": 1.0})
        client.run(1, [steps.initialise(X, 5), step], {W: client.model.initial(9)})
        found.append(client.report.results[1].distill.divergences["digit"])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("radius", [-0.1, float("inf"), float("nan")])
def test_what_is_no_radius_is_refused(tmp_path: Path, radius: float) -> None:
    with pytest.raises(PlanError, match=r"sharpness radius .*, expected a finite number of at least 0"):
        Bench(tmp_path).run(1, steps.initialise("local", 3), train(PLAIN, sharpness_radius=radius))


def test_numbers_are_back_after_an_error_at_the_top() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)

    def fail() -> None:
        with at_the_top([parameter], 0.5, torch.device("cpu")) as top:
            top.climb()
            assert not torch.equal(parameter, torch.ones(3))
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert torch.equal(parameter, torch.ones(3))
