"""What each client is given at the end, by its own validation examples; a run ends when no client improves."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.ending.choice import BEST, HELD, Choice
from server_app.run.options import RunOptions
from strategies import STRATEGIES
from strategies.framework import Answer
from strategies.framework.options import OptionError
from tests.benchmarks.accuracy.poisoning import HOSTILE, Liar
from tests.server_app.conftest import Runner
from tests.strategies.conftest import client_of
from tests.strategies.framework.test_training import LAYOUT

ADA, BOB = client_of("ada", LAYOUT, 50), client_of("bob", LAYOUT, 20)


def answer(loss: float, accuracy: float = 0.5, split: str = "validation") -> Answer:
    result = report_pb2.StepResult(evaluate=report_pb2.EvaluateResult(label="personal", split=split))
    metrics = {"personal": {"loss": loss, "accuracy": accuracy}}
    return Answer({}, {}, metrics, 10, report_pb2.Report(results=[result]))


def choice_of(strategy: str = "fedavg", saved: dict[str, Any] | None = None, **options: Any) -> Choice:
    made = STRATEGIES[strategy](rounds=4)
    for client in (ADA, BOB):
        made.enrol(client)
    return Choice(RunOptions(strategy=strategy, **({"deliver_choice": "validation"} | options)), made, saved)


def plan_of(choice: Choice, round_: int) -> list[plan_pb2.Step]:
    return list(choice.brief(round_, ADA, choice.strategy.brief(round_, ADA)).steps)


def copies(plan: list[plan_pb2.Step]) -> bool:
    return any(step.initialise.slot == BEST and step.initialise.copy_of == HELD for step in plan)


def test_the_best_rounds_model_is_kept_when_the_next_round_begins() -> None:
    choice = choice_of()
    kept = []
    for round_, loss in enumerate([2.0, 1.0, 1.5, 1.25], start=1):
        plan = plan_of(choice, round_)
        kept.append(copies(plan))
        merge = [index for index, step in enumerate(plan) if step.merge.target == HELD]
        (trained,) = [index for index, step in enumerate(plan) if list(step.train.slots) == ["global"]]
        assert merge == [trained - 1]  # before training moves it
        choice.absorb(round_, ADA, answer(loss))
        choice.settle()
        choice = choice_of(saved=json.loads(json.dumps(choice.saved())))  # as after a kill
    assert kept == [False, True, True, False]
    assert (choice.best["ada"], choice.rounds["ada"], choice.since) == (1.0, 2, 2)


def test_a_client_that_tells_no_score_is_given_what_the_strategy_delivers() -> None:
    """Its examples are under differential privacy, or it only says so, to test what the server does then."""
    choice = choice_of()
    silent = answer(1.0)
    silent.metrics["personal"].clear()  # type: ignore[attr-defined]
    for round_ in (1, 2):
        assert not copies(plan_of(choice, round_))
        choice.absorb(round_, ADA, silent)
        choice.settle()
    assert (choice.best, choice.rounds) == ({}, {})
    told = answer(1.0)
    told = Answer({}, {}, {"held-out merged": {}, "held-out local": {}}, 10, told.report)
    assert choice._choose(ADA, told)["given"] == "merged"


def test_of_a_client_that_gave_no_answer_nobody_knows_what_it_holds() -> None:
    choice = choice_of()
    plan_of(choice, 1)
    choice.absorb(1, ADA, answer(1.0))
    choice.settle()
    plan_of(choice, 2)
    choice.settle()
    assert not copies(plan_of(choice, 3))
    assert choice.best == {}


def test_batches_of_the_strategys_own_training_stay_the_same() -> None:
    choice = choice_of()
    before = list(choice.strategy.brief(1, ADA).steps)
    (number,) = [index for index, step in enumerate(before) if step.HasField("train")]
    own, alone = [step.train for step in plan_of(choice, 1) if step.HasField("train")]
    assert own.draw.as_step == number
    assert (list(alone.slots), alone.draw.as_step) == (["choice-alone"], 2)


@pytest.mark.parametrize("strategy", ["local", "local-all"])
def test_who_shares_nothing_trains_nothing_more(strategy: str) -> None:
    trains = [step for step in plan_of(choice_of(strategy), 1) if step.HasField("train")]
    assert len(trains) == 1


def test_nothing_is_added_where_nobody_asks_for_it() -> None:
    choice = choice_of(deliver_choice="merged", patience=2)
    assert plan_of(choice, 1) == list(choice.strategy.brief(1, ADA).steps)
    found = []
    for round_, (ada, bob) in enumerate([(2.0, 2.0), (2.0, 1.0), (1.9, 1.1), (2.0, 1.2), (3.0, 1.0)], start=1):
        choice.absorb(round_, ADA, answer(ada))
        choice.absorb(round_, BOB, answer(bob))
        choice.settle()
        found.append(choice.exhausted)
    assert found == [False, False, False, False, True]
    choice.absorb(6, ADA, answer(0.1, split="test"))  # chooses nothing: the test split is for what is delivered
    assert choice.best["ada"] == 1.9


def test_accuracy_decides_where_it_is_asked_to_and_the_loss_among_equals() -> None:
    choice = choice_of(choice_metric="accuracy")
    costs = [
        choice.cost({"loss": loss, "accuracy": accuracy}) for loss, accuracy in ((2.0, 0.5), (1.0, 0.5), (9.0, 0.6))
    ]
    assert costs[2] < costs[1] < costs[0]
    with pytest.raises(OptionError, match="choice-metric"):
        RunOptions(choice_metric="f1")


def test_everybody_is_given_what_is_best_on_its_validation_examples_and_nobody_less_than_local(run: Runner) -> None:
    runs = {
        name: run(3, strategy=strategy, run_name=name, num_server_rounds=2, local_steps=4, **options)
        for name, strategy, options in (
            ("chosen", "fedavg", {"deliver_choice": "validation"}),
            ("plain", "fedavg", {}),
            ("local", "local", {}),
        )
    }
    last = {name: done.rounds()[-1]["clients"] for name, done in runs.items()}
    given = set()
    for client, record in last["chosen"].items():
        choice = record["choice"]
        losses = {name: metrics["loss"] for name, metrics in choice["validation"].items()}
        assert losses[choice["given"]] == min(losses.values())
        assert f"{min(losses.values()):.4f}" in choice["why"]
        # The strategy's own numbers are those of a run without a choice, the local model is that of the strategy local.
        assert record["metrics"]["held-out"] == last["plain"][client]["metrics"]["held-out"]
        assert losses["local"] == pytest.approx(last["local"][client]["metrics"]["held-out"]["loss"], rel=1e-6)
        if choice["given"] in ("merged", "local"):
            other = last["plain" if choice["given"] == "merged" else "local"][client]
            assert record["metrics"]["personal"] == pytest.approx(other["metrics"]["personal"], rel=1e-6)
        given.add(choice["given"])
        about = json.loads((runs["chosen"].path / "clients" / client / "about.json").read_text())
        assert about["metrics"]["test"]["loss"] == pytest.approx(record["metrics"]["personal"]["loss"])
    assert given - {"merged"}, "everybody was given the strategy's model: this tests nothing"
    summary = json.loads((runs["chosen"].path / "summary.json").read_text())
    assert {client: record["choice"]["given"] for client, record in last["chosen"].items()} == summary["given"]


def test_a_liar_pushes_nobody_below_local_on_its_validation_examples(run: Runner) -> None:
    """It has no part in the adapter that a client trains alone, which is one of those that the client chooses from."""
    given = {"num_server_rounds": 2, "local_steps": 4}
    chosen = run(4, Liar("flip"), run_name="chosen", deliver_choice="validation", **given).rounds()[-1]["clients"]
    alone = run(4, strategy="local", run_name="local", **given).rounds()[-1]["clients"]
    honest = sorted(set(chosen) - {f"client-{index}" for index in HOSTILE[4]})
    assert len(honest) == 3
    for client in honest:
        losses = {name: metrics["loss"] for name, metrics in chosen[client]["choice"]["validation"].items()}
        local = alone[client]["metrics"]["held-out"]["loss"]
        assert losses["local"] == pytest.approx(local, rel=1e-6)
        assert losses[chosen[client]["choice"]["given"]] <= local * (1 + 1e-6)
    assert any(chosen[client]["choice"]["validation"]["merged"]["loss"] > alone[client]["metrics"]["held-out"]["loss"]
               for client in honest), "the liar does nobody harm: this tests nothing"  # fmt: skip


def test_a_run_ends_when_nobody_improves_any_more_unless_its_last_round_is_needed(run: Runner) -> None:
    done = run(2, num_server_rounds=6, local_steps=2, learning_rate=3.0, patience=1, run_name="patient")
    trained = [record for record in done.rounds() if record["phase"] == "train"]
    assert 1 < len(trained) < 6
    assert done.finished
    with pytest.raises(OptionError, match="patience"):
        run(2, strategy="potara", num_server_rounds=3, patience=1, run_name="needed")
