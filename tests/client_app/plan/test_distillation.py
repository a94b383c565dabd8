"""The step ``distill`` on clients with several tasks: a frozen teacher's outputs as a second target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client_app.data.dataset import Dataset
from client_app.data.targets import at_targets
from client_app.plan import training
from client_app.plan.distillation import MixtureTeacher, divergence
from client_app.plan.interpreter import PlanError
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.algorithms.tap import Tap, TapOptions
from strategies.framework import steps
from strategies.framework.exchange import Client
from strategies.framework.steps import Training
from tests.client_app.plan.tap_toys import LOCAL, SAME, W, X, train
from tests.toys.multi_task_toys import ToyClient


@pytest.fixture
def client(tmp_path: Path) -> ToyClient:
    return ToyClient(tmp_path / "ada")


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
        teaches = MixtureTeacher(lambda _: teacher, step, "")
        pair = (student, teacher) if teaches.everywhere else (at_targets(student, labels), at_targets(teacher, labels))
        torch.testing.assert_close(teaches.loss(batch, *pair), 3.0 * found)
        assert teaches.divergences() == {"answer": pytest.approx(float(found))}


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_tasks_distance_counts_in_full_however_few_its_examples(client: ToyClient, micro_batch: int) -> None:
    class Slope:
        """Distance with a slope of one for every trained number."""

        everywhere = False
        label_weight = 1.0

        def outputs(self, batch: Dataset) -> torch.Tensor:
            return torch.zeros(())

        def loss(
            self, batch: Dataset, logits: torch.Tensor, outputs: torch.Tensor, *, counted: bool = True
        ) -> torch.Tensor:
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

    def listen(
        self: MixtureTeacher, batch: Dataset, logits: torch.Tensor, outputs: torch.Tensor, **more: bool
    ) -> torch.Tensor:
        seen.append((outputs.requires_grad, logits.requires_grad))
        return original(self, batch, logits, outputs, **more)

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


def test_labels_of_weight_zero_teach_nothing_and_are_reported_all_the_same(tmp_path: Path) -> None:
    """Clients whose labels differ end with the same numbers; without label weight 0 they do not."""
    found: dict[float, list[torch.Tensor]] = {0.0: [], 1.0: []}
    losses = set()
    for weight, ends in found.items():
        for shift in (0, 1):
            client = ToyClient(tmp_path / f"{weight}-{shift}", tasks=("digit",), counts=(9,))
            labels = client.data.each_task["digit"].splits["train"].labels
            labels[:] = (labels + shift) % 2
            teacher = {W: Adapter(client.model.layout, client.model.initial(5).vector + 0.1)}
            student = steps.train(LOCAL, steps.mixture(X), [X], draw=SAME)
            step = steps.distill(student, steps.mixture(W), {"digit": 1.0}, label_weight=weight)
            ends.append(client.run(1, [steps.initialise(X, 5), step], teacher)[X].vector)
            losses.add(client.report.results[1].distill.train.first_loss)
    assert torch.equal(*found[0.0])
    assert not torch.equal(*found[1.0])
    assert min(losses) > 0
    assert len(losses) == 2


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_label_weight_that_is_none_is_refused(client: ToyClient, weight: float) -> None:
    start, step = distil(1.0)
    step.distill.label_weight = weight
    with pytest.raises(PlanError, match=r"label weight .*, expected a finite number"):
        client.run(1, [start, step], {W: client.model.initial(5)})


def test_an_ensemble_teaches_as_its_members_do_one_by_one(tmp_path: Path) -> None:
    """The gradient of KL from the average is the average of the gradients of KL from each member."""
    client = ToyClient(tmp_path / "a", tasks=("digit",), counts=(9,))
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 4, 5, generator=generator)
    shares = torch.tensor([0.2, 0.5, 0.3])
    average = (shares[:, None, None] * logits.softmax(-1)).sum(0).log()
    gradients = []
    for teachers, weights in (([average], [1.0]), (list(logits), shares.tolist())):
        student = torch.zeros(4, 5, requires_grad=True)
        kl = plan_pb2.DISTILL_LOSS_KL
        pairs = zip(weights, teachers, strict=True)
        torch.stack([w * divergence(t, student, kl).sum() for w, t in pairs]).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients)

    # In a plan: the teacher with one member that has all the share is that member.
    model = client.model
    received = {W: Adapter(model.layout, model.initial(5).vector + 0.1), "other": model.initial(9)}
    plain = replace(LOCAL, optimizer="sgd", learning_rate=0.5)  # AdamW would make much of the smallest differences
    student_step = steps.train(plain, steps.mixture(X), [X], draw=SAME)
    entry = Layout((Entry("shares", Factor.GATE, (2,)),), {}, model.layout.base_fingerprint)
    ends = []
    for teacher in (steps.mixture(W), steps.ensemble([W, "other"], "shares")):
        one = ToyClient(tmp_path / f"b{len(ends)}", tasks=("digit",), counts=(9,))
        step = steps.distill(student_step, teacher, {"digit": 3.0}, label_weight=0.0)
        extra = {"shares": Adapter(entry, torch.tensor([1.0, 0.0]))}
        ends.append(one.run(1, [steps.initialise(X, 5), step], received | extra)[X].vector)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
    assert not torch.equal(ends[0], model.initial(5).vector)


def test_coefficients_come_nearer_to_an_ensemble(tmp_path: Path) -> None:
    """The first batch, which is the whole split, is at the start; the mean over many is nearer to the teacher."""
    distances = []
    for count in (1, 40):
        client = ToyClient(tmp_path / str(count), tasks=("digit",), counts=(9,))
        layout = client.model.layout
        entry = Layout((Entry("shares", Factor.GATE, (2,)),), {}, layout.base_fingerprint)
        received = {
            W: Adapter(layout, client.model.initial(5).vector + 0.2),
            "other": Adapter(layout, client.model.initial(9).vector - 0.2),
            "shares": Adapter(entry, torch.tensor([0.9, 0.1])),
        }
        training = replace(LOCAL, local_steps=count, batch_size=32, learning_rate=0.1)
        gates = {W: "first", "other": "second"}
        mix, trained = steps.each_gated(gates), list(gates.values())
        student = steps.train(training, mix, trained, draw=SAME, sharpness_radius=0.05)
        step = steps.distill(student, steps.ensemble([W, "other"], "shares"), {"digit": 1.0}, label_weight=0.0)
        client.run(1, [*(steps.initialise_gates(gate, "scalar") for gate in trained), step], received)
        distances.append(client.report.results[2].distill.divergences["digit"])
    assert 0 < distances[1] < 0.8 * distances[0]
