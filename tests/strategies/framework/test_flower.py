"""Every strategy as a stock Flower Strategy, over a grid of nodes that answer in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from flwr.serverapp.strategy import Strategy

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import squared_distances
from fedalloy_adapters.wire.flower_records import ARRAY_RECORD, PLAN_TYPE, REGISTER_TYPE, pack, unpack
from proto.fedalloy.v1 import adapter_pb2, plan_pb2, report_pb2
from strategies import STRATEGIES
from strategies.framework.answers import CLIENT_ID
from strategies.framework.exchange import StrategyError
from strategies.framework.steps import Training
from tests.strategies.conftest import (
    FakeGrid,
    FakeNode,
    drift,
    error_from_the_superlink,
    layout_of,
)
from tests.strategies.framework.builds import (
    BUILDS,
    DELTAS,
    LAYOUT,
    NAMES,
    RIVALS,
    accuracies,
    enrolled,
    every_strategy,
    nodes,
)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of the strategies."""
    lines: list[str] = []
    keep: Callable[..., None] = lambda level, text, *args: lines.append(text % args) if level >= 30 else None  # noqa: E731
    monkeypatch.setattr("strategies.framework.flower.log", keep)
    return lines


# ---------------------------------------------------------------------------------------------------- Flower's Strategy


@every_strategy
def test_flower_can_run_it_and_clients_get_better(name: str, log: list[str]) -> None:
    strategy, found = BUILDS[name](seed=7), nodes()
    assert isinstance(strategy, Strategy)
    first, second = accuracies(strategy, FakeGrid(found))
    delivered = [node.metrics(node.saved)["accuracy"] for node in found if node.saved is not None]
    assert len(delivered) == 3
    assert second["mean-accuracy"] == pytest.approx(sum(delivered) / 3)
    assert second["worst-accuracy"] == pytest.approx(min(delivered))
    start = [node.metrics(Adapter.initial(LAYOUT, 7))["accuracy"] for node in found]
    if name not in DELTAS:
        assert sum(start) / 3 < float(first["mean-accuracy"]) < float(second["mean-accuracy"])  # type: ignore[arg-type]
    assert log == []


@every_strategy
def test_clients_see_every_round_once_in_a_run_of_its_own(name: str) -> None:
    found = nodes()
    for build in range(2):  # the same clients serve two runs
        strategy = BUILDS[name](seed=7)
        for node in found:
            node.slots, node.before, node.last_round = {}, {}, 0
        accuracies(strategy, FakeGrid(found))
        for node in found:
            assert [plan.round for plan in node.plans[4 * build :]] == [1, 2, 3, 4]
            assert len(node.runs) == build + 1
            assert all(CLIENT_ID.fullmatch(run) for run in node.runs)


def test_clients_are_enrolled_by_id_and_not_by_node() -> None:
    first, second = STRATEGIES["fedmerge"](seed=7), STRATEGIES["fedmerge"](seed=7)
    accuracies(first, FakeGrid(nodes()))
    accuracies(second, FakeGrid(nodes()[::-1]))
    assert list(second.clients) == list(NAMES)
    for key, tensor in first.state().tensors.items():
        assert torch.equal(tensor, second.state().tensors[key])


def test_what_flower_runs_is_the_average_computed_by_hand() -> None:
    strategy, found = STRATEGIES["fedavg"](seed=7), nodes()
    accuracies(strategy, FakeGrid(found))
    model = Adapter.initial(LAYOUT, 7)
    for round_ in (1, 3):
        total = sum(node.examples for node in found)
        moved = [(node.examples / total) * drift(node.name, round_, model).vector.double() for node in found]
        model = Adapter(LAYOUT, torch.stack(moved).sum(dim=0).float())
    for node in found:
        assert node.saved is not None
        torch.testing.assert_close(node.saved.vector, model.vector, rtol=0, atol=1e-6)


