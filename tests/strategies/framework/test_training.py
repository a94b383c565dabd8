"""How long a client trains, and its place in the learning rate's schedule, in the same way for every strategy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from client_app.model.personal import PersonalModel
from fedalloy_adapters.adapter import Adapter
from proto.fedalloy.v1 import plan_pb2
from strategies import STRATEGIES
from strategies.algorithms.fedavg import FedAvg, FedAvgOptions
from strategies.framework import AlloyStrategy, Answer, Client, steps
from strategies.framework.options import OptionError
from strategies.framework.training import Training, counted, local_steps
from tests.fedalloy_adapters.tiny_vit import base_of
from tests.strategies.fleet import client_of

LAYOUT = PersonalModel(base_of(), 2, 4.0).layout


def trains(plan: list[plan_pb2.Step]) -> list[plan_pb2.TrainStep]:
    kinds = [(step.WhichOneof("kind"), step) for step in plan]
    return [s.train if kind == "train" else s.distill.train for kind, s in kinds if kind in ("train", "distill")]


def sent(strategy: AlloyStrategy, client: Client, round_: int) -> list[plan_pb2.TrainStep]:  # type: ignore[type-arg]
    brief = strategy.brief(round_, client) if round_ <= strategy.rounds else strategy.deliver(client)
    return trains(list(strategy.dispatch(round_, client, brief, "run", b"key").plan.steps))


@pytest.mark.parametrize(
    ("epochs", "batch", "examples", "steps_"),
    [(0.0, 16, 1000, 30), (1.0, 16, 100, 7), (2.0, 16, 100, 14), (0.5, 10, 100, 5), (0.01, 16, 100, 1)],
)
def test_epochs_are_whole_batches_of_the_clients_own_examples(
    epochs: float, batch: int, examples: int, steps_: int
) -> None:
    assert local_steps(Training(local_epochs=epochs, batch_size=batch), examples) == steps_


def test_who_has_more_data_does_more_work_under_every_strategy_that_leaves_the_number_of_steps_to_the_run() -> None:
    training = Training(local_epochs=2, batch_size=8)
    for name in ("local", "fedavg", "fedprox", "fedrep", "fml", "ditto", "fedmerge"):
        strategy = STRATEGIES[name](training=training, rounds=3)
        few, many = (client_of(who, LAYOUT, count) for who, count in (("few", 20), ("many", 100)))
        for client in (few, many):
            strategy.enrol(client)
        by_slots: dict[str, dict[tuple[str, ...], int]] = {}
        for client in (few, many):
            counts = by_slots.setdefault(client.id, {})
            for step in sent(strategy, client, 1):
                key = () if name == "fedrep" else tuple(step.slots)
                counts[key] = counts.get(key, 0) + step.steps
        assert set(by_slots["few"].values()) == {2 * 3}, name
        assert set(by_slots["many"].values()) == {2 * 13}, name


def test_a_schedule_over_the_run_goes_on_where_the_round_before_left_it_and_a_delivery_has_its_own() -> None:
    training = Training(local_steps=10, schedule="cosine", schedule_over="run", warmup_ratio=0.1)
    strategy = STRATEGIES["fedavg-head"](training=training, rounds=4)
    client = client_of("ada", LAYOUT, 50)
    strategy.enrol(client)
    found = [(s.schedule_done, s.schedule_total, s.warmup_steps) for r in (1, 2, 4) for s in sent(strategy, client, r)]
    assert found == [(0, 40, 4), (10, 40, 4), (30, 40, 4)]
    assert [(s.schedule_done, s.schedule_total) for s in sent(strategy, client, 5)] == [(0, 0)]
    once = STRATEGIES["fedavg"](training=replace(training, schedule_over="round"), rounds=4)
    once.enrol(client)
    assert [(s.schedule_total, s.warmup_steps) for s in sent(once, client, 2)] == [(0, 1)]


def test_each_branch_of_potara_has_a_schedule_from_its_own_beginning() -> None:
    strategy = STRATEGIES["potara"](training=Training(local_steps=10, schedule_over="run"), rounds=6)
    client = client_of("ada", LAYOUT, 50)
    strategy.enrol(client)
    places = [(s.schedule_done, s.schedule_total) for r in (1, 4, 5) for s in sent(strategy, client, r)[:1]]
    assert places == [(0, 40), (30, 40), (0, 30)]  # of its own branch, 15 steps in each of two rounds


def test_a_step_about_validation_examples_or_a_fold_counts_those() -> None:
    client = client_of("ada", LAYOUT, 64)
    client.registration.tasks[0].examples["validation"] = 16
    training = Training(local_epochs=1, batch_size=16)
    plan = [
        steps.train(training, steps.mixture("a"), ["a"], split="train+validation"),
        steps.train(training, steps.mixture("a"), ["a"], fold=(0, 2)),
        steps.train(training, steps.mixture("a"), ["a"], steps=3),
    ]
    assert [step.steps for step in trains(counted(plan, training, (client.claimed, client.held_out), 1, 1))] == [
        5,
        2,
        3,
    ]
    assert [step.steps for step in trains(plan)] == [0, 0, 3]  # what the strategy wrote has not changed


def test_normalised_averages_divide_by_steps() -> None:
    """FedNova by hand: 16 and 48 examples, 1 and 3 steps; tau = 1/4 + 3 * 3/4 = 5/2."""
    strategy = FedAvg(FedAvgOptions(normalise=True), Training(local_epochs=1, batch_size=16), rounds=1)
    plain = FedAvg(FedAvgOptions(), Training(local_epochs=1, batch_size=16), rounds=1)
    clients = [client_of("few", LAYOUT, 16), client_of("many", LAYOUT, 48)]
    for found in (strategy, plain):
        for client in clients:
            found.enrol(client)
        before = found.global_model.vector.clone()
        for client, step in zip(clients, (1.0, 2.0), strict=True):
            moved = Adapter(LAYOUT, before + step)
            found.absorb(1, client, Answer({"global": moved}, {}, {}, client.examples, None))  # type: ignore[arg-type]
        found.settle(1)
        expected = 2.5 * (1 / 4 * 1 / 1 + 3 / 4 * 2 / 3) if found is strategy else 1 / 4 * 1 + 3 / 4 * 2
        torch.testing.assert_close(found.global_model.vector, before + expected, atol=1e-5, rtol=1e-5)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(OptionError, match="warmup-steps = 3 and warmup-ratio"):
        Training(warmup_steps=3, warmup_ratio=0.5)
    with pytest.raises(OptionError, match="schedule-over = 'runs'"):
        Training(schedule_over="runs")
    with pytest.raises(OptionError, match="normalise"):
        FedAvgOptions(normalise=True, space="delta")
