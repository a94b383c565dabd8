"""Features of examples, and steps that divide examples among slots and Gaussians: against the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn import functional
from transformers import LlamaForCausalLM

from client_app.data.dataset import Base, Dataset
from client_app.model.personal import PersonalModel
from client_app.plan.density import moments
from client_app.plan.ensembles import BY_INPUT, log_probabilities
from client_app.plan.features import FeaturesError, directions, features, log_densities
from client_app.plan.interpreter import PlanError
from fedalloy_adapters.layout import Factor
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app.model.co_lora_toys import llama
from tests.client_app.plan.plan_client import EXAMPLES, Client
from tests.fedalloy_adapters.samples import random_adapter

SIZE, SEED = 3, 7
MIX = steps.ensemble(["a", "b"], "shares")


class Divider(Client):
    """Slots ``a`` and ``b``, and what is to be found for them."""

    def __init__(self, model: PersonalModel, folder: Path) -> None:
        super().__init__(model, folder, "ab")

    def features(self) -> Tensor:
        return features(self.model, self.data, directions(self.model, SIZE, SEED))

    def joint(self, shares: Tensor, gaussians: list[plan_pb2.Gaussian]) -> Tensor:
        """``q [n, M, C]`` for the slots a and b, from the definition."""
        density = densities(self.features(), gaussians).exp()
        losses = [functional.cross_entropy(self.logits(slot), self.data.labels, reduction="none") for slot in "ab"]
        found = shares * density[:, :, None] * torch.exp(-torch.stack(losses, dim=1).double())[:, None]
        return found / found.sum(dim=(1, 2), keepdim=True)


@pytest.fixture
def client(model: PersonalModel, tmp_path: Path) -> Divider:
    return Divider(model, tmp_path)


def densities(z: Tensor, gaussians: list[plan_pb2.Gaussian]) -> Tensor:
    """By PyTorch's own distributions."""
    found = []
    for gaussian in gaussians:
        mean, variance = (torch.tensor(list(row), dtype=torch.float64) for row in (gaussian.mean, gaussian.variance))
        found.append(Independent(Normal(mean, variance.sqrt()), 1).log_prob(z))
    return torch.stack(found, dim=1)


def around(z: Tensor) -> list[plan_pb2.Gaussian]:
    """Two Gaussians that divide these examples."""
    rows = (z[z[:, 0] < z[:, 0].median()], z[z[:, 0] >= z[:, 0].median()])
    return [plan_pb2.Gaussian(mean=r.mean(dim=0).tolist(), variance=(r.var(dim=0) + 1e-4).tolist()) for r in rows]


def step_of(gaussians: list[plan_pb2.Gaussian], **other: Any) -> plan_pb2.Step:
    return steps.density(["a", "b"], "shares", gaussians, **{"dimensions": SIZE, "seed": SEED} | other)


def test_features_are_those_of_the_base_whatever_is_active(client: Divider) -> None:
    seen: list[Tensor] = []
    name = client.model.layout.lora_modules[-1]
    hook = client.model.module.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    client.model.activate({})
    client.model.module.eval()
    client.model.logits(client.data.inputs)
    hook.remove()
    along = directions(client.model, SIZE, SEED)
    expected = seen[0].double().mean(dim=1) @ along.T
    client.logits("a")  # another mixture is active now
    torch.testing.assert_close(client.features(), expected, rtol=0, atol=1e-9)
    assert not torch.equal(along, directions(client.model, SIZE, SEED + 1))
    assert torch.equal(along[:2], directions(client.model, 2, SEED))
    halves = [features(client.model, client.data.batch(part), along) for part in torch.arange(EXAMPLES).split(5)]
    torch.testing.assert_close(torch.cat(halves), expected, rtol=0, atol=1e-5)
    assert not client.model.module._forward_pre_hooks_with_kwargs or len(seen) == 1  # no hook is left behind


def test_densities_are_those_of_normal_distributions() -> None:
    draw = torch.Generator().manual_seed(1)
    z, means = (torch.randn(n, SIZE, generator=draw, dtype=torch.float64) for n in (5, 2))
    variances = torch.rand(2, SIZE, generator=draw, dtype=torch.float64) + 0.1
    known = [plan_pb2.Gaussian(mean=m.tolist(), variance=v.tolist()) for m, v in zip(means, variances, strict=True)]
    torch.testing.assert_close(log_densities(z, means, variances), densities(z, known), rtol=0, atol=1e-12)