def test_local_training_goes_on_where_it_was() -> None:
    found = nodes()
    accuracies(STRATEGIES["local"](seed=7), FakeGrid(found), rounds=3)
    for node in found:
        model = Adapter.initial(LAYOUT, 7)
        for round_ in (1, 3, 5):
            model = drift(node.name, round_, model)
        assert node.saved is not None
        assert torch.equal(node.saved.vector, model.vector)


@every_strategy
def test_lossy_transport_both_ways(name: str, log: list[str]) -> None:
    strategy = BUILDS[name](seed=7, training=Training(uplink_encoding="int8", downlink_encoding="bf16"))
    exact = accuracies(BUILDS[name](seed=7), FakeGrid(nodes()))[-1]["mean-accuracy"]
    sent: set[int] = set()

    def listen(message: Message, reply: Message) -> Message:
        for array in message.content.array_records.get(ARRAY_RECORD, ArrayRecord()).values():
            length = int.from_bytes(array.data[8:12], "little")
            sent.add(adapter_pb2.AdapterHeader.FromString(array.data[12 : 12 + length]).encoding)
        return reply

    lossy = accuracies(strategy, FakeGrid(nodes(), listen))[-1]["mean-accuracy"]
    if name not in DELTAS:
        assert lossy == pytest.approx(exact, rel=0.05)
    assert sent == (set() if name in ("local", "local-all", "local-twice") else {adapter_pb2.ENCODING_BF16})
    assert log == []


def push(name: str, round_: int, adapter: Adapter) -> Adapter:
    """A training step of one size in every number, below what ``int8`` tells apart in a whole adapter."""
    signs = torch.randn(adapter.layout.size, generator=torch.Generator().manual_seed(1)).sign()
    return Adapter(adapter.layout, adapter.vector + 1e-3 * signs)


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "flexlora"])
def test_small_steps_are_not_lost_in_eight_bits(name: str) -> None:
    """Without flexlora: an SVD's factors turn when a number changes by a millionth, and a push of factors with them."""

    def after(encoding: str) -> list[Adapter]:
        found = [replace(node, move=push) for node in nodes()]
        training = Training(uplink_encoding=encoding, downlink_encoding=encoding)
        accuracies(BUILDS[name](seed=7, training=training), FakeGrid(found), rounds=16)
        return [node.saved for node in found if node.saved is not None]

    def apart(first: Adapter, second: Adapter) -> float:  # products, where factors are not unique
        if name in DELTAS:
            return sum(squared_distances(first, second).values())
        return float((first.vector - second.vector).square().sum())

    exact, start = after("fp32"), Adapter.initial(LAYOUT, 7)
    error = sum(map(apart, after("int8"), exact))
    assert error < 0.25 * sum(apart(model, start) for model in exact)


KINDS = ("silence", "client-error", "superlink-error", "garbage")
FAILURES = [(name, kind) for name in BUILDS for kind in (KINDS[:1] if name in RIVALS else KINDS)]


@pytest.mark.parametrize(("name", "kind"), FAILURES)
def test_a_client_that_fails_is_named_and_left_out(name: str, kind: str, log: list[str]) -> None:
    def tamper(message: Message, reply: Message) -> Message | None:
        if message.metadata.message_type != PLAN_TYPE or message.metadata.dst_node_id != 2:
            return reply
        match kind:
            case "client-error":
                return Message(Error(2, "boom"), reply_to=message)
            case "superlink-error":
                return error_from_the_superlink(message)
            case "silence":
                return None
        report, blobs = unpack(reply.content, "report", report_pb2.Report)
        report.run_name = "another"
        return Message(pack("report", report, blobs), reply_to=message)

    strategy = BUILDS[name](seed=7)
    last = accuracies(strategy, FakeGrid(nodes(), tamper))[-1]
    assert 0 < float(last["worst-accuracy"]) <= float(last["mean-accuracy"]) < 1  # type: ignore[arg-type]
    assert len(log) == 4  # two rounds, two deliveries
    expected = {
        "client-error": "client 'ben' failed (Flower error 2): boom",
        "superlink-error": "client 'ben' failed (Flower error 5): Node Unavailable",
        "silence": "client 'ben' did not answer in time",
        "garbage": "client 'ben' answered for run_name 'another', expected",
    }
    assert all(expected[kind] in line for line in log)
    alone = BUILDS[name](seed=7)
    found = [node for node in nodes() if node.name != "ben"]
    if not name.startswith("fedmerge"):  # there, a silent client still shows: it has a row
        assert accuracies(alone, FakeGrid(found))[-1] == last


