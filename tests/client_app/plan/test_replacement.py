"""The step ``replace``: a task's groups are copied where the margin rule fires."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from client_app.plan import training
from client_app.plan.interpreter import PlanError
from client_app.plan.replacement import fired_tasks, fires
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import group_of
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Draw, Training
from tests.client_app.plan.tap_toys import OTHER, W, X, replace, stage_one, start, train
from tests.toys.multi_task_toys import SPECS, ToyClient


def changed_groups(before: Adapter, after: Adapter) -> set[str]:
    pairs = zip(before.items(), after.items(), strict=True)
    return {group_of(entry.module) for (entry, old), (_, new) in pairs if not torch.equal(old, new)}


@pytest.fixture
def client(tmp_path: Path) -> ToyClient:
    return ToyClient(tmp_path / "ada")


# ------------------------------------------------------------------------------------------------------ the margin rule


def test_the_rule_is_strict_and_takes_what_is_not_finite_for_infinite() -> None:  # T4
    assert not fires(1.0, 1.25, 0.25)
    assert fires(1.0, math.nextafter(1.25, 2), 0.25)
    assert fires(1.0, math.inf, 0.01)
    assert fires(1.0, math.nan, 0.01)  # a personal adapter that diverged is rescued
    assert not fires(math.nan, 5.0, -math.inf)
    assert not fires(math.inf, math.inf, -math.inf)
    assert not fires(0.0, math.inf, math.inf)
    assert fires(100.0, 1.0, -math.inf)
    assert fires(2.0, 2.3, 0.1, relative=True)
    assert not fires(2.0, 2.2, 0.1, relative=True)
    assert fires(0.0, 1.0, -math.inf, relative=True)
    assert not fires(0.0, 1.0, math.inf, relative=True)
    rules = [plan_pb2.ReplaceRule(task=str(share), margin=0.1, relative=share) for share in (False, True)]
    losses = [dict.fromkeys(("False", "True"), loss) for loss in (2.0, 2.15)]
    assert fired_tasks(rules, *losses) == ["False"]


def test_without_replacement_the_personal_adapter_is_local_training_to_the_bit(tmp_path: Path) -> None:  # T1
    client, alone = ToyClient(tmp_path / "a", dropout=0.2), ToyClient(tmp_path / "b", dropout=0.2)
    for round_ in (1, 2, 3):
        found = client.run(round_, stage_one(client, math.inf), start(client))
        local = alone.run(round_, [steps.initialise("local", 5), train("local")])
        assert torch.equal(found[X].vector, local["local"].vector)
        assert not any(task.replaced for task in client.report.results[4].replace.tasks)


def test_always_replacing_gives_what_was_sent_and_then_one_more_run_on_other_batches(tmp_path: Path) -> None:  # T2
    whole, stopped, by_hand = (ToyClient(tmp_path / name) for name in ("whole", "stopped", "by-hand"))
    plan = stage_one(whole, -math.inf)
    before_training = stopped.run(1, plan[:-1], start(stopped))
    assert torch.equal(before_training[X].vector, stopped.sent[W].vector)
    found = whole.run(1, plan, start(whole))
    expected = by_hand.run(1, [*plan[:-1], steps.Step(train=_as(train(X), OTHER))], start(by_hand))
    assert torch.equal(found[X].vector, expected[X].vector)
    assert torch.equal(found[W].vector, stopped.sent[W].vector)


def _as(step: steps.Step, draw: Draw) -> plan_pb2.TrainStep:
    copied = plan_pb2.TrainStep()
    copied.CopyFrom(step.train)
    copied.draw.CopyFrom(draw)
    copied.ClearField("draw_after_replace")
    return copied


def test_the_first_time_every_task_is_replaced_and_an_absent_one_is_not(tmp_path: Path) -> None:  # T3, T16
    client = ToyClient(tmp_path / "a")
    client.run(1, stage_one(client, 0.01), start(client))
    assert [task.replaced for task in client.report.results[4].replace.tasks] == [True, True]
    assert not client.report.results[4].replace.tasks[0].HasField("target_loss")
    one = ToyClient(tmp_path / "b", counts=(9, 1))
    few = Training(local_steps=1, batch_size=1, learning_rate=0.05)
    one.run(1, [steps.initialise(X, 5), train(W, few), replace(0.01, ("digit", "number"))], start(one))
    seen = one.losses[W]
    assert len(seen) == 1
    assert [task.replaced for task in one.report.results[2].replace.tasks] == [t in seen for t in one.tasks]


# ---------------------------------------------------------------------------------------------------- what is replaced


@pytest.mark.parametrize("tasks", [("digit", "number"), ("compare", "caption"), ("digit", "answer")])
def test_only_the_groups_of_tasks_that_fire_are_replaced(tmp_path: Path, tasks: tuple[str, str]) -> None:  # T5, T6
    for fired in tasks:
        client = ToyClient(tmp_path / fired, tasks=tasks)
        plan = [steps.initialise(X, 5), train(W), replace(-math.inf, (fired,))]
        found = client.run(1, plan, start(client))
        groups = SPECS[fired].groups
        assert changed_groups(client.model.initial(5), found[X]) == set(groups)
        for entry, tensor in found[X].items():
            if group_of(entry.module) in groups:
                assert torch.equal(tensor, found[W][entry.module, entry.factor])
        sizes = [entry.size for entry in found[W].layout.entries if group_of(entry.module) in groups]
        assert client.report.results[2].replace.numbers == sum(sizes)
        expert = SPECS[fired].expert
        assert {f"task/{expert}", *(f"pair/{m}/{expert}" for m in SPECS[fired].modalities)} <= set(groups)


def test_an_image_task_leaves_the_text_tower_alone(client: ToyClient) -> None:  # T5; wrong in the authors' code
    found = client.run(1, [steps.initialise(X, 5), train(W), replace(-math.inf, ("digit",))], start(client))
    changed = changed_groups(client.model.initial(5), found[X])
    assert {"mod/text", "head/number", "pair/text/classify"}.isdisjoint(changed)
    assert {"mod/image", "task/classify", "shared", "head/digit"} <= changed


def test_exclusive_leaves_what_another_task_uses(client: ToyClient) -> None:
    plan = [steps.initialise(X, 5), train(W), replace(-math.inf, ("digit",), exclusive=True)]
    found = client.run(1, plan, start(client))
    changed = changed_groups(client.model.initial(5), found[X])
    assert changed == {"mod/image", "pair/image/classify", "head/digit"}


def test_the_order_of_tasks_does_not_matter(tmp_path: Path) -> None:  # T20
    results = []
    for order in itertools.permutations(("digit", "number")):
        client = ToyClient(tmp_path / "-".join(order))
        plan = [steps.initialise(X, 5), train(W), replace(-math.inf, order), train(X)]
        results.append(client.run(1, plan, start(client))[X].vector)
    assert torch.equal(results[0], results[1])


def test_a_rule_for_a_task_that_the_client_has_not_is_an_error(client: ToyClient) -> None:
    with pytest.raises(PlanError, match="a rule for task 'caption'; this client has digit, number"):
        client.run(1, [steps.initialise(X, 5), train(W), replace(0.0, ("caption",))], start(client))


# ------------------------------------------------------------------------------------------------------------ the data


def test_the_same_batches_without_a_replacement_and_others_after_one(
    client: ToyClient, monkeypatch: pytest.MonkeyPatch
) -> None:  # T17, from the first round on
    drawn: list[tuple[list[int], ...]] = []
    original = training.batches

    def listen(examples: int, batch_size: int, count: int, seed: int) -> Iterator[torch.Tensor]:
        found = list(original(examples, batch_size, count, seed))
        drawn.append(tuple(batch.tolist() for batch in found))
        return iter(found)

    monkeypatch.setattr(training, "batches", listen)
    client.run(1, stage_one(client, math.inf), start(client))
    assert drawn[0] == drawn[1]
    drawn.clear()
    client.run(1, stage_one(client, -math.inf), start(client))
    assert drawn[0] != drawn[1]