def test_examples_are_divided_among_slots_and_gaussians_together(client: Divider) -> None:
    z, equal = client.features(), torch.full((2, 2), 0.25, dtype=torch.float64)
    gaussians = around(z)
    q = client.joint(equal, gaussians)
    (result,) = client.run(step_of(gaussians))
    found = result.density
    assert found.examples == EXAMPLES
    torch.testing.assert_close(
        client.slots["shares"][BY_INPUT[0], Factor.GATE], q.mean(dim=0).float(), rtol=0, atol=1e-5
    )
    assert list(found.shares) == pytest.approx(q.mean(dim=0).sum(dim=0).tolist(), abs=1e-5)
    assert found.log_density == pytest.approx(float(densities(z, gaussians).exp().mean(dim=1).log().mean()), abs=1e-5)
    for index, gaussian in enumerate(found.gaussians):
        part = q[:, index].sum(dim=1, keepdim=True)
        mean = (part * z).sum(dim=0) / part.sum()
        variance = (part * (z - mean).square()).sum(dim=0) / part.sum()
        assert gaussian.weight == pytest.approx(float(part.mean()), abs=1e-5)
        assert list(gaussian.mean) == pytest.approx(mean.tolist(), abs=1e-5)
        assert list(gaussian.variance) == pytest.approx(variance.tolist(), abs=1e-5)
    again = client.joint(client.slots["shares"][BY_INPUT[0], Factor.GATE].double(), gaussians)
    client.run(step_of(gaussians))
    torch.testing.assert_close(
        client.slots["shares"][BY_INPUT[0], Factor.GATE], again.mean(dim=0).float(), rtol=0, atol=1e-5
    )
    training, weights = Training(local_steps=1, batch_size=EXAMPLES), again[:, :, 0].sum(dim=1)
    step = steps.train(training, steps.mixture("a"), ["a"], attributed_to="a")
    client.slots.pop("shares")
    weights = q[:, :, 0].sum(dim=1)
    each = functional.cross_entropy(client.logits("a"), client.data.labels, reduction="none")
    trained = client.run(step_of(gaussians), step)[1].train
    assert trained.first_loss == pytest.approx(float((weights * each).mean()), rel=1e-4)


def test_without_gaussians_there_is_one_and_shares_are_those_of_losses_alone(client: Divider) -> None:
    (alone,) = client.run(step_of([]))
    z = client.features()
    (gaussian,) = alone.density.gaussians
    assert list(gaussian.mean) == pytest.approx(z.mean(dim=0).tolist(), abs=1e-6)
    assert list(gaussian.variance) == pytest.approx(z.var(dim=0, correction=0).tolist(), abs=1e-6)
    client.slots.pop("shares")
    client.run(steps.attribute(["a", "b"], "plain"))
    assert list(alone.density.shares) == pytest.approx(client.slots["plain"].vector.tolist(), abs=1e-6)


def test_shares_of_an_ensemble_follow_the_input(client: Divider, tmp_path: Path) -> None:
    gaussians = around(client.features())
    _, result, saved = client.run(step_of(gaussians), steps.evaluate(Training(), MIX), steps.save(MIX))
    pi = client.slots["shares"][BY_INPUT[0], Factor.GATE].double()
    weights = densities(client.features(), gaussians).exp() @ pi
    weights /= weights.sum(dim=1, keepdim=True)
    assert float(weights.std(dim=0).max()) > 0.01
    parts = torch.stack([client.logits(slot).softmax(dim=1) for slot in "ab"], dim=1)
    expected = (weights[:, :, None] * parts).sum(dim=1)
    loss = float(functional.nll_loss(expected.log(), client.data.labels))
    assert result.evaluate.metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert saved.save.in_parts  # the folder holds all that a prediction needs
    kept = load_file(tmp_path / "adapter" / "gates.safetensors")
    assert set(kept) == {f"shares/{name}" for name in BY_INPUT}
    torch.testing.assert_close(
        kept["shares/directions"].double(), directions(client.model, SIZE, SEED), rtol=0, atol=1e-6
    )


