"""Local-only training: nothing is sent, and every client keeps its own slot."""

from __future__ import annotations

import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.wire.flower_records import ARRAY_RECORD
from strategies.algorithms.local import Local
from strategies.framework.steps import Training
from tests.strategies.conftest import FakeNode, client_of, dispatch_of, drift, layout_of

LAYOUT = layout_of()


def local() -> Local:
    strategy = Local(training=Training(uplink_encoding="int8", downlink_encoding="int8"), seed=11)
    for name in ("ada", "ben"):
        strategy.enrol(client_of(name, LAYOUT))
    return strategy


def test_no_adapter_travels_in_either_direction() -> None:
    strategy = local()
    for client in strategy.clients.values():
        for brief in (strategy.brief(1, client), strategy.brief(2, client), strategy.deliver(client)):
            assert not brief.adapters
            assert "send" not in [step.WhichOneof("kind") for step in brief.steps]
    dispatch = dispatch_of(strategy, "ada")
    assert ARRAY_RECORD not in dispatch.content
    assert not dispatch.tensor_bytes
    assert not dispatch.expected


def test_a_client_trains_its_own_slot_round_after_round_from_the_common_start() -> None:
    strategy = local()
    node = FakeNode("ada", LAYOUT, slots={"local": Adapter.zeros(LAYOUT)})  # left over from somewhere
    expected = Adapter.initial(LAYOUT, 11)
    for round_ in (1, 2, 3):
        dispatch = dispatch_of(strategy, "ada", round_)
        node.run(dispatch.plan, {})
        expected = drift("ada", round_, expected)
        assert torch.equal(node.slots["local"].vector, expected.vector)
    assert strategy.settle(3) == {}
    client = strategy.clients["ada"]
    plan = dispatch_of(strategy, "ada").plan
    del plan.steps[:]
    plan.steps.extend(strategy.deliver(client).steps)
    plan.round = 4
    report, uploads = node.run(plan, {})
    assert not uploads
    assert node.saved is not None
    assert torch.equal(node.saved.vector, expected.vector)
    assert report.results[-1].evaluate.label == "personal"


def test_a_client_that_missed_everything_is_delivered_the_common_start() -> None:
    strategy = local()
    node = FakeNode("ben", LAYOUT)
    plan = dispatch_of(strategy, "ben").plan
    del plan.steps[:]
    plan.steps.extend(strategy.deliver(strategy.clients["ben"]).steps)
    node.run(plan, {})
    assert node.saved is not None
    assert torch.equal(node.saved.vector, Adapter.initial(LAYOUT, 11).vector)


def test_a_client_whose_first_round_comes_late_starts_from_the_common_start() -> None:
    node = FakeNode("ben", LAYOUT)
    node.run(dispatch_of(local(), "ben", 3).plan, {})
    assert torch.equal(node.slots["local"].vector, drift("ben", 3, Adapter.initial(LAYOUT, 11)).vector)


def test_there_is_no_state() -> None:
    strategy = local()
    state = strategy.state()
    assert not state.tensors
    assert not state.values
    strategy.load_state(state)
