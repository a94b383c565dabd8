"""Steps that compare slots on data, attribute examples, and send second moments of inputs; against the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from client_app.model.personal import PersonalModel
from client_app.plan.gram import input_moments
from client_app.plan.interpreter import PlanError
from client_app.plan.selection import improvement_weights
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from fedalloy_adapters.parts import layout_of_gram
from fedalloy_adapters.wire.codec import decode
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app.plan.plan_client import Client
from tests.fedalloy_adapters.samples import random_adapter


@pytest.fixture
def client(model: PersonalModel, tmp_path: Path) -> Client:
    return Client(model, tmp_path)


def test_the_best_candidate_is_copied(client: Client) -> None:
    losses = {slot: client.loss(slot) for slot in "abc"}
    best = min(losses, key=lambda slot: losses[slot])
    (result,) = client.run(steps.select("chosen", ["a", "b", "c"], "best", split="train"))
    assert list(result.select.losses) == pytest.approx(list(losses.values()), rel=1e-6)
    assert list(result.select.weights) == [float(slot == best) for slot in "abc"]
    assert client.slots["chosen"].digest == client.slots[best].digest
    (few,) = client.run(steps.select("chosen", ["a", "b"], "best", split="train", samples=2))
    assert few.select.losses[0] != pytest.approx(losses["a"], rel=1e-6)


def test_a_slot_moves_towards_what_improves_it(client: Client) -> None:
    losses = {slot: client.loss(slot) for slot in "abc"}
    worst, *better = sorted(losses, key=lambda slot: -losses[slot])
    before, others = client.slots[worst], [client.slots[slot] for slot in better]
    (result,) = client.run(steps.select(worst, better, "improvement", split="validation"))
    gains = [
        (losses[worst] - losses[slot]) / float((other.vector - before.vector).norm())
        for slot, other in zip(better, others, strict=True)
    ]
    weights = [gain / sum(gains) for gain in gains]
    assert list(result.select.weights) == pytest.approx(weights, rel=1e-4)
    assert result.select.target_loss == pytest.approx(losses[worst], rel=1e-6)
    moved = before.vector + sum(w * (o.vector - before.vector) for w, o in zip(weights, others, strict=True))
    torch.testing.assert_close(client.slots[worst].vector, moved, rtol=0, atol=1e-5)
    client.slots[worst], best = before, better[-1]
    digest = client.slots[best].digest
    (result,) = client.run(steps.select(best, ["a", "b", "c"], "improvement", split="validation"))
    assert not any(result.select.weights)
    assert client.slots[best].digest == digest


def test_improvement_is_per_distance() -> None:
    moves = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    found = improvement_weights(2.0, torch.tensor([1.0, 1.5, 2.5, 0.0], dtype=torch.float64), moves)
    assert found.tolist() == pytest.approx([0.2 / 0.7, 0.5 / 0.7, 0, 0])
    broken = improvement_weights(2.0, torch.tensor([float("nan"), 1.5, float("inf"), 0.0]).double(), moves)
    assert broken.tolist() == [0, 1, 0, 0]


def test_moments_are_those_of_the_inputs(client: Client) -> None:
    client.model.load("a", client.slots["a"])
    client.model.activate({"a": 1.0})
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        client.model.module.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0].detach())
        )
        for name in client.model.layout.modules
    ]
    client.logits("a")
    for hook in hooks:
        hook.remove()
    (result,) = client.run(steps.gram(Training(), "moments", steps.mixture("a")))
    assert (result.gram.slot, result.gram.examples) == ("moments", 12)
    found = decode(client.uploads["moments"], expected=layout_of_gram(client.model.layout))
    for name, inputs in seen.items():
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        expected = (x.T @ x / len(x))[tuple(torch.triu_indices(x.shape[1], x.shape[1]))]
        torch.testing.assert_close(found[name, Factor.GRAM].double(), expected, rtol=1e-4, atol=1e-4)
    assert set(seen) == set(client.model.layout.modules)
    assert input_moments(client.model, client.data).digest == found.digest  # no hook is left behind


def attributed(client: Client, shares: list[float]) -> torch.Tensor:
    """``q [n, 2]`` for the slots a and b, from the definition."""
    columns = []
    for slot in "ab":
        columns.append(functional.cross_entropy(client.logits(slot), client.data.labels, reduction="none"))
    weights = torch.tensor(shares) * torch.exp(-torch.stack(columns, dim=1))
    return weights / weights.sum(dim=1, keepdim=True)


def test_examples_are_attributed_and_shares_follow(client: Client) -> None:
    expected = attributed(client, [0.5, 0.5])
    (result,) = client.run(steps.attribute(["a", "b"], "shares"))
    assert result.attribute.examples == 12
    torch.testing.assert_close(client.slots["shares"].vector, expected.mean(dim=0), rtol=0, atol=1e-5)
    again = attributed(client, client.slots["shares"].vector.tolist())
    client.run(steps.attribute(["a", "b"], "shares"))
    torch.testing.assert_close(client.slots["shares"].vector, again.mean(dim=0), rtol=0, atol=1e-5)
    assert float((again.mean(dim=0) - expected.mean(dim=0)).abs().max()) > 1e-4


def test_an_ensemble_averages_probabilities_and_not_logits(client: Client) -> None:
    mix = steps.ensemble(["a", "b"], "shares")
    _, result = client.run(steps.attribute(["a", "b"], "shares"), steps.evaluate(Training(), mix))
    shares = client.slots["shares"].vector
    mean = sum(share * client.logits(slot).softmax(dim=1) for share, slot in zip(shares, "ab", strict=True))
    loss = float(functional.nll_loss(torch.as_tensor(mean).log(), client.data.labels))
    assert result.evaluate.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    accuracy = float((torch.as_tensor(mean).argmax(dim=1) == client.data.labels).float().mean())
    assert result.evaluate.metrics["accuracy"] == pytest.approx(accuracy)


def test_a_saved_ensemble_is_its_slots_and_shares(client: Client, tmp_path: Path) -> None:
    mix = steps.ensemble(["a", "b"], "shares")
    (_, result) = client.run(steps.attribute(["a", "b"], "shares"), steps.save(mix))
    assert result.save.in_parts
    found = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert found == {"a", "b", "gates.safetensors", "mixture.json"}
    assert json.loads((tmp_path / "adapter" / "mixture.json").read_text())["shares"] == "shares"


def test_training_counts_examples_by_what_was_attributed(client: Client) -> None:
    """One step of the whole split is a step down the weighted loss: the first step's loss says which loss it is."""
    q = attributed(client, [0.5, 0.5])
    training = Training(local_steps=1, batch_size=12)
    _, result = client.run(
        steps.attribute(["a", "b"], "shares"), steps.train(training, steps.mixture("a"), ["a"], attributed_to="a")
    )
    client.slots["a"] = random_adapter(client.model.layout, 0, scale=0.3)
    each = functional.cross_entropy(client.logits("a"), client.data.labels, reduction="none")
    assert result.train.first_loss == pytest.approx(float((q[:, 0] * each).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (steps.select("a", [], "best", split="train"), "rule 1 over 0 slots, expected a known rule and at least one"),
        (plan_pb2.Step(select=plan_pb2.SelectStep(slots=["a"], target="a", split="train")), "rule 0 over 1 slots"),
        (steps.select("a", ["b"], "best", split="nowhere"), "no split 'nowhere'"),
        (steps.select("a", ["b", "../x"], "best", split="train"), "slot name '../x'"),
        (steps.gram(Training(), "..", steps.mixture("a")), "slot name '..'"),
        (steps.gram(Training(), "g", steps.ensemble(["a", "b"], "c")), "an ensemble can be evaluated and saved, not"),
        (steps.merge("a", steps.ensemble(["a", "b"], "c")), "an ensemble is not a sum of adapters"),
        (steps.evaluate(Training(), steps.ensemble(["a", "b"], "../c")), "slot name '../c'"),
        (steps.evaluate(Training(), steps.ensemble(["a", "b"], "c")), "for 2 slots"),
        (steps.attribute(["a", "a"], "shares"), "expected at least one and none twice"),
        (
            steps.train(Training(), steps.mixture("a"), ["a"], attributed_to="a"),
            "the training split was not attributed to slot 'a'",
        ),
    ],
)
def test_plans_that_cannot_be_carried_out(client: Client, step: plan_pb2.Step, message: str) -> None:
    with pytest.raises(PlanError, match=message.replace(".", r"\.")):
        client.run(step)


def test_adapters_of_other_layouts_are_no_candidates(client: Client, model: PersonalModel) -> None:
    client.slots["b"] = Adapter.zeros(model.layout.with_ranks(dict.fromkeys(model.layout.lora_modules, 1)))
    wrong: Any = steps.select("a", ["b"], "improvement", split="train")
    with pytest.raises(PlanError, match=r"rank 1 for .*, expected 2"):
        client.run(wrong)
