"""DyPFL: which clients go on with their own adapters, and which of three models is delivered."""

from __future__ import annotations

import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import truncate
from tests.strategies.conftest import target
from tests.strategies.fleet import LAYOUT, NAMES, Fleet


def loss(name: str, adapter: Adapter) -> float:
    if adapter.layout.digest != LAYOUT.digest:  # a stack, in the same factor space in which the client compares
        adapter = truncate(adapter, LAYOUT)
    return float((adapter.vector - target(name, adapter.layout).vector).square().mean())


def test_who_would_be_worse_off_starts_again_from_the_global_adapter() -> None:
    fleet = Fleet("dypfl")
    assert fleet.play()["personalisation_rate"] == 1.0  # of equals, its own
    fleet["ben"].slots["local"] = Adapter(fleet["ben"].layout, fleet["ben"].slots["local"].vector + 100)
    sent = fleet.brief("ben").adapters["global"]
    kept = {who: fleet[who].slots["local"].clone() for who in NAMES}
    for node in fleet.nodes:
        node.move = lambda name, round_, received: received
    rate = fleet.play()["personalisation_rate"]
    assert torch.equal(fleet["ben"].slots["local"].vector, sent.vector)
    own = [who for who in NAMES if torch.equal(fleet[who].slots["local"].vector, kept[who].vector)]
    assert "ben" not in own
    assert rate == round(len(own) / 3, 6)


def test_the_best_of_three_is_delivered() -> None:
    fleet = Fleet("dypfl", pull=0.5)
    pulled = [
        s.train.proximal for s in fleet.brief("ada").steps if s.HasField("train") and s.train.HasField("proximal")
    ]
    assert [(pull.slot, pull.mu) for pull in pulled] == [("global", 0.5)]
    for _ in range(3):
        fleet.play()
    for who, saved in fleet.deliver().items():
        slots = fleet[who].slots
        assert loss(who, saved) == min(loss(who, slots[slot]) for slot in ("global", "local", "merged"))


def test_clients_without_validation_examples_choose_on_training_examples() -> None:
    fleet = Fleet("dypfl")
    (choice,) = [step.select for step in fleet.brief("ada").steps if step.HasField("select")]
    assert choice.split == "validation"
    fleet.strategy.clients["ada"].registration.tasks[0].examples["validation"] = 0
    (choice,) = [step.select for step in fleet.brief("ada").steps if step.HasField("select")]
    assert choice.split == "train"
    assert fleet.strategy.learns_from == ("train", "validation")
