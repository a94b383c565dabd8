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
from flwr.app import ArrayRecord, Error, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from google.protobuf.message import Message as ProtoMessage
from safetensors.torch import load, save

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.wire.flower_records import ARRAY_RECORD, PLAN_TYPE, REGISTER_TYPE, pack, unpack
from proto.fedalloy.v1 import adapter_pb2, plan_pb2, report_pb2
from strategies import STRATEGIES, AlloyStrategy
from strategies.algorithms.fedavg import FedAvgOptions
from strategies.algorithms.fedmerge import FedMergeOptions
from strategies.algorithms.potara_options import PotaraOptions
from strategies.framework.answers import CLIENT_ID
from strategies.framework.exchange import State, StrategyError
from strategies.framework.steps import Training
from tests.strategies.conftest import (
    FakeGrid,
    FakeNode,
    client_of,
    drift,
    error_from_the_superlink,
    layout_of,
    play,
)
from tests.strategies.fleet import play_round

LAYOUT = layout_of()
NAMES = ("ada", "ben", "cyd")
BUILDS: dict[str, Callable[..., AlloyStrategy]] = {
    "local": lambda **k: STRATEGIES["local"](**k),
    "fedavg": lambda **k: STRATEGIES["fedavg"](**k),
    "fedavg-delta": lambda **k: STRATEGIES["fedavg"](FedAvgOptions("delta"), **k),
    **{
        f"fedmerge-{variant}": lambda variant=variant, **k: STRATEGIES["fedmerge"](
            FedMergeOptions(models=3, variant=variant, init="jitter", lr_w=0.05), **k
        )
        for variant in ("frozen-a", "trained-a", "factors")
    },
    "fedmerge-cluster": lambda **k: STRATEGIES["fedmerge"](
        FedMergeOptions(models=2, init="cluster", w_step="adam"), **k
    ),
    **{
        f"potara-{label}": lambda options=options, **k: STRATEGIES["potara"](
            PotaraOptions(federated_rounds=1, **options), **k
        )
        for label, options in {
            "default": {},
            "plugin": {"weight": "plugin"},
            "server": {"weight": "random-effects", "merge_at": "server", "granularity": "module", "space": "factor"},
            "parameter": {"weight": "client-fisher", "granularity": "parameter", "space": "factor"},
            "search": {"weight": "line-search", "search_points": 3, "space": "delta-truncated"},
        }.items()
    },
}
BUILDS["tap"] = lambda **k: STRATEGIES["tap"](**k)
BUILDS["fedmosaic"] = lambda **k: STRATEGIES["fedmosaic"](**k)
# What their clients do is not one adapter moved and sent back: these are played by the nodes themselves.
RIVALS = sorted(set(STRATEGIES) - {"local", "fedavg", "fedmerge", "potara", "fedmosaic", "tap"})
BUILDS |= {name: lambda name=name, **k: STRATEGIES[name](**k) for name in RIVALS}
# Their factors may turn, and these clients measure factors.
DELTAS = {"fedavg-delta", "flora", "flexlora", "fedex-lora", "nan", "task-arithmetic", "ties", "dare", "regmean"}
ANY_RANK = {"local", "local-all", "local-twice", "flora", "flexlora"}
every_strategy = pytest.mark.parametrize("name", BUILDS)


def nodes(layout: Any = LAYOUT) -> list[FakeNode]:
    return [FakeNode(name, layout, examples=10 + 5 * index) for index, name in enumerate(NAMES)]


def enrolled(name: str, **options: Any) -> AlloyStrategy:
    strategy = BUILDS[name](seed=7, **options)
    for index, client in enumerate(NAMES):
        strategy.enrol(client_of(client, LAYOUT, 10 + 5 * index, node_id=index + 1))
    return strategy


def accuracies(strategy: AlloyStrategy, grid: FakeGrid, rounds: int = 2) -> list[MetricRecord]:
    found = strategy.start(grid, initial_arrays=ArrayRecord(), num_rounds=rounds).evaluate_metrics_clientapp
    assert list(found) == list(range(1, rounds + 1))
    return list(found.values())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of the strategies."""
    lines: list[str] = []
    keep: Callable[..., None] = lambda level, text, *args: lines.append(text % args) if level >= 30 else None  # noqa: E731
    monkeypatch.setattr("strategies.framework.flower.log", keep)
    return lines


def test_every_strategy_is_covered_here() -> None:
    assert {type(build()) for build in BUILDS.values()} == set(STRATEGIES.values())
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())


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
    if not name.startswith("fedmerge"):  # there a client that is silent still shows: its row exists
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
ALGORITHMS.remove("local")  # the name of a slot: whose it is, not what it is for


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
    assert set(done.values()) == {13}


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
