"""What a second reader found: each of these ended a run, or kept a client out of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message

from client_app.guard.policy import Policy, PolicyError
from client_app.plan.interpreter import Interpreter
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.wire.codec import encode
from fedalloy_adapters.wire.flower_records import PLAN_TYPE, REGISTER_TYPE, RecordError, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.clients import client_status
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from server_app.tools.cluster.link_check import LinkError, check_key, check_link
from strategies.algorithms.regmean import transports
from tests.faults.hostile.test_limits import NoTouch
from tests.faults.nodes import Misbehave, NodeGrid, nodes, run_nodes, statuses
from tests.faults.reports import LAYOUT, Answer, measured
from tests.strategies.conftest import FakeNode, error_from_the_superlink, layout_of


def boasting(seconds: float, accuracy: float | None = None) -> Misbehave:
    """Says that it trained so long and, where that is given, is so good."""

    def boast(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        answer = Answer.of(message, honest, None)
        for result in answer.report.results:
            if result.HasField("train"):
                result.train.seconds = seconds
            elif result.HasField("evaluate") and accuracy is not None:
                result.evaluate.metrics["accuracy"] = accuracy
        return [answer.reply()]

    return boast


class Unreadable(NodeGrid):
    """Node 3's plans are answered with objects that Flower cannot read: it raises, and what it pulled is lost."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        names = list(super().push_messages(messages))
        self.sent |= dict(zip(names, messages, strict=True))
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        names = list(message_ids)
        known = {name: self.waiting.pop(name, None) for name in names}
        for name in names:
            metadata = self.sent[name].metadata
            if known[name] is not None and (metadata.dst_node_id, metadata.message_type) == (3, PLAN_TYPE):
                raise IndexError("list index out of range")
        return [
            reply
            for name, replies in known.items()
            for reply in (replies or [error_from_the_superlink(self.sent[name], "Message Unavailable", 3)])
        ]


def test_an_answer_that_flower_cannot_read_costs_nobody_else_anything(tmp_path: Path) -> None:
    directory = run_nodes(tmp_path, Unreadable(nodes()), round_timeout=60.0)
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "failed"}] * 2
    reason = next(r for r in directory.rounds() if r["phase"] == "train")["clients"]["cyd"]["reason"]
    assert reason == "the answer cannot be read (IndexError)"


def test_two_messages_that_the_superlink_does_not_take_are_two_clients_that_left(tmp_path: Path) -> None:
    class Leaving(NodeGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            (message,) = messages
            gone = message.metadata.message_type == PLAN_TYPE and message.metadata.dst_node_id in (3, 4)
            return [""] if gone else super().push_messages([message])

    directory = run_nodes(tmp_path, Leaving(nodes("ada", "ben", "cyd", "dan")), num_server_rounds=1)
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "left", "dan": "left"}]


def test_finite_numbers_whose_sum_is_not_end_no_run(tmp_path: Path) -> None:
    boast = boasting(seconds=1.7e308, accuracy=1.7e308)
    directory = run_nodes(tmp_path, NodeGrid(nodes("ada", "ben", "cyd", "dan"), {3: boast, 4: boast}))
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "rejected", "dan": "rejected"}] * 2
    assert (directory.path / "summary.json").exists()


def test_seconds_that_a_client_says_it_trained_are_no_more_than_it_took(tmp_path: Path) -> None:
    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: boasting(seconds=1e50)}))
    found = directory.newest_checkpoint()
    assert found is not None
    assert found.run["spent"]["train"] < 60


def test_a_report_has_an_end() -> None:
    metrics = report_pb2.Report(version=1, run_name="x" * (16 * 2**20))
    with pytest.raises(RecordError, match="'report' has 16777223 bytes, expected at most 16777216"):
        unpack(pack("report", metrics), "report", report_pb2.Report)


def test_more_metrics_than_any_task_has_are_not_written_down(tmp_path: Path) -> None:
    def chatter(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        return [measured(Answer.of(message, honest, None), [f"metric-{number}" for number in range(20_000)])]

    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: chatter}))
    assert [round_["cyd"] for round_ in statuses(directory)] == ["rejected"] * 2
    assert (directory.path / "rounds.jsonl").stat().st_size < 20_000


def test_an_error_is_one_line_of_the_log() -> None:
    asked = Message(pack("plan", plan_pb2.Plan(version=1)), dst_node_id=1, message_type=PLAN_TYPE)
    record = client_status.of_error(Message(Error(2, "no\n\x1b[2JINFO fine" + "x" * 10**5), reply_to=asked))
    assert record["reason"].startswith("no  [2JINFO fine")
    assert record["reason"].isprintable()
    assert len(record["reason"]) <= 400
    assert client_status.of_error(Message(Error(2), reply_to=asked))["reason"] == "it gave no reason (Flower's error 2)"


