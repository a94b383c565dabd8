"""Mixtures whose coefficients differ by example: against the formula, one example at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import ClientData
from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import PlanError
from fedalloy_adapters.layout import Factor
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app.plan.plan_client import EXAMPLES, Client

MIX = steps.by_likeness("a", "b", "like")


@pytest.fixture
def client(model: PersonalModel, tmp_path: Path) -> Client:
    return Client(model, tmp_path, "ab")


def keep(most: float, samples: int = 0) -> plan_pb2.Step:
    return steps.likeness("like", "a", samples=samples, most=most)


def embeddings(client: Client) -> Tensor:
    """Means over tokens of what the last adapted module reads with slot ``a`` beside the base."""
    seen: list[Tensor] = []
    name = client.model.layout.lora_modules[-1]
    client.logits("a")
    hook = client.model.module.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    client.logits("a")
    hook.remove()
    return seen[0].double().mean(dim=1)


def test_coefficients_are_mean_cosines(client: Client) -> None:
    z = embeddings(client)
    kept, result = client.run(keep(0.7), steps.evaluate(Training(), MIX))
    assert kept.likeness.examples == EXAMPLES
    cosines = functional.cosine_similarity(z[:, None], z[None], dim=2).mean(dim=1)
    losses = []
    for index, share in enumerate((0.7 * cosines.clamp_min(0)).tolist()):
        client.model.load("a", client.slots["a"])
        client.model.load("b", client.slots["b"])
        client.model.activate({"a": share, "b": 1 - share})
        one = client.data.batch(torch.tensor([index]))
        with torch.no_grad():
            losses.append(float(functional.cross_entropy(client.model.logits(one.inputs), one.labels)))
    assert result.evaluate.metrics["loss"] == pytest.approx(sum(losses) / EXAMPLES, rel=1e-5)
    client.run(keep(0.0), steps.evaluate(Training(), MIX))


def test_at_its_end_it_is_the_other_slot_alone(client: Client) -> None:
    _, nothing, alone = client.run(
        keep(0.0), steps.evaluate(Training(), MIX), steps.evaluate(Training(), steps.mixture("b"), "alone")
    )
    assert nothing.evaluate.metrics["loss"] == pytest.approx(alone.evaluate.metrics["loss"], rel=1e-6)


def test_few_examples_are_drawn_and_what_is_kept_is_saved_with_the_model(client: Client, tmp_path: Path) -> None:
    few, saved = client.run(keep(0.5, samples=5), steps.save(MIX))
    assert few.likeness.examples == 5
    assert saved.save.in_parts
    kept = load_file(tmp_path / "adapter" / "gates.safetensors")
    assert set(kept) == {"like/likeness", "like/most"}
    assert float(kept["like/most"]) == 0.5
    assert torch.equal(kept["like/likeness"], client.slots["like"]["likeness", Factor.GATE])
    assert 0 < float(kept["like/likeness"].norm()) <= 1


def test_examples_of_several_tasks_are_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ClientData("one", "image-classification", {"train": client.data})
    monkeypatch.setattr(
        "tests.client_app.plan.plan_client.ClientData",
        lambda *_: ClientData.of_tasks([one, replace(one, task="two")]),
    )
    for step in (keep(0.5), steps.density(["a"], "shares", [], dimensions=2, seed=1)):
        with pytest.raises(PlanError, match=r"several tasks"):
            client.run(step)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([keep(1.1)], "a largest coefficient of 1.1, expected 0 to 1"),
        ([keep(float("nan"))], "a largest coefficient of nan"),
        ([steps.likeness("../x", "a", samples=0, most=0.5)], "slot name '../x'"),
        ([steps.likeness("like", "nobody", samples=0, most=0.5)], "nobody"),
        ([steps.evaluate(Training(), steps.by_likeness("a", "b", "../x"))], "slot name '../x'"),
        ([steps.evaluate(Training(), steps.by_likeness("a", "b", "a"))], "slot 'a' and 2 terms, expected a likeness"),
        ([keep(0.5), steps.train(Training(), MIX, ["a"])], "can be evaluated and saved, not trained"),
        ([keep(0.5), steps.merge("a", MIX)], "not a sum of adapters"),
        (
            [keep(0.5), steps.evaluate(Training(), plan_pb2.Mixture(terms=MIX.terms[:1], likeness="like"))],
            "1 terms, expected a likeness and two with 1",
        ),
    ],
)
def test_plans_that_cannot_be_carried_out(client: Client, plan: list[plan_pb2.Step], message: str) -> None:
    with pytest.raises(PlanError, match=message.replace(".", r"\.")):
        client.run(*plan)
