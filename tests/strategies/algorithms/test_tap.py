"""TAP's protocol: what a client is asked, whose groups are averaged, and what a round's record contains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import groups_of, layout_of_groups
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.wire.codec import encode
from fedalloy_adapters.wire.flower_records import pack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.algorithms.fedavg import FedAvg
from strategies.algorithms.tap import Tap, TapOptions
from strategies.framework.answers import answer_from
from strategies.framework.exchange import Answer, BadAnswerError, Brief, Client, StrategyError
from strategies.framework.options import OptionError
from strategies.framework.steps import Training
from tests.strategies.conftest import FakeNode, client_of, dispatch_of, layout_of, play

INF = float("inf")
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "photo": ("image-classification", ("shared", "mod/image", "task/name", "head/photo")),
    "topic": ("text-classification", ("shared", "mod/text", "task/name", "head/topic")),
    "title": ("image-text-to-text", ("shared", "mod/image", "mod/text", "task/write", "head/title")),
}
CLIENTS: dict[str, dict[str, int]] = {"ada": {"photo": 10, "topic": 30}, "ben": {"topic": 20}, "cyd": {"title": 40}}


def grouped(groups: Sequence[str], outputs: int = 3, base: str = "base") -> Layout:
    entries: list[Entry] = []
    for group in groups:
        if group.startswith("head/"):
            entries.append(Entry(f"{group}::out", Factor.WEIGHT, (outputs, 4)))
        else:
            entries += [Entry(f"{group}::q", Factor.A, (2, 4)), Entry(f"{group}::q", Factor.B, (4, 2))]
    return Layout(tuple(entries), {entry.module: 2.0 for entry in entries if entry.factor.is_lora}, base)


def multi(name: str, tasks: Mapping[str, int], layout: Layout | None = None, validation: int = 4) -> Client:
    groups = sorted({group for task in tasks for group in TASKS[task][1]})
    registration = report_pb2.Registration(
        tasks=[
            report_pb2.Task(
                name=task,
                kind=TASKS[task][0],
                examples={"train": count, "validation": validation},
                groups=TASKS[task][1],
            )
            for task, count in tasks.items()
        ]
    )
    return Client(name, 7, layout or grouped(groups), sum(tasks.values()), "base", registration)


def tap(training: Training | None = None, **options: Any) -> Tap:
    strategy = Tap(TapOptions(**options), training, seed=5)
    for name, tasks in CLIENTS.items():
        strategy.enrol(multi(name, tasks))
    return strategy


def step(brief: Brief, kind: str, number: int = 0) -> Any:
    found = [getattr(step, kind) for step in brief.steps if step.WhichOneof("kind") == kind]
    return found[number]


def margins(strategy: Tap, name: str) -> dict[str, float]:
    return {rule.task: rule.margin for rule in step(strategy.brief(1, strategy.clients[name]), "replace").rules}


def test_the_federated_adapter_is_trained_and_sent_as_by_fedavg() -> None:
    strategy, plain = tap(), FedAvg(seed=5)
    for name, tasks in CLIENTS.items():
        plain.enrol(multi(name, tasks))
    for round_ in (1, 2):
        for name in CLIENTS:
            ours, theirs = (s.brief(round_, s.clients[name]) for s in (strategy, plain))
            assert {slot: a.digest for slot, a in ours.adapters.items()} == {
                slot: a.digest for slot, a in theirs.adapters.items()
            }
            trained, expected = step(ours, "train"), step(theirs, "train")
            # FedAvg's train step has index 1 in its plan; ours asks for the batches of that index.
            assert [s.WhichOneof("kind") for s in theirs.steps].index("train") == trained.draw.as_step
            for field in ("draw", "record"):
                trained.ClearField(field)
            assert trained == expected
            assert step(ours, "send") == step(theirs, "send")
        play(strategy, CLIENTS, round_)
        play(plain, CLIENTS, round_)
    assert torch.equal(strategy.state().tensors["model"], plain.state().tensors["model"])


def test_a_round_trains_both_and_only_one_is_sent() -> None:
    brief = tap().brief(1, tap().clients["ada"])
    kinds = [s.WhichOneof("kind") for s in brief.steps]
    assert kinds == ["initialise", "evaluate", "train", "send", "replace", "train"]
    first, second = step(brief, "train"), step(brief, "train", 1)
    assert (list(first.slots), list(second.slots)) == (["global"], ["personal"])
    assert (first.record, second.record) == ("global", "personal")
    assert first.draw == second.draw
    assert second.draw_after_replace != second.draw
    assert not first.HasField("draw_after_replace")
    assert (first.keep_on_divergence, second.keep_on_divergence) == (False, True)
    replace = step(brief, "replace")
    assert (replace.target, replace.source) == ("personal", "global")
    assert (replace.target_record, replace.source_record) == ("personal", "global")


def test_margins_by_name_by_kind_and_for_the_rest() -> None:
    assert margins(tap(), "ada") == {"photo": 0.01, "topic": 0.005}
    named = tap(margin=-INF, margins="topic=0.25,image-text-to-text=inf")
    assert margins(named, "ada") == {"photo": -INF, "topic": 0.25}
    assert margins(named, "cyd") == {"title": INF}


def test_options_change_the_plan() -> None:
    client = tap().clients["ada"]
    probe = tap(history="probe").brief(1, client)
    evaluations = [s.evaluate for s in probe.steps if s.HasField("evaluate")]
    assert [(e.record, e.split) for e in evaluations] == [
        ("", "test"),
        ("global", "validation"),
        ("personal", "validation"),
    ]
    assert [s.train.record for s in probe.steps if s.HasField("train")] == ["", ""]
    received = tap(replace_source="global").brief(1, client)
    assert step(received, "initialise", 1).copy_of == "global"
    assert step(received, "replace").source == "received"
    kinds = [s.WhichOneof("kind") for s in received.steps]
    assert kinds.index("evaluate") < kinds.index("initialise", 1) < kinds.index("train")
    assert step(tap(replace_scope="exclusive").brief(1, client), "replace").exclusive
    assert step(tap(margin_mode="rel").brief(1, client), "replace").rules[0].relative
    assert step(tap(history_norm="batch-share").brief(1, client), "train").record_batch_share
    reference = tap(seed_mode="reference").brief(4, client)
    assert (step(reference, "train", 1).draw.seed, step(reference, "train", 1).draw_after_replace.seed) == (3, 6)
    rates = [step(tap(warm_up_rounds=2).brief(r, client), "train").learning_rate for r in (1, 2, 3)]
    assert rates == pytest.approx([5e-3 / 3, 5e-3 * 2 / 3, 5e-3])


def test_a_weight_may_be_the_examples_of_the_tasks_that_use_a_group() -> None:
    values = {}
    for weight in ("total", "task"):
        strategy = tap(weight=weight)
        play(strategy, ["ada", "ben"], 1, lambda name, _, a: Adapter(a.layout, a.vector * 0 + (name == "ada")))
        model = strategy.federated.part_of(strategy.clients["ada"])
        values[weight] = {
            group: float(model.part(layout_of_groups(model.layout, [group])).vector[0])
            for group in groups_of(model.layout)
        }
    assert values["total"]["head/topic"] == pytest.approx(40 / 60)
    assert values["task"]["head/topic"] == pytest.approx(30 / 50)
    assert values["task"]["shared"] == pytest.approx(40 / 60)
    assert values["task"]["head/photo"] == values["total"]["head/photo"] == 1.0


def test_groups_without_owners_in_a_round_stay_and_all_keep_their_start() -> None:
    strategy = tap()
    before = strategy.federated.part_of(strategy.clients["cyd"])
    play(strategy, ["ben"], 1)
    after = strategy.federated.part_of(strategy.clients["cyd"])
    changed = {
        group
        for group in groups_of(before.layout)
        if not torch.equal(*(a.part(layout_of_groups(a.layout, [group])).vector for a in (before, after)))
    }
    assert changed == {"shared", "mod/text"}
    assert torch.equal(before.vector, Adapter.initial(before.layout, 5).vector)


def test_a_late_client_brings_its_groups_along() -> None:
    strategy = Tap(seed=5)
    strategy.enrol(multi("ada", CLIENTS["ada"]))
    play(strategy, ["ada"], 1)
    moved = strategy.federated.part_of(strategy.clients["ada"])
    strategy.enrol(multi("cyd", CLIENTS["cyd"]))
    assert torch.equal(strategy.federated.part_of(strategy.clients["ada"]).vector, moved.vector)
    whole = strategy.federated.part_of(strategy.clients["cyd"])
    fresh = layout_of_groups(whole.layout, ["head/title", "task/write"])  # ada has trained the others
    assert torch.equal(whole.part(fresh).vector, Adapter.initial(whole.layout, 5).part(fresh).vector)


def test_the_record_says_who_replaced_what() -> None:
    strategy = tap()
    for round_ in (1, 2):
        report = report_pb2.Report()
        found = report.results.add().replace
        found.tasks.add(task="photo", replaced=True, source_loss=1.0)
        found.tasks.add(task="topic", replaced=False, source_loss=1.0, target_loss=0.5)
        client = strategy.clients["ada"]
        adapter = strategy.federated.part_of(client)
        strategy.absorb(round_, client, Answer({"global": adapter}, {}, {}, 40, report))
        record = strategy.settle(round_)
    assert record["replaced"] == 1
    assert record["replacements"] == {
        "ada": {
            "photo": {"replaced": True, "source_loss": 1.0},
            "topic": {"replaced": False, "source_loss": 1.0, "target_loss": 0.5},
        }
    }
    assert record["replaced_so_far"] == {"photo": 2}
    resumed = tap()
    resumed.load_state(strategy.state())
    assert resumed.settle(3)["replaced_so_far"] == {"photo": 2}


def test_a_name_in_a_table_that_is_nobodys_is_said() -> None:
    assert "warning" not in tap().settle(1)
    record = tap(margins="captoin=0.1,topic=0.2", kd_losses="photos=mse").settle(1)
    assert record["warning"] == "no client has a task or kind of task 'captoin', 'photos', as tap.* names"


def test_a_resumed_server_keeps_the_groups_of_clients_that_are_not_back() -> None:
    strategy = tap()
    play(strategy, CLIENTS, 1)
    expected = strategy.federated.part_of(strategy.clients["cyd"])
    resumed = Tap(seed=5)
    resumed.enrol(multi("ben", CLIENTS["ben"]))
    resumed.load_state(strategy.state())
    resumed.enrol(multi("cyd", CLIENTS["cyd"]))
    assert torch.equal(resumed.federated.part_of(resumed.clients["cyd"]).vector, expected.vector)


@pytest.mark.parametrize(
    ("options", "slot"),
    [
        ({}, "distilled"),
        ({"deliver": "global", "margin": INF, "margins": ""}, "global"),
        ({"deliver": "finetuned"}, "finetuned"),
        ({"deliver": "stage1", "margin": INF, "margins": ""}, "personal"),
    ],
)
def test_the_delivery_has_all_models_and_saves_the_one_that_is_asked_for(options: Any, slot: str) -> None:
    strategy = tap(**options)
    brief = strategy.deliver(strategy.clients["ada"])
    labels = {s.evaluate.label: s.evaluate.mixture.terms[0].slot for s in brief.steps if s.HasField("evaluate")}
    assert labels == {
        "global": "global",
        "stage1": "personal",
        "finetuned": "finetuned",
        "distilled": "distilled",
        "personal": slot,
    }
    assert step(brief, "save").mixture.terms[0].slot == slot
    starts = {s.initialise.slot: s.initialise.copy_of for s in brief.steps if s.HasField("initialise")}
    assert starts == {"personal": "", "finetuned": "global", "distilled": "personal"}
    trained = [slot for s in brief.steps for slot in (*s.train.slots, *s.distill.train.slots)]
    assert trained == ["finetuned", "distilled"]  # X itself stays


def test_stage_two_is_as_the_options_say() -> None:
    training = Training(learning_rate=0.3)
    strategy = tap(training, distill_steps=7, finetune_steps=14, kd_losses="title=mse", temperature=2.0, kd_weight=0.5)
    brief = strategy.deliver(strategy.clients["ada"])
    distill = step(brief, "distill")
    assert step(brief, "train").steps == 14
    assert distill.train.steps == 7
    assert distill.train.learning_rate == pytest.approx(0.3 * 0.333)
    assert distill.train.draw == step(brief, "train").draw  # teacher and student see the same batches
    assert distill.teacher.terms[0].slot == "finetuned"
    assert {item.task: item.weight for item in distill.tasks} == {"photo": 0.001, "topic": 0.5}
    assert distill.temperature == 2.0
    other = strategy.deliver(strategy.clients["cyd"])
    assert [(item.task, item.loss) for item in step(other, "distill").tasks] == [("title", plan_pb2.DISTILL_LOSS_MSE)]
    alone = tap(kd_teacher="global", kd_weight=0.0, kd_reduction="first-dim")
    found = step(alone.deliver(alone.clients["ada"]), "distill")
    assert found.teacher.terms[0].slot == "global"
    assert {item.weight for item in found.tasks} == {0.0}
    assert found.reduction == plan_pb2.DISTILL_REDUCTION_EXAMPLE_MEAN
    assert step(alone.deliver(alone.clients["ada"]), "train").steps == 50


def test_clients_that_do_not_fit_are_refused_by_name() -> None:
    strategy = tap(history="probe")
    layout = grouped(["shared", "mod/text", "task/name", "head/topic", "head/photo"])
    with pytest.raises(
        StrategyError, match="client 'dan' has group 'head/photo' not both declared by a task and in its adapter"
    ):
        strategy.enrol(multi("dan", {"topic": 5}, layout))
    wide = grouped(sorted(TASKS["topic"][1]), outputs=9)
    with pytest.raises(StrategyError, match=r"client 'dan' has shape \(9, 4\) for 'head/topic::out.weight', expected"):
        strategy.enrol(multi("dan", {"topic": 5}, wide))
    with pytest.raises(StrategyError, match="client 'dan' has base model other"):
        strategy.enrol(multi("dan", {"topic": 5}, grouped(sorted(TASKS["topic"][1]), base="other")))
    with pytest.raises(StrategyError, match="has no validation examples of task 'topic'"):
        strategy.enrol(multi("dan", {"topic": 5}, validation=0))
    with pytest.raises(StrategyError, match="client 'dan' has no training examples of task 'photo'"):
        strategy.enrol(multi("dan", {"topic": 5, "photo": 0}))
    with pytest.raises(StrategyError, match="client 'dan' has group 'head/topic' not both declared"):
        strategy.enrol(multi("dan", {"topic": 5}, grouped(["mod/text", "shared", "task/name"])))
    with pytest.raises(StrategyError, match="client 'eve' has"):
        strategy.enrol(client_of("eve", layout_of()))  # an adapter without groups, among those with groups
    assert set(strategy.clients) == set(CLIENTS)


def test_an_answer_with_other_groups_or_numbers_is_refused_and_changes_nothing() -> None:  # T25
    strategy = tap()
    layout = strategy.clients["ada"].layout
    dispatch = dispatch_of(strategy, "ada")
    report, _ = FakeNode("ada", layout, examples=40).run(dispatch.plan, {"global": encode(Adapter.zeros(layout)).blob})
    some = layout_of_groups(layout, ["shared", "mod/text"])
    more = grouped([*groups_of(layout), "head/other"])
    wide = grouped(groups_of(layout), outputs=9)
    huge = Adapter(layout, torch.full((layout.size,), 1e30))
    for adapter, finding in (
        (Adapter.zeros(some), "no tensor"),
        (Adapter.zeros(more), "unknown tensor 'head/other::out.weight'"),
        (Adapter.zeros(wide), r"shape \(9, 4\) for 'head/"),
        (huge, "numbers up to 1e"),
    ):
        message = Message(pack("report", report, {"global": encode(adapter).blob}), reply_to=dispatch.message(7))
        with pytest.raises(BadAnswerError, match=f"client 'ada' sent slot 'global'.*{finding}"):
            answer_from(dispatch, message)
    found = report.results[4].replace.tasks[0]
    honest = report_pb2.TaskReplacement()
    honest.CopyFrom(found)
    for spoil, finding in (
        (
            {"source_loss": float("nan")},
            r"replace\.tasks\[0\]\.source_loss = nan, expected a finite",
        ),
        ({"task": "somebody else's"}, r"step 4 \(replace\): reports tasks"),
    ):
        found.CopyFrom(honest)
        for name, value in spoil.items():
            setattr(found, name, value)
        blob = encode(Adapter.zeros(layout)).blob
        message = Message(pack("report", report, {"global": blob}), reply_to=dispatch.message(7))
        with pytest.raises(BadAnswerError, match=finding):
            answer_from(dispatch, message)
    before = strategy.state().tensors["model"].clone()
    strategy.settle(1)
    assert torch.equal(strategy.state().tensors["model"], before)


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"margin": float("nan")}, "expected numbers or inf"),
        ({"margins": "topic=wide"}, "expected a number after each name"),
        ({"margins": "topic"}, "expected name=value pairs"),
        ({"margins": "topic=1,photo=2,topic=3"}, "tap.margins = .* expected each name once, found 'topic' twice"),
        ({"margins": "topic=nan"}, "tap.margins = 'topic=nan', expected numbers or inf"),
        ({"kd_weights": "topic=inf"}, "tap.kd-weights: topic = inf, expected a finite number of at least 0"),
        ({"kd_weight": -0.5}, "tap.kd-weight = -0.5, expected a finite number of at least 0"),
        ({"temperature": 0.0}, "tap.temperature = 0.0, expected a finite number of at least 1e-06"),
        ({"distill_steps": 0}, "tap.distill-steps = 0, expected a finite number of at least 1"),
        ({"finetune_steps": -1}, "tap.finetune-steps = -1, expected a finite number of at least 0"),
        ({"distill_rate": 0.0}, "tap.distill-rate = 0.0, expected a finite number of at least 1e-09"),
        ({"warm_up_rounds": -1}, "tap.warm-up-rounds = -1, expected a finite number of at least 0"),
        ({"kd_weights": "topic=-1"}, "tap.kd-weights: topic = -1.0, expected a finite number of at least 0"),
        ({"kd_losses": "topic=kll"}, "did you mean 'kl'"),
        ({"history": "probes"}, "did you mean 'probe'"),
        ({"deliver": "fedavg"}, "expected one of tap, stage1, finetuned, global"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], finding: str) -> None:
    with pytest.raises(OptionError, match=finding):
        TapOptions(**options)
