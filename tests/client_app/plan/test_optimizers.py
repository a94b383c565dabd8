"""Train steps with SGD, with moments that stay with their slot, and with gates that learn at a rate of their own."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import ClientData, Dataset
from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import Interpreter
from client_app.plan.names import PlanError
from client_app.plan.slots import SlotStore
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from proto.fedalloy.v1 import plan_pb2
from strategies.families.gates import gate_scale
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.fedalloy_adapters.samples import random_adapter
from tests.fedalloy_adapters.tiny_vit import base_of, images

PLAIN = Training(
    local_steps=1, batch_size=8, learning_rate=0.1, max_grad_norm=0.0, optimizer="sgd", optimizer_state="keep"
)


class Bench:
    """One client with eight examples, so that every batch is all of them."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.model = PersonalModel(base_of(), 2, 4.0)
        self.data = Dataset({"pixel_values": images(8, seed=1)}, torch.arange(8) % 3)
        self.store = SlotStore(folder, "tiny", lambda: self.model.heads)

    def run(self, round_: int, *plan: plan_pb2.Step) -> list[float]:
        """Carry out a round; the losses of its evaluations."""
        client = ClientData("toy", "image-classification", dict.fromkeys(("train", "validation", "test"), self.data))
        asked = plan_pb2.Plan(version=1, run_name="run", client_id="ada", round=round_, seed=1, steps=plan)
        with self.store.transaction(round_) as slots:
            report, _ = Interpreter("ada", self.model, client, slots).run(asked, {})
        return [result.evaluate.metrics["loss"] for result in report.results if result.HasField("evaluate")]

    def numbers(self, round_: int, slot: str = "local") -> Tensor:
        """A slot before a round; nothing is written."""
        with contextlib.suppress(InterruptedError), self.store.transaction(round_) as slots:
            found = slots[slot].vector.clone()
            raise InterruptedError
        return found

    def gradient(self, vector: Tensor) -> Tensor:
        """Of the mean loss on all examples, in the slot's numbers."""
        self.model.load("probe", Adapter(self.model.layout, vector))
        self.model.activate({"probe": 1.0})
        parameters = list(self.model.trainable("probe", self.model.layout).values())
        loss = functional.cross_entropy(self.model.logits(self.data.inputs), self.data.labels)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])


def train(training: Training, **options: object) -> plan_pb2.Step:
    return steps.train(training, steps.mixture("local"), ["local"], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sgd_moves_by_rate_times_gradient_or_its_velocity(tmp_path: Path, momentum: float) -> None:
    bench = Bench(tmp_path)
    training = replace(PLAIN, momentum=momentum)
    bench.run(1, steps.initialise("local", 3))
    expected, velocity = bench.numbers(2), torch.zeros(bench.model.layout.size)
    for round_ in (2, 3, 4):
        velocity = momentum * velocity + bench.gradient(expected)
        expected = expected - 0.1 * velocity
        bench.run(round_, train(training))
        torch.testing.assert_close(bench.numbers(round_ + 1), expected, atol=1e-6, rtol=1e-5)


def test_dittos_pull_is_the_papers_with_sgd(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run(1, steps.initialise("local", 3), steps.initialise("global", 4))
    v, w = bench.numbers(2), bench.numbers(2, "global")
    bench.run(2, train(PLAIN, proximal=("global", 0.7)))
    torch.testing.assert_close(bench.numbers(3), v - 0.1 * (bench.gradient(v) + 0.7 * (v - w)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_kept_moments_go_on_to_the_bit_and_a_repeated_round_starts_from_the_old_ones(
    tmp_path: Path, optimizer: str
) -> None:
    kept = replace(PLAIN, optimizer=optimizer, momentum=0.9 * (optimizer == "sgd"))
    fresh = replace(kept, optimizer_state="fresh")
    same = {"draw": steps.Draw(seed=5)}

    def after(folder: str, training: Training, repeat: bool = False, anew: bool = False) -> Tensor:
        bench = Bench(tmp_path / folder)
        bench.run(1, steps.initialise("local", 3), train(training, **same))
        again = [steps.initialise("local", 3, keep_existing=False)] if anew else []
        for _ in range(2 if repeat else 1):
            bench.run(2, *again, train(training, **same))
        return bench.numbers(3)

    straight = Bench(tmp_path / "straight")
    straight.run(1, steps.initialise("local", 3), train(kept, **same), train(kept, **same))
    assert torch.equal(after("kept", kept), straight.numbers(2))
    assert torch.equal(after("repeated", kept, repeat=True), straight.numbers(2))
    assert not torch.equal(after("fresh", fresh), straight.numbers(2))
    assert torch.equal(after("anew", kept, anew=True), after("fresh-anew", fresh, anew=True))  # a new slot has none


def test_an_unknown_optimiser_is_refused(tmp_path: Path) -> None:
    step = train(PLAIN)
    step.train.optimizer = 9  # type: ignore[assignment]
    with pytest.raises(PlanError, match="optimizer 9 with momentum 0"):
        Bench(tmp_path).run(1, steps.initialise("local", 3), step)


@pytest.mark.parametrize("kind", ["scalar", "input"])
def test_a_gate_leaves_the_side_that_is_useless(tmp_path: Path, kind: str) -> None:
    """One side is noise: within 50 steps, at the adapters' usual rate, nearly nothing of it is left."""
    bench = Bench(tmp_path)
    training = Training(local_steps=50, batch_size=8)
    useless = random_adapter(bench.model.layout, 7, scale=0.7)
    with bench.store.transaction(1) as slots:
        slots["global"] = useless
    mix = steps.gated("global", "local", "gates")
    plan = [steps.initialise("local", 3), steps.initialise_gates("gates", kind)]
    rates = gate_scale(training, kind, 0.0)
    assert rates[Factor.GATE] * training.learning_rate == pytest.approx(0.1 if kind == "scalar" else 5e-3)
    alone, half = steps.evaluate(training, steps.mixture("local"), "alone"), steps.evaluate(training, mix, "half")
    step = steps.train(training, mix, ["gates"], rate_scales=rates)
    best, before, after = bench.run(2, *plan, alone, half, step, steps.evaluate(training, mix, "after"))
    assert after - best < 0.5 * (before - best)  # "best": none of the useless side is left
    if kind == "scalar":
        assert float(torch.sigmoid(bench.numbers(3, "gates")).min()) < 0.1
        slow = steps.gated("global", "local", "slow")
        bench.run(3, steps.initialise_gates("slow", kind), steps.train(training, slow, ["slow"]))
        assert float((torch.sigmoid(bench.numbers(4, "slow")) - 0.5).abs().max()) < 0.07  # at the adapters' rate