def test_replies_that_nobody_asked_for_are_ignored(log: list[str]) -> None:
    strategy = enrolled("fedavg")
    stranger = Message(
        Error(2, "boom"), reply_to=Message(pack("plan", plan_pb2.Plan()), dst_node_id=9, message_type=PLAN_TYPE)
    )
    stranger.metadata.__dict__["_reply_to_message_id"] = "message-99"
    strategy.configure_train(1, ArrayRecord(), None, FakeGrid([]))  # type: ignore[arg-type]
    strategy.aggregate_train(1, [stranger])
    assert all("boom" not in line for line in log)


def test_metrics_without_accuracy_give_no_mean() -> None:
    found = nodes()
    for node in found:
        node.metrics = lambda model: {"loss": 1.0}  # type: ignore[method-assign]
    result = STRATEGIES["fedavg"]().start(FakeGrid(found), initial_arrays=ArrayRecord(), num_rounds=1)
    assert result.evaluate_metrics_clientapp == {}


def test_nodes_that_cannot_take_part_are_named_and_left_out(log: list[str]) -> None:
    found = [
        *nodes(),
        FakeNode("../etc", LAYOUT),
        FakeNode("ben", LAYOUT),  # node 5 claims what node 2 holds
        FakeNode("dan", layout_of(rank=16)),
        FakeNode("eve", layout_of(base="another-model")),
        FakeNode("fay", LAYOUT, examples=0),
        FakeNode("gus", LAYOUT),
        FakeNode("hal", LAYOUT),
    ]

    def tamper(message: Message, reply: Message) -> Message | None:
        if message.metadata.message_type == REGISTER_TYPE and message.metadata.dst_node_id == 9:
            return error_from_the_superlink(message)
        return None if message.metadata.dst_node_id == 10 else reply

    strategy = STRATEGIES["fedmerge"](seed=7)
    accuracies(strategy, FakeGrid(found, tamper), rounds=1)
    assert list(strategy.clients) == ["ada", "ben", "cyd"]
    assert strategy.clients["ben"].node_id == 2
    assert len(log) == 7
    for line in (
        "refused: node 4 sent a registration that is not valid: client id '../etc'",
        "refused: node 5 claims client-id 'ben', which node 2 holds already",
        "refused: client 'dan' has rank 16 for 'q_proj', expected 4 (as client 'ada' has)",
        "refused: client 'eve' has base model another-mode, expected base-model (fingerprints of the frozen model) (as",
        "refused: client 'fay' has 0 training examples, expected at least 1",
        "refused: node 9 failed (Flower error 5): Node Unavailable",
        "refused: node 10 did not answer",
    ):
        assert any(found.startswith(line) for found in log), (line, log)


def test_without_any_client_there_is_no_run(log: list[str]) -> None:
    for grid in (FakeGrid([]), FakeGrid([FakeNode("-", LAYOUT)])):
        with pytest.raises(StrategyError, match="no client registered"):
            STRATEGIES["fedavg"]().start(grid, initial_arrays=ArrayRecord(), num_rounds=1)


def test_the_summary_shows_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("strategies.framework.flower.log", lambda level, text, *args: lines.append(text % args))
    BUILDS["fedmerge-factors"]().summary()
    assert len(lines) == 1
    assert "'fedmerge'" in lines[0]
    assert "variant='factors'" in lines[0]