def test_a_gaussian_with_few_examples_is_not_told_and_the_others_have_its_examples() -> None:
    z = torch.tensor([[0.0], [1.0], [2.0], [50.0]], dtype=torch.float64)
    logits = torch.tensor([[0.0, -60, -90], [-1, -2, -90], [-60, 0, -90], [-60, -61, 30]], dtype=torch.float64)
    first, second, third = moments(z, logits, 2)
    assert (third[0], float(third[1]), float(third[2])) == (0, 0, 0)
    assert first[0] + second[0] == pytest.approx(1)
    total = first[0] * first[1] + second[0] * second[1]
    assert float(total) == pytest.approx(float(z.mean()))  # with all examples: so the difference is no secret either
    (only, nobody) = moments(z[:1], torch.zeros(1, 2, dtype=torch.float64), 2)
    assert (only[0], nobody[0]) == (1, 0)


def texts(answers: tuple[int, int]) -> Dataset:
    """Two texts of unequal length whose last tokens, from the fourth on, are answers."""
    ids = torch.tensor([[5, 6, 7, answers[0], answers[0], 3], [9, 3, 4, answers[1], 0, 0]])
    labels = torch.full_like(ids, -100)
    labels[0, 3:], labels[1, 3] = ids[0, 3:], ids[1, 3]
    mask = (torch.arange(6) < torch.tensor([[6], [4]])).long()
    return Dataset({"input_ids": ids, "attention_mask": mask}, labels, "causal-lm")


def test_features_of_a_text_do_not_know_its_answer_nor_its_padding_and_count_for_all_its_targets() -> None:
    torch.manual_seed(0)
    module = llama(family=LlamaForCausalLM).eval()
    targets = tuple(n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.endswith("q_proj"))
    model = PersonalModel(Base("llama", module, "f" * 64, targets, ()), 3, 6.0)
    along = directions(model, SIZE, SEED)
    found = features(model, texts((1, 2)), along)
    assert torch.equal(found, features(model, texts((8, 9)), along))
    alone = features(model, texts((1, 2)).batch(torch.tensor([1])), along)
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=1e-6)
    assert float((found[0] - found[1]).abs().max()) > 1e-3
    for seed, slot in enumerate("ab"):
        model.load(slot, random_adapter(model.layout, seed, scale=0.5))
    shares = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    logits = log_probabilities(model, ["a", "b"], lambda _: shares.log(), texts((1, 2)))
    for row, place in ((0, slice(0, 3)), (1, slice(3, 4))):
        own = log_probabilities(model, ["a", "b"], shares[row], texts((1, 2)))
        torch.testing.assert_close(logits[place], own[place], rtol=0, atol=1e-5)
    everywhere = log_probabilities(model, ["a", "b"], lambda _: shares.log(), texts((1, 2)), everywhere=True)
    assert everywhere.shape[:2] == (2, 6)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (step_of([], dimensions=0), "0 Gaussians in 0 dimensions, expected at most 64 in 1 to 256"),
        (step_of([], dimensions=257), "in 257 dimensions"),
        (step_of([plan_pb2.Gaussian()] * 65), "65 Gaussians"),
        (step_of([plan_pb2.Gaussian(mean=[0.0], variance=[1.0])]), "a Gaussian needs 3 finite means and as many"),
        (step_of([plan_pb2.Gaussian(mean=[0.0] * 3, variance=[1.0, 0.0, 1.0])]), "variances above 0"),
        (step_of([plan_pb2.Gaussian(mean=[float("nan")] * 3, variance=[1.0] * 3)]), "3 finite means"),
        (steps.density(["a", "a"], "s", [], dimensions=2, seed=1), "expected at least one and none twice"),
        (steps.density([], "s", [], dimensions=2, seed=1), "expected at least one and none twice"),
        (steps.density(["a"], "b", [], dimensions=2, seed=1), "slot 'b' holds no shares"),
        (steps.density(["a"], "../b", [], dimensions=2, seed=1), "slot name '../b'"),
    ],
)
def test_plans_that_cannot_be_carried_out(client: Divider, step: plan_pb2.Step, message: str) -> None:
    with pytest.raises(PlanError, match=message.replace(".", r"\.")):
        client.run(step)


def test_shares_by_input_belong_to_as_many_slots(client: Divider) -> None:
    client.run(step_of([]))
    with pytest.raises(PlanError, match="shares of 2 slots for 1 slots"):
        client.run(steps.evaluate(Training(), steps.ensemble(["a"], "shares")))


def test_examples_of_several_texts_have_no_features(client: Divider) -> None:
    class Twice(Dataset):
        def __len__(self) -> int:
            return EXAMPLES // 2

    data = Twice(client.data.inputs, client.data.labels)
    with pytest.raises(FeaturesError, match="several texts"):
        features(client.model, data, directions(client.model, SIZE, SEED))
