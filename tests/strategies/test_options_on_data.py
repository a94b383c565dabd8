"""Options for how long a client trains or how many examples a merge looks at, on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client_app.data.dataset import ClientData, Dataset
from client_app.model.personal import PersonalModel
from client_app.plan.fisher import example_gradients
from client_app.plan.gram import input_moments
from client_app.plan.interpreter import Interpreter
from client_app.plan.slots import SlotStore
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank, Storage
from fedalloy_adapters.parts import layout_of_gram
from fedalloy_adapters.wire.codec import decode
from proto.fedalloy.v1 import plan_pb2
from strategies import STRATEGIES
from strategies.framework.exchange import Client
from strategies.framework.steps import Training
from tests.fedalloy_adapters.samples import random_adapter
from tests.fedalloy_adapters.tiny_vit import CLASSES, base_of, images
from tests.strategies.conftest import client_of
from tests.strategies.fleet import Fleet

EXAMPLES = 12
RATE = 0.01
TRAINING = Training(local_steps=4, learning_rate=RATE, batch_size=4, max_grad_norm=0)


@pytest.fixture(scope="module")
def model() -> PersonalModel:
    return PersonalModel(base_of(), 2, 4.0)


@pytest.fixture(scope="module")
def data() -> Dataset:
    labels = torch.randint(CLASSES, (EXAMPLES,), generator=torch.Generator().manual_seed(3))
    return Dataset({"pixel_values": images(EXAMPLES)}, labels)


def strategy_of(name: str, **options: Any) -> Any:
    kind = STRATEGIES[name]
    return kind(kind.Options(**options), training=TRAINING, rounds=4, seed=3)


def carried_out(
    model: PersonalModel, data: Dataset, folder: Path, slot: Adapter, name: str, plan: list[plan_pb2.Step]
) -> tuple[dict[str, Adapter], dict[str, bytes]]:
    """The slots and the uploads after a plan that begins with ``slot`` under this name."""
    model.unload_all()
    store = SlotStore(folder, "tiny", lambda: model.heads)
    splits = {"train": data, "validation": data, "test": data}
    with store.transaction(1) as slots:
        slots[name] = slot
        interpreter = Interpreter("ada", model, ClientData("t", "image-classification", splits), slots)
        message = plan_pb2.Plan(version=1, run_name="r", client_id="ada", round=1, seed=1, steps=plan)
        _, uploads = interpreter.run(message, {})
        return {held: slots[held] for held in slots.names()}, uploads


def ada(model: PersonalModel) -> Client:
    return client_of("ada", model.layout, EXAMPLES)


def shares_of(found: Tensor, each: Tensor) -> list[float]:
    """How much each row of ``each`` counts in ``found``, which is a weighted sum of them."""
    weights = torch.linalg.lstsq(each.double().T, found.double()[:, None]).solution[:, 0]
    torch.testing.assert_close(weights @ each.double(), found.double(), rtol=1e-3, atol=1e-6)
    return sorted((weights * 1000).round().div(1000).abs().tolist())


@pytest.mark.parametrize(("samples", "expected"), [(0, EXAMPLES), (2, 2), (5, 5), (99, EXAMPLES)])
def test_regmean_takes_the_moments_of_so_many_examples(
    model: PersonalModel, data: Dataset, tmp_path: Path, samples: int, expected: int
) -> None:
    own = random_adapter(model.layout, 5, scale=0.3)
    plan = strategy_of("regmean", samples=samples).extra(ada(model))
    _, uploads = carried_out(model, data, tmp_path, own, "local", plan)
    (blob,) = uploads.values()
    found = decode(blob, layouts={layout_of_gram(model.layout).digest: layout_of_gram(model.layout)}).vector
    model.load("local", own)
    model.activate({"local": 1.0})
    each = torch.stack([input_moments(model, data.subset(torch.tensor([i]))).vector for i in range(EXAMPLES)])
    assert shares_of(found, each) == pytest.approx([0.0] * (EXAMPLES - expected) + [1 / expected] * expected, abs=2e-3)


def information(model: PersonalModel, data: Dataset, folder: Path, own: Adapter, **options: Any) -> Tensor:
    plan = strategy_of("fisher-merge", **options).extra(ada(model))
    slots, _ = carried_out(model, data, folder, own, "local", plan)
    return slots["information"].vector


@pytest.mark.parametrize(("samples", "expected"), [(2, 2), (5, 5), (99, EXAMPLES)])
def test_fisher_merging_takes_the_information_of_so_many_examples(
    model: PersonalModel, data: Dataset, tmp_path: Path, samples: int, expected: int
) -> None:
    own = random_adapter(model.layout, 5, scale=0.3)
    found = information(model, data, tmp_path, own, samples=samples, damping=0.0)
    model.load("local", own)
    batch = data.batch(torch.arange(EXAMPLES))
    each = example_gradients(model, "local", model.layout, batch).detach().square()
    informed = each.min(dim=0).values > 0
    wanted = [0.0] * (EXAMPLES - expected) + [1 / expected] * expected
    assert shares_of(found[informed], each[:, informed]) == pytest.approx(wanted, abs=2e-3)


def test_fisher_damping_adds_its_share_of_the_mean_and_a_large_one_merges_to_the_plain_mean(
    model: PersonalModel, data: Dataset, tmp_path: Path
) -> None:
    uploads = [random_adapter(model.layout, seed, scale=0.3) for seed in (5, 6)]
    shares = [0.25, 0.75]

    def merged(damping: float) -> tuple[Tensor, list[Tensor]]:
        found = [
            information(model, data, tmp_path / f"{damping}-{index}", own, samples=5, damping=damping)
            for index, own in enumerate(uploads)
        ]
        banks = {"local": Bank(Storage()), "information": Bank(Storage())}
        for name, own, vector in zip("ab", uploads, found, strict=True):
            banks["local"][name] = own
            banks["information"][name] = Adapter(model.layout, vector)
        return strategy_of("fisher-merge", damping=damping).merge(banks, shares).vector, found

    plain = torch.stack([own.vector for own in uploads]).T @ torch.tensor(shares)
    bare, without = merged(0.0)
    _, some = merged(0.5)
    much, _ = merged(1e6)
    for first, second in zip(without, some, strict=True):
        informed = first != 1.0  # a number without any information has the precision 1 when nothing is added
        added = (second - first)[informed]
        mean = torch.where(informed, first, torch.zeros_like(first)).double().mean()
        torch.testing.assert_close(
            added.double(), torch.full_like(added.double(), 0.5 * float(mean)), rtol=1e-3, atol=1e-9
        )
    torch.testing.assert_close(much, plain, rtol=1e-3, atol=1e-4)
    assert float((bare - plain).norm()) > 0.1 * float(plain.norm())


def test_fedavg_head_fits_the_head_alone_for_so_many_steps(model: PersonalModel, data: Dataset, tmp_path: Path) -> None:
    start = random_adapter(model.layout, 5, scale=0.3)
    client = ada(model)
    heads = list(model.layout.head_modules)

    def moved(steps: int) -> Adapter:
        brief = strategy_of("fedavg-head", steps=steps)
        brief.enrol(client)
        plan = [step for step in brief.deliver(client).steps if step.HasField("train")]
        slots, _ = carried_out(model, data, tmp_path / str(steps), start, "global", plan)
        return Adapter(model.layout, slots["global"].vector - start.vector)

    found = {steps: moved(steps) for steps in (0, 1, 4, 9)}
    for update in found.values():
        assert not update.select(modules=list(model.layout.lora_modules)).vector.any()
    largest = {steps: float(update.select(modules=heads).vector.abs().max()) for steps, update in found.items()}
    assert largest[1] == pytest.approx(RATE, rel=1e-3)  # AdamW's first step moves a number by the learning rate
    assert RATE * 1.5 < largest[4] <= 4 * RATE * 1.01 < largest[9]
    assert torch.equal(found[0].vector, found[4].vector)  # 0: as many as in a round


@pytest.mark.parametrize(("federated", "changes"), [(0, [1, 2, 3]), (1, [1]), (5, [1, 2, 3, 4, 5])])
def test_fedavg_tuned_averages_in_so_many_rounds_and_then_leaves_clients_alone(
    federated: int, changes: list[int]
) -> None:
    fleet = Fleet("fedavg-tuned", federated_rounds=federated)
    fleet.strategy.rounds = 6
    found, models = [], [fleet.strategy.state().tensors["model"].clone()]
    for round_ in range(1, 7):
        fleet.play()
        models.append(fleet.strategy.state().tensors["model"].clone())
        if not torch.equal(models[-1], models[-2]):
            found.append(round_)
    assert found == changes
    assert len({node.slots["global"].digest for node in fleet.nodes}) == 3
