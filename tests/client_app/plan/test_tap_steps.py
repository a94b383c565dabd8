"""The steps ``replace`` and ``distill`` and the training between them, on clients with several tasks.

T1 to T25 are the invariants of the method's specification; the others are elsewhere (groups, messages, runs).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from client_app.data.dataset import Dataset
from client_app.kinds import mean_loss
from client_app.plan import seeds, training
from client_app.plan.interpreter import PlanError
from client_app.scenarios import digits_multimodal as scenario
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import group_of, groups_of
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Draw, Training
from tests.client_app.plan.tap_toys import LOCAL, SAME, W, X, stage_one, start, train
from tests.toys.multi_task_toys import SPECS, TINY, ToyClient, base_of


@pytest.fixture
def client(tmp_path: Path) -> ToyClient:
    return ToyClient(tmp_path / "ada")


def test_a_seed_may_be_one_for_all_clients() -> None:
    step = plan_pb2.TrainStep(draw=Draw(seed=0), draw_after_replace=Draw(seed=8))
    for name in ("ada", "ben"):
        plan = plan_pb2.Plan(client_id=name, round=5, seed=3)
        assert seeds.seed_of_step(plan, 1, step) == 0
        assert seeds.seed_of_step(plan, 1, step, replaced=True) == 8
    step = plan_pb2.TrainStep(draw=SAME)
    plans = [plan_pb2.Plan(client_id=name, round=round_, seed=3) for name in ("ada", "ben") for round_ in (1, 2)]
    assert len({seeds.seed_of_step(plan, 1, step) for plan in plans}) == 4


def test_a_probe_records_the_loss_of_each_task(client: ToyClient) -> None:
    client.run(1, [steps.evaluate(LOCAL, steps.mixture(W), "probe", "validation", record=W)], start(client))
    metrics = client.report.results[0].evaluate.metrics
    assert client.losses == {W: {task: metrics[f"{task}/loss"] for task in client.tasks}}
    assert len(set(client.losses[W].values())) == 2


def test_losses_are_recorded_by_task(tmp_path: Path) -> None:  # T16
    first, second = training.TaskLosses(4), training.TaskLosses(4)
    for losses in (first, second):
        losses.add({"a": (3, 2.0), "b": (1, 8.0)})
        losses.add({"a": (2, 1.0)})
    found = first.to_proto()
    assert found["a"].mean == (3 * 2.0 + 2 * 1.0) / 5
    assert found["a"].batch_share == (3 / 4 * 2.0 + 2 / 4 * 1.0) / 2
    assert (found["b"].mean, found["b"].batch_share) == (8.0, 1 / 4 * 8.0 / 2)
    shared = {}
    for share in (False, True):
        client = ToyClient(tmp_path / str(share))
        step = train(W)
        step.train.record_batch_share = share
        client.run(1, [step], start(client))
        shared[share] = client.losses[W]
        reported = client.report.results[0].train.task_losses
        for task, loss in client.losses[W].items():
            assert loss == (reported[task].batch_share if share else reported[task].mean)
    assert all(shared[True][task] < shared[False][task] for task in shared[True])


def test_the_report_counts_the_examples_that_were_in_batches(tmp_path: Path) -> None:
    client = ToyClient(tmp_path / "a", tasks=("digit",), counts=(5,))
    size = len(client.data.splits["train"])
    client.run(1, [train(W, Training(local_steps=3, batch_size=size - 1, learning_rate=0.05))], start(client))
    assert client.report.results[0].train.examples == (size - 1) + 1 + (size - 1)  # a pass ends with a small batch


def test_an_absent_task_keeps_its_record(tmp_path: Path) -> None:  # T16
    client = ToyClient(tmp_path / "a", counts=(9, 7))
    client.run(1, [train(W)], start(client))
    before = dict(client.losses[W])
    few = Training(local_steps=1, batch_size=1, learning_rate=0.05)
    client.run(2, [train(W, few)])
    (seen,) = client.report.results[0].train.task_losses
    (absent,) = set(client.tasks) - {seen}
    assert client.losses[W][absent] == before[absent]
    assert client.losses[W][seen] != before[seen]


def test_the_loss_of_a_mixed_batch_weighs_tasks_by_their_examples(client: ToyClient) -> None:
    train_split = client.data.splits["train"]
    adapter = client.model.initial(5)
    client.model.load(W, adapter)
    client.model.activate({W: 1.0})
    parts = train_split.by_task(torch.arange(len(train_split)))
    assert [part.task for part in parts] == ["digit", "number"]
    with torch.no_grad():
        expected = sum(
            len(p) / len(train_split) * float(mean_loss(p.kind, training.logits_of(client.model, p), p.labels))
            for p in parts
        )
    client.model.unload_all()
    all_at_once = Training(local_steps=1, batch_size=len(train_split), learning_rate=0.05)
    client.run(1, [train(W, all_at_once)], start(client))
    assert client.report.results[0].train.first_loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tasks", [("digit",), ("digit", "number"), ("compare", "caption", "answer")])
def test_as_many_steps_as_asked_whatever_the_tasks(tmp_path: Path, tasks: tuple[str, ...]) -> None:  # T10
    client = ToyClient(tmp_path / "a", tasks=tasks, counts=(5,) * len(tasks))
    client.run(1, stage_one(client, 0.01), start(client))
    assert [r.train.steps for r in client.report.results if r.HasField("train")] == [3, 3]


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("task", list(scenario.TASKS))
def test_every_group_of_a_task_gets_a_gradient_and_no_other(tmp_path: Path, task: str) -> None:  # T11
    client = ToyClient(tmp_path / "a", tasks=("digit", "number", "compare", "caption", "answer"), counts=(4,) * 5)
    model = client.model
    start_from = model.initial(5)
    start_from = Adapter(start_from.layout, start_from.vector + 0.01)  # A has a gradient where B is not zero
    model.load(W, start_from)
    model.activate({W: 1.0})
    parameters = model.trainable(W, model.layout)
    batch = client.data.tasks[task].splits["train"]
    batch = Dataset(batch.inputs, batch.labels, batch.kind, task)
    logits = training.logits_of(model, batch)
    mean_loss(batch.kind, logits, batch.labels).backward()  # type: ignore[no-untyped-call]
    with_gradient = {
        group_of(name) for name, p in parameters.items() if p.grad is not None and float(p.grad.abs().sum()) > 0
    }
    assert with_gradient == set(SPECS[task].groups)
    reached = [p.grad is not None and float(p.grad.abs().sum()) > 0 for p in parameters.values()]
    assert reached == [group_of(name) in SPECS[task].groups for name in parameters]
    assert not torch.equal(logits[0], logits[1])  # what is said depends on what is seen


def test_texts_are_written_from_what_is_seen_and_never_from_what_follows(tmp_path: Path) -> None:
    client = ToyClient(tmp_path / "a", tasks=("caption",), counts=(4,))
    batch = client.data.tasks["caption"].splits["train"]
    client.model.load(W, Adapter(client.model.layout, client.model.initial(5).vector + 0.01))
    client.model.activate({W: 1.0})
    client.model.module.eval()

    def logits(**changes: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return client.model.logits({**batch.inputs, **changes}, "caption")

    plain = logits()
    later = batch.inputs["input_ids"].clone()
    later[:, 3] = 5
    assert torch.equal(logits(input_ids=later)[:, :3], plain[:, :3])
    assert not torch.equal(logits(input_ids=later)[:, 3], plain[:, 3])
    other = logits(pixel_values=batch.inputs["pixel_values"].flip(0))
    assert not torch.isclose(other, plain).all(dim=-1).any()
    ids = batch.inputs["input_ids"][1:2, :3]  # no padding
    written = client.model.module.generate(  # type: ignore[operator]
        task="caption",
        input_ids=torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
        pixel_values=batch.inputs["pixel_values"][1:2],
        max_new_tokens=1,
    )
    assert int(written[0, -1]) == int(plain[1, 2].argmax())  # padding on the left changes nothing


def test_the_frozen_model_stays_and_only_groups_are_trained(client: ToyClient) -> None:  # T12
    frozen = {name: value.clone() for name, value in client.model.module.state_dict().items()}
    client.run(1, stage_one(client, -math.inf), start(client))
    after = client.model.module.state_dict()
    for name, value in frozen.items():
        kept = after.get(
            name, after.get(name.removesuffix("weight") + "base_layer.weight")
        )  # PEFT's, once it was there
        assert kept is not None
        assert torch.equal(kept, value), name
    client.model.load(W, client.model.initial(5))
    client.model.activate({W: 1.0})
    client.model.trainable(W, client.model.layout)
    trained = sum(p.numel() for p in client.model.module.parameters() if p.requires_grad)
    assert trained == client.model.layout.size
    assert set(groups_of(client.model.layout)) == {g for task in client.tasks for g in SPECS[task].groups}


def test_every_tensor_that_is_sent_arrives_in_the_model(client: ToyClient) -> None:  # T9
    moved = Adapter(client.model.layout, client.model.initial(5).vector + 1)
    found = client.run(1, [steps.evaluate(LOCAL, steps.mixture(W)), steps.send(LOCAL, W)], {W: moved})
    assert torch.equal(found[W].vector, moved.vector)
    assert torch.equal(client.sent[W].vector, moved.vector)
    client.model.load(W, moved)
    assert torch.equal(client.model.read(W).vector, moved.vector)


# --------------------------------------------------------------------------------------------------------------- slots


def test_training_on_after_sending_does_not_change_what_was_sent(client: ToyClient) -> None:  # T19
    plan = stage_one(client, -math.inf)
    found = client.run(1, [*plan, train(W)], start(client))
    once = ToyClient(client.folder.parent / "once")
    once.run(1, plan, start(once))
    assert torch.equal(client.sent[W].vector, once.sent[W].vector)
    assert not torch.equal(found[W].vector, client.sent[W].vector)
    assert not torch.equal(found[X].vector, client.sent[W].vector)


def test_a_restart_after_every_round_changes_nothing(tmp_path: Path) -> None:  # T18
    through = ToyClient(tmp_path / "through")
    for round_ in (1, 2, 3):
        expected = through.run(round_, stage_one(through, 0.01), start(through))
        restarted = ToyClient(tmp_path / "restarted")  # a new model; slots and losses lie on the disk
        found = restarted.run(round_, stage_one(restarted, 0.01), start(restarted))
        assert torch.equal(found[X].vector, expected[X].vector)
        assert restarted.losses == through.losses


def test_a_round_carried_out_again_starts_from_the_losses_before_it(client: ToyClient) -> None:
    client.run(1, stage_one(client, 0.01), start(client))
    first = client.run(2, stage_one(client, 0.01), start(client))
    losses = client.losses
    again = client.run(2, stage_one(client, 0.01), start(client))
    assert torch.equal(first[X].vector, again[X].vector)
    assert client.losses == losses


def test_a_diverging_personal_adapter_stays_as_it_was_and_is_replaced_next_time(client: ToyClient) -> None:
    plan = stage_one(client, math.inf)
    before = client.run(1, plan, start(client))
    client.run(2, [steps.initialise(X, 5)])
    assert X in client.losses
    wild = train(X, Training(local_steps=9, batch_size=4, learning_rate=1e30, max_grad_norm=0.0))
    wild.train.keep_on_divergence = True
    after = client.run(3, [wild])
    assert client.report.results[0].train.diverged
    assert torch.equal(after[X].vector, before[X].vector)
    assert X not in client.losses
    client.run(4, stage_one(client, 0.01), start(client))
    assert [task.replaced for task in client.report.results[4].replace.tasks] == [True, True]
    wild.train.keep_on_divergence = False
    with pytest.raises(PlanError, match="training loss became"):
        client.run(5, [wild])


def test_one_client_with_one_task_is_centralised_training(tmp_path: Path) -> None:  # T24
    client = ToyClient(tmp_path / "a", tasks=("digit",), counts=(8,))
    adapter = start(client)[W]
    for round_ in (1, 2):
        adapter = client.run(round_, stage_one(client, math.inf), {W: adapter})[W]
    model = client.model
    model.load(W, start(client)[W])
    model.activate({W: 1.0})
    parameters = list(model.trainable(W, model.layout).values())
    data = client.data.tasks["digit"].splits["train"]
    for round_ in (1, 2):
        optimiser = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
        for chosen in seeds.batches(8, 4, 3, seeds.seed_of(3, "ada", round_, 1)):
            optimiser.zero_grad()
            batch = data.batch(chosen)
            loss = torch.nn.functional.cross_entropy(model.logits(batch.inputs, "digit"), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
    torch.testing.assert_close(model.read(W).vector, adapter.vector, rtol=0, atol=1e-6)


def test_the_saved_model_is_a_peft_adapter_over_the_same_model(client: ToyClient) -> None:
    from peft import PeftModel

    mix = steps.mixture(W)
    client.run(1, [train(W), steps.save(mix), steps.evaluate(LOCAL, mix)], start(client))
    reported = client.report.results[2].evaluate.metrics
    base = base_of([SPECS[task] for task in client.tasks])
    model = PeftModel.from_pretrained(base.model, str(client.folder / "adapter")).eval()  # type: ignore[arg-type]
    for task, data in client.data.tasks.items():
        split = data.splits["test"]
        with torch.no_grad():
            loss = mean_loss(split.kind, model(task=task, **split.inputs).logits, split.labels)
        assert float(loss) == pytest.approx(reported[f"{task}/loss"], abs=1e-5)


def test_toys_are_the_scenarios_tasks() -> None:
    assert set(SPECS) == set(scenario.TASKS)
    assert TINY.steps == 0