def test_who_is_refused_does_not_keep_the_id_from_its_owner(tmp_path: Path) -> None:
    grid = NodeGrid(nodes() | {9: FakeNode("cyd", layout_of(rank=2))})
    grid.online, grid.keys = {1, 2, 9}, {number: f"key {number}".encode() for number in (1, 2, 3, 9)}
    grid.at[4] = lambda grid: grid.online.add(3)
    directory = run_nodes(tmp_path, grid, num_server_rounds=4)
    assert statuses(directory)[-1]["cyd"] == "ok"


def test_one_upload_beyond_fp16_does_not_end_a_run_whose_downlink_is_fp16(tmp_path: Path) -> None:
    def giant(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        if plan.round > 2:
            return [honest]
        answer = Answer.of(message, honest, None)
        answer.blobs = {slot: encode(Adapter(LAYOUT, torch.full((LAYOUT.size,), 1e8))).blob for slot in answer.blobs}
        return [answer.reply()]

    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: giant}), downlink_encoding="fp16")
    assert len(statuses(directory)) == 2
    assert statuses(directory, "deliver") == [{"ada": "ok", "ben": "ok", "cyd": "ok"}]


def test_who_is_slow_to_say_who_it_is_takes_part_later(tmp_path: Path) -> None:
    class Slow(NodeGrid):
        def replies(self, message: Message) -> list[Message]:
            found = super().replies(message)
            if (message.metadata.dst_node_id, message.metadata.message_type) != (3, REGISTER_TYPE):
                return found
            name = message.metadata.message_id
            self.at[self.looks + 3] = lambda grid: grid.waiting.update({name: found})
            return []

    directory = run_nodes(tmp_path, Slow(nodes()), num_server_rounds=4)
    assert directory.rounds()[0]["clients"]["node 3"]["reason"] == "did not answer in time"
    assert statuses(directory)[-1]["cyd"] == "ok"


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew_unasked(tmp_path: Path) -> None:
    run = run_nodes(tmp_path, NodeGrid(nodes())).path
    (run / "summary.json").unlink()
    for path in run.glob("checkpoints/*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = (run / "rounds.jsonl").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"no checkpoint in .* is whole"):
        run_nodes(tmp_path, NodeGrid(nodes()), resume=str(run))
    assert (run / "rounds.jsonl").read_bytes() == before
    assert RunDirectory(run).newest_checkpoint() is None


def test_who_may_not_train_may_not_distill() -> None:
    plan = plan_pb2.Plan(version=1, client_id="ada", round=1, steps=[
        plan_pb2.Step(distill={"train": {"slots": ["local"]}}),
    ])  # fmt: skip
    nothing: Any = NoTouch()
    interpreter = Interpreter("ada", nothing, nothing, nothing, policy=Policy("distill,evaluate"))
    plan.steps[0].distill.teacher.terms.add(slot="global", scalar=1.0)
    with pytest.raises(PolicyError, match=r"refuses step 0 \(distill\).* has distill, evaluate, and not train"):
        interpreter.run(plan, {})


def test_second_moments_that_are_none_still_give_a_merge() -> None:
    odd = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, -2.0]], dtype=torch.float64)
    (found,) = transports([odd], [1.0])
    assert bool(found.isfinite().all())


def test_check_names_a_port_that_is_none_and_a_key_with_a_passphrase(tmp_path: Path) -> None:
    for address in ("localhost:99999", "localhost:\N{SUPERSCRIPT TWO}", "localhost:0"):
        with pytest.raises(LinkError, match="expected HOST:PORT"):
            check_link(address, None)
    key, locked = tmp_path / "key", serialization.BestAvailableEncryption(b"secret")
    private = ec.generate_private_key(ec.SECP384R1())
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    key.chmod(0o600)
    with pytest.raises(LinkError, match="protected by a passphrase"):
        check_key(key)


def test_a_client_that_lost_its_disk_does_not_train_the_other_factor_from_the_seed(tmp_path: Path) -> None:
    """RoLoRA sends those that took part in the round before half of the adapter only."""
    found = nodes()

    def lose(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        if plan.round == 2:
            found[3].slots.clear()
        return [honest]

    directory = run_nodes(tmp_path, NodeGrid(found, {3: lose}), strategy="rolora", num_server_rounds=4)
    assert [round_["cyd"] for round_ in statuses(directory)] == ["ok", "ok", "rejected", "ok"]
    reason = [r for r in directory.rounds() if r["phase"] == "train"][2]["clients"]["cyd"]["reason"]
    assert reason == "client 'cyd' lost its slots; it is sent everything in the next round"
