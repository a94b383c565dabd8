"""Clients whose labels are their own: a head belongs to the slot that was trained with it, whatever the strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.supercore.task_identity import TaskIdentity
from peft import PeftModel
from torch import Tensor

from client_app.model.personal import PersonalModel
from client_app.plan import interpreter
from client_app.plan.mixtures import activate
from client_app.plan.workbench import Workbench
from fedalloy_adapters.layout import Factor
from strategies import STRATEGIES
from strategies.framework.steps import Training
from tests.fedalloy_adapters.tiny_vit import base_of, images
from tests.strategies.conftest import FakeGrid
from tests.strategies.test_every_strategy import RealNode

TRAINING = Training(local_steps=3, batch_size=32, learning_rate=0.01, evaluate_split="validation")
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"own": "*.layers.1.*"} for name in ("co-pfl", "fedapm", "fedppa", "fedrep", "straggler-resilient")
} | {"fedalt": {"mixer": "scalar"}}
"""Options of strategies whose defaults need a common head, or save a model in parts."""


@pytest.fixture(scope="module")
def model() -> PersonalModel:
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # what Flower's process start sets
    return PersonalModel(replace(base_of(heads=()), own_heads=("classifier",)), 2, 4.0)


def predictions(bench: Workbench, slot: str) -> Tensor:
    """What a slot predicts alone."""
    bench.model.load(slot, bench.slots.whole(slot))
    bench.model.activate({slot: 1.0})
    bench.model.module.eval()
    with torch.no_grad():
        return bench.model.logits({"pixel_values": images(3, seed=9)})


def adapters(bench: Workbench) -> list[str]:
    """Slots that hold an adapter."""
    found = ((slot, bench.slots[slot].layout.entries) for slot in bench.slots.names())
    return [slot for slot, entries in found if all(entry.factor.is_update for entry in entries)]


def watched(kind: str, seen: list[str]) -> Callable[[Workbench, Any], Any]:
    """A kind of step that trains, with a look at every slot before and after."""
    carry_out = interpreter.STEPS[kind]

    def step(bench: Workbench, asked: Any) -> Any:
        trained = set((asked.train if kind == "distill" else asked).slots)
        before = {slot: predictions(bench, slot) for slot in adapters(bench)}
        result = carry_out(bench, asked)
        for slot, logits in before.items():
            assert torch.equal(predictions(bench, slot), logits) == (slot not in trained), slot
        seen.extend(trained & set(before))
        return result

    return step


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_training_a_slot_changes_what_no_other_predicts(
    name: str, model: PersonalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for kind in ("train", "distill"):
        monkeypatch.setitem(interpreter.STEPS, kind, watched(kind, seen))
    model.unload_all()
    nodes = [RealNode(index, model, tmp_path) for index in range(2)]
    kind = STRATEGIES[name]
    strategy = kind(kind.Options(**OPTIONS.get(name, {})), training=TRAINING, seed=3)
    strategy.start(FakeGrid(nodes), initial_arrays=ArrayRecord(), num_rounds=2)
    assert len(seen) >= 4
    for node in nodes:
        mixture = node.plans[-1].steps[-1].evaluate.mixture
        with node.store.transaction(99) as slots:
            bench = Workbench(node.plans[-1], model, node.data, slots)
            heads = {slot: slots.whole(slot)["classifier", Factor.WEIGHT] for slot in adapters(bench)}
            assert any(bool(heads[term.slot].any()) for term in mixture.terms)  # a head that was trained
            if mixture.shares:
                continue
            activate(bench, mixture)
            with torch.no_grad():
                expected = model.logits({"pixel_values": images(3, seed=9)})
        saved = PeftModel.from_pretrained(base_of().model, str(node.folder / "adapter")).eval()
        with torch.no_grad():
            found = saved(pixel_values=images(3, seed=9)).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
