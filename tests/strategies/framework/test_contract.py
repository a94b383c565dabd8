"""What every strategy promises: to Flower, to clients, and to a checkpoint."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from google.protobuf.message import Message as ProtoMessage
from safetensors.torch import load, save

from proto.fedalloy.v1 import plan_pb2
from strategies import STRATEGIES, AlloyStrategy
from strategies.framework.exchange import State, StrategyError
from strategies.framework.steps import Training
from tests.strategies.conftest import (
    FakeGrid,
    FakeNode,
    client_of,
    layout_of,
    play,
)
from tests.strategies.fleet import play_round
from tests.strategies.framework.builds import (
    ANY_RANK,
    BUILDS,
    LAYOUT,
    RIVALS,
    accuracies,
    enrolled,
    every_strategy,
    nodes,
)


def test_every_strategy_is_covered_here() -> None:
    assert {type(build()) for build in BUILDS.values()} == set(STRATEGIES.values())
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())


# ------------------------------------------------------------------------------------------------------------ enrolment


MISFITS = [
    (layout_of(base="another-model"), "base model another-mode, expected base-model"),
    (layout_of(rank=16), "rank 16 for 'q_proj', expected 4"),
    (layout_of(alpha=4.0), "scaling 1.0 for 'q_proj', expected 2.0"),
    (layout_of(modules=("q_proj",)), "no tensor 'v_proj.A', expected one of shape (4, 6)"),
    (layout_of(modules=("q_proj", "v_proj", "k_proj")), "unknown tensor 'k_proj.A'"),
    (layout_of(d_out=9), "shape (9, 4) for 'q_proj.B', expected (5, 4)"),
    (layout_of(head=10), "shape (10, 5) for 'head.weight', expected (3, 5)"),
    (layout_of(modules=("v_proj", "q_proj")), "the same tensors in another order"),
]


@pytest.mark.parametrize(
    ("name", "layout", "finding"),
    [
        (name, *misfit)
        for name in BUILDS
        for misfit in (MISFITS[:2] if name in RIVALS else MISFITS)
        if name not in ANY_RANK
    ],
)
def test_a_client_that_does_not_fit_is_refused_by_name(name: str, layout: Any, finding: str) -> None:
    strategy = enrolled(name)
    before = dict(strategy.clients)
    for stranger in ("dan", "ada"):  # a new client, and one that comes back as another
        with pytest.raises(StrategyError) as caught:
            strategy.enrol(client_of(stranger, layout))
        assert f"client '{stranger}' has {finding}" in str(caught.value)
        assert "(as client 'ada' has)" in str(caught.value)
        assert strategy.clients == before
    play_if_it_sends(strategy)


@every_strategy
def test_a_client_may_come_again_and_may_come_late(name: str) -> None:
    strategy = enrolled(name)
    play_if_it_sends(strategy)
    strategy.enrol(client_of("ada", LAYOUT, 50, node_id=99))
    assert strategy.clients["ada"].node_id == 99
    strategy.enrol(client_of("zoe", LAYOUT))
    for client in strategy.clients.values():
        assert strategy.brief(2, client).steps
        assert strategy.deliver(client).steps


FLEETS: WeakKeyDictionary[AlloyStrategy, list[FakeNode]] = WeakKeyDictionary()


def play_if_it_sends(strategy: AlloyStrategy, round_: int = 1) -> dict[str, Any]:
    if strategy.name in RIVALS:
        return play_round(strategy, FakeGrid(FLEETS.setdefault(strategy, nodes())), round_)
    trains_alone = strategy.name == "local" or (strategy.name == "potara" and round_ > 1)
    return strategy.settle(round_) if trains_alone else play(strategy, strategy.clients, round_)


# ----------------------------------------------------------------------------------------------------- briefs and state


ALGORITHMS = {"fedavg", "fedit", "fedmerge", "ffa", "potara", "tap", "mosaic", "ditto", "ifca"} | set(STRATEGIES)
ALGORITHMS.remove("local")  # the name of a slot says whose it is, not what it is for


def words_of(message: ProtoMessage) -> Iterator[str]:
    """What somebody can read in a message: names of set fields and of enum values, texts, keys of maps; no numbers.

    Digests and ids are left out: any of them may have "ffa" in it, by chance.
    """
    for field, value in message.ListFields():
        yield field.name
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map:
            yield from (str(key) for key in value)
            field, value = field.message_type.fields_by_name["value"], list(value.values())
        for item in value if is_map or field.is_repeated else [value]:
            if isinstance(item, ProtoMessage):
                yield from words_of(item)
            elif field.enum_type is not None:
                yield field.enum_type.values_by_number[item].name
            elif isinstance(item, str):
                yield re.sub(r"[0-9a-f]{16,}", "", item)


def named_in(words: Iterable[str]) -> list[str]:
    text = " ".join(words).lower()
    return sorted(algorithm for algorithm in ALGORITHMS if algorithm in text)


@every_strategy
def test_a_client_never_learns_the_algorithm(name: str) -> None:
    strategy = enrolled(name)
    for round_ in (1, 2):
        for client in strategy.clients.values():
            for brief in (strategy.brief(round_, client), strategy.deliver(client)):
                assert named_in([*(word for step in brief.steps for word in words_of(step)), *brief.adapters]) == []
        play_if_it_sends(strategy, round_)
    found = nodes()
    accuracies(BUILDS[name](seed=7), FakeGrid(found), rounds=1)
    assert named_in(word for node in found for plan in node.plans for word in words_of(plan)) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: setattr(plan, "run_name", "my-FFA-run"),
        lambda plan: plan.steps.add().train.slots.append("ffa"),
        lambda plan: setattr(plan.steps.add().evaluate.mixture.terms.add(), "slot", "of-ffa"),
        lambda plan: plan.steps.add().evaluate.mixture.terms.add().per_module.values.update({"ffa": 1.0}),
    ],
)
def test_the_search_for_algorithms_finds_them_in_every_text_of_a_plan(change: Callable[[Any], Any]) -> None:
    plan = plan_pb2.Plan(client_id="ada", run_name="0123456789abffa0")
    (plan.steps.add().train.learning_rate,) = struct.unpack("<d", b"\0" + b"tapffa?")
    assert b"tapffa" in plan.SerializeToString()
    assert named_in(words_of(plan)) == []
    change(plan)
    assert named_in(words_of(plan)) == ["ffa"]


@every_strategy
def test_every_plan_evaluates_and_every_delivery_saves_the_personal_model(name: str) -> None:
    strategy = enrolled(name)
    for client in strategy.clients.values():
        kinds = [step.WhichOneof("kind") for step in strategy.brief(1, client).steps]
        assert kinds.count("evaluate") == 1
        training = [index for index, kind in enumerate(kinds) if kind in ("train", "distill")]
        assert len(training) >= (2 if name == "tap" else 1)  # a federated and a personal adapter
        assert kinds.index("evaluate") < training[0]  # of the model that was sent
        delivery = strategy.deliver(client)
        assert [step.WhichOneof("kind") for step in delivery.steps][-2:] == ["save", "evaluate"]
        assert delivery.steps[-1].evaluate.label == "personal"
        assert delivery.steps[-1].evaluate.mixture == delivery.steps[-2].save.mixture


@every_strategy
def test_local_training_is_as_the_run_says(name: str) -> None:
    training = Training(
        local_steps=13, batch_size=3, learning_rate=0.25, schedule="cosine", weight_decay=0.5, max_grad_norm=2.0,
        evaluate_split="validation",
    )  # fmt: skip
    strategy = enrolled(name, training=training)
    done: dict[str, int] = {}
    for step in strategy.brief(1, strategy.clients["ada"]).steps:
        if step.HasField("train") or (step.HasField("distill") and name != "tap"):  # whose second stage has its own
            train = step.train if step.HasField("train") else step.distill.train
            done[train.slots[0]] = done.get(train.slots[0], 0) + train.steps
            split = "train+validation" if name == "local-all" else "train"
            assert (train.batch_size, train.learning_rate, train.split) == (3, 0.25, split)
            assert (train.schedule, train.weight_decay, train.max_grad_norm) == (plan_pb2.SCHEDULE_COSINE, 0.5, 2.0)
        if step.HasField("evaluate"):
            assert step.evaluate.split == "validation"
    divided = name in ("per-fedavg", "persa-fl")  # among its slots
    assert ({sum(done.values())} if divided else set(done.values())) == {13}


@every_strategy
def test_state_is_finite_tensors_and_json_and_continues_to_the_bit(name: str) -> None:
    straight = enrolled(name)
    for stop in range(4):
        state = straight.state()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.tensors.values())
        values = json.loads(json.dumps(state.values, allow_nan=False))
        assert values == state.values
        resumed = enrolled(name)
        resumed.load_state(State(load(save(state.tensors)) if state.tensors else {}, values))
        FLEETS[resumed] = copy.deepcopy(FLEETS.get(straight, nodes()))
        for strategy in (straight, resumed):
            record = play_if_it_sends(strategy, stop + 1)
            assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert set(resumed.state().tensors) == set(straight.state().tensors)
        for key, tensor in straight.state().tensors.items():
            assert torch.equal(tensor, resumed.state().tensors[key])
        assert resumed.state().values == straight.state().values


@every_strategy
def test_the_seed_decides_the_start(name: str) -> None:
    def start(seed: int) -> tuple[list[str], list[bytes]]:
        strategy = BUILDS[name](seed=seed)
        strategy.enrol(client_of("ada", LAYOUT))
        brief = strategy.brief(1, strategy.clients["ada"])
        return [str(step) for step in brief.steps], [adapter.digest for adapter in brief.adapters.values()]

    assert start(1) == start(1)
    assert start(1) != start(2)
