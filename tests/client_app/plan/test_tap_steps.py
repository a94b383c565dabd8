"""The steps ``replace`` and ``distill`` and the training between them, on clients with several tasks.

T1 to T25 are the invariants of the method's specification; the others are elsewhere (groups, messages, runs).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from client_app.data.dataset import Dataset
from client_app.data.task_kinds import at_targets, mean_loss
from client_app.model.personal import PersonalModel
from client_app.plan import seeds, training
from client_app.plan.distillation import MixtureTeacher, divergence
from client_app.plan.interpreter import PlanError
from client_app.plan.replacement import fired_tasks, fires
from client_app.scenarios import digits_multimodal as scenario
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import group_of, groups_of
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.algorithms.tap import Tap, TapOptions
from strategies.framework import steps
from strategies.framework.exchange import Client
from strategies.framework.steps import Draw, Training
from tests.toys.multi_task_toys import SPECS, TINY, ToyClient, base_of

W, X = "global", "personal"
LOCAL = Training(local_steps=3, batch_size=4, learning_rate=0.05)
SAME, OTHER = Draw(as_step=1), Draw(as_step=99)


def train(slot: str, training: Training = LOCAL) -> steps.Step:
    other = OTHER if slot == X else None
    return steps.train(training, steps.mixture(slot), [slot], draw=SAME, draw_after_replace=other, record=slot)


def replace(margin: float, tasks: tuple[str, ...], **options: bool) -> steps.Step:
    return steps.replace(X, W, dict.fromkeys(tasks, margin), records=(X, W), **options)


def stage_one(client: ToyClient, margin: float) -> list[steps.Step]:
    return [
        steps.initialise(X, 5),
        steps.evaluate(LOCAL, steps.mixture(X)),
        train(W),
        steps.send(LOCAL, W),
        replace(margin, tuple(client.tasks)),
        train(X),
    ]


def start(client: ToyClient) -> dict[str, Adapter]:
    return {W: client.model.initial(5)}


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


# -------------------------------------------------------------------------------------------------------- distillation


def distil(weight: float, teacher: str = W, **options: object) -> list[steps.Step]:
    student = steps.train(LOCAL, steps.mixture(X), [X], draw=SAME)
    tasks = {"digit": weight, "number": weight}
    return [steps.initialise(X, 5), steps.distill(student, steps.mixture(teacher), tasks, **options)]  # type: ignore[arg-type]


def test_a_divergence_of_equals_is_zero_and_temperature_is_squared() -> None:  # T13
    teacher, student = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.zeros(5, 7)
    for kind in (plan_pb2.DISTILL_LOSS_KL, plan_pb2.DISTILL_LOSS_MSE):
        assert float(divergence(teacher, teacher, kind, 2.0).abs().max()) < 1e-6
        assert float(divergence(teacher, student, kind).min()) > -1e-6
    plain = divergence(teacher / 3, student / 3, plan_pb2.DISTILL_LOSS_KL)
    torch.testing.assert_close(divergence(teacher, student, plan_pb2.DISTILL_LOSS_KL, 3.0), 9 * plain)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(divergence(teacher, student, plan_pb2.DISTILL_LOSS_KL).mean(), expected)


def test_without_weight_distillation_is_plain_training_to_the_bit(tmp_path: Path) -> None:  # T14
    one, other = ToyClient(tmp_path / "a", dropout=0.3), ToyClient(tmp_path / "b", dropout=0.3)
    teacher = {W: Adapter(one.model.layout, one.model.initial(5).vector + 0.1)}
    distilled = one.run(1, distil(0.0), teacher)
    plain = other.run(1, [steps.initialise(X, 5), steps.train(LOCAL, steps.mixture(X), [X], draw=SAME)])
    assert torch.equal(distilled[X].vector, plain[X].vector)


def test_a_teacher_draws_no_random_numbers_and_stays_as_it_is(tmp_path: Path) -> None:  # T14, T15
    client = ToyClient(tmp_path / "a", dropout=0.3)
    teacher = Adapter(client.model.layout, client.model.initial(5).vector + 0.1)
    found = client.run(1, distil(1e-30), {W: teacher})
    assert torch.equal(found[W].vector, teacher.vector)
    plain = ToyClient(tmp_path / "b", dropout=0.3)
    same = plain.run(1, [steps.initialise(X, 5), steps.train(LOCAL, steps.mixture(X), [X], draw=SAME)])
    torch.testing.assert_close(found[X].vector, same[X].vector, rtol=0, atol=1e-5)  # the same batches and dropout
    assert set(client.report.results[1].distill.divergences) == {"digit", "number"}


@pytest.mark.parametrize("tasks", [("digit", "number"), ("caption", "answer")])
@pytest.mark.parametrize("reduction", ["per-position-mean", "first-dim"])
def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path, tasks: tuple[str, str], reduction: str) -> None:
    divergences = {}
    for weight in (1e-9, 1e4):
        client = ToyClient(tmp_path / str(weight), tasks=tasks)
        teacher = {W: Adapter(client.model.layout, client.model.initial(5).vector + 0.1)}
        student = steps.train(Training(local_steps=8, batch_size=16, learning_rate=0.02), steps.mixture(X), [X])
        step = steps.distill(student, steps.mixture(W), dict.fromkeys(tasks, weight), reduction=reduction)
        client.run(1, [steps.initialise(X, 5), step], teacher)
        divergences[weight] = dict(client.report.results[1].distill.divergences)
    for task in tasks:
        assert 0 < divergences[1e4][task] < divergences[1e-9][task]


def test_the_distance_is_over_what_is_to_be_written() -> None:
    """Lengths 3 and 2 of 4: three targets in all; position t predicts the label at t + 1, and a prompt comes first."""
    labels = torch.tensor([[-100, 4, 4, 4], [-100, 4, -100, -100]])
    batch = Dataset({}, labels, "causal-lm", "answer")
    generator = torch.Generator().manual_seed(2)
    teacher, student = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))  # one position for an image
    each = divergence(teacher, student, plan_pb2.DISTILL_LOSS_KL)[:, 1:]
    expected = {"per-position-mean": (each[0, :3].sum() + each[1, 0]) / 4, "first-dim": each.sum() / 2}
    for reduction, found in expected.items():
        step = distil(3.0, reduction=reduction)[1].distill
        step.tasks.add(task="answer", weight=3.0, loss=plan_pb2.DISTILL_LOSS_KL)
        teaches = MixtureTeacher(PersonalModel(base_of([SPECS["answer"]]), 2, 4.0), {W: 1.0}, step, "")
        pair = (student, teacher) if teaches.everywhere else (at_targets(student, labels), at_targets(teacher, labels))
        torch.testing.assert_close(teaches.loss(batch, *pair), 3.0 * found)
        assert teaches.divergences() == {"answer": pytest.approx(float(found))}


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_tasks_distance_counts_in_full_however_few_its_examples(client: ToyClient, micro_batch: int) -> None:
    class Slope:
        """Distance with a slope of one for every trained number."""

        everywhere = False

        def outputs(self, batch: Dataset) -> torch.Tensor:
            return torch.zeros(())

        def loss(self, batch: Dataset, logits: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
            return torch.stack([parameter.sum() for parameter in parameters.values()]).sum()

    model, data = client.model, client.data.splits["train"]
    model.load(W, client.model.initial(5))
    model.activate({W: 1.0})
    model.micro_batch = micro_batch
    parameters = model.trainable(W, model.layout)
    everything = Training(local_steps=1, batch_size=len(data), max_grad_norm=0.0, learning_rate=1e-20)
    slopes = []
    for teacher in (None, Slope()):
        training.train(model, train(W, everything).train, parameters, data, 1, teacher=teacher)
        slopes.append([parameter.grad.clone() for parameter in parameters.values() if parameter.grad is not None])
    for plain, taught in zip(*slopes, strict=True):
        torch.testing.assert_close(taught - plain, torch.full_like(plain, 2.0))  # one for each of two tasks


def test_no_gradient_reaches_a_teacher(client: ToyClient, monkeypatch: pytest.MonkeyPatch) -> None:  # T15
    original, seen = MixtureTeacher.loss, []

    def listen(self: MixtureTeacher, batch: Dataset, logits: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        seen.append((outputs.requires_grad, logits.requires_grad))
        return original(self, batch, logits, outputs)

    monkeypatch.setattr(MixtureTeacher, "loss", listen)
    client.run(1, distil(1.0), {W: Adapter(client.model.layout, client.model.initial(5).vector + 0.1)})
    assert set(seen) == {(False, True)}


def strategy_for(client: ToyClient, **training_: object) -> tuple[Tap, Client]:
    tasks = [
        report_pb2.Task(name=name, kind=task.kind, examples={"train": len(task.splits["train"])}, groups=task.groups)
        for name, task in client.data.each_task.items()
    ]
    tap = Tap(TapOptions(distill_steps=3), Training(local_steps=1, **training_), seed=5)  # type: ignore[arg-type]
    enrolled = Client("ada", 7, client.model.layout, 9, "toy", report_pb2.Registration(tasks=tasks))
    tap.enrol(enrolled)
    return tap, enrolled


@pytest.mark.parametrize("rate", [0.05, 1e38])
def test_a_client_that_was_never_asked_gets_a_model_even_where_stage_two_diverges(tmp_path: Path, rate: float) -> None:
    client = ToyClient(tmp_path / "a", tasks=("digit",), counts=(4,))
    tap, enrolled = strategy_for(client, learning_rate=rate, max_grad_norm=0.0)
    brief = tap.deliver(enrolled)
    found = client.run(1, brief.steps, brief.adapters)
    diverges = rate > 1
    trains = [r.distill.train if r.HasField("distill") else r.train for r in client.report.results]
    assert [train.diverged for train in trains if train.steps or train.diverged] == [diverges, diverges]
    assert torch.equal(found[X].vector, client.model.initial(5).vector)
    for slot, before in (("finetuned", W), ("distilled", X)):
        assert torch.equal(found[slot].vector, found[before].vector) == diverges
    assert found["distilled"].is_finite
    assert (client.folder / "adapter").is_dir()


def test_a_last_step_that_leaves_no_numbers_is_a_divergence(client: ToyClient) -> None:
    teacher = {W: Adapter(client.model.layout, client.model.initial(5).vector + 0.1)}
    start_x, step = distil(1e300)  # what is distilled is not in the loss that training watches
    step.distill.train.steps = 1
    with pytest.raises(PlanError, match="numbers that are not finite after the last of 1 steps; lower learning-rate"):
        client.run(1, [start_x, step], teacher)
    step.distill.train.keep_on_divergence = True
    found = client.run(1, [start_x, step], teacher)
    assert client.report.results[1].distill.train.diverged
    assert torch.equal(found[X].vector, client.model.initial(5).vector)


def test_a_slot_cannot_teach_itself(client: ToyClient) -> None:
    with pytest.raises(PlanError, match="cannot be its own teacher"):
        client.run(1, distil(1.0, teacher=X))


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
