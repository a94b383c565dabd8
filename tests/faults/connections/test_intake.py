"""Replies under Flower's own grid: none grows beyond what was asked for, and no upload holds the others up."""

from __future__ import annotations

import hashlib
import inspect
import tracemalloc
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.superlink.grid import HttpGrid

from fedalloy_adapters.wire.flower_records import ARRAY_RECORD, ARRAY_STYPE, PLAN_TYPE, pack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.messages.replies import REFUSED, Intake
from server_app.run.run_directory import RunDirectory
from strategies.framework.dispatch import register_message
from tests.faults.link import Forgetful, Link, Repeating, grid_over, over_http
from tests.faults.nodes import Misbehave, NodeGrid, nodes, run_nodes, statuses
from tests.faults.reports import Answer

BOUND = 96 * 2**20


def run_over(runs: Path, grid: HttpGrid, **config: Any) -> RunDirectory:
    return run_nodes(runs, grid, **config)  # type: ignore[arg-type]


def error_500() -> httpx.HTTPStatusError:
    asked = httpx.Request("POST", "http://superlink")
    return httpx.HTTPStatusError("error 500", request=asked, response=httpx.Response(500, request=asked))


def reasons(directory: RunDirectory, client: str = "cyd") -> list[str]:
    return [r["clients"][client].get("reason", "") for r in directory.rounds() if r["phase"] == "train"]


def sending(array: Array) -> Misbehave:
    """An honest answer, with this in the place of its numbers."""

    def answers(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        answer = Answer.of(message, honest, None)
        records = pack("report", answer.report, answer.blobs)
        records.array_records[ARRAY_RECORD][answer.slot] = array
        return [Message(records, reply_to=message)]

    return answers


def is_upload(node: int, answer: Message) -> bool:
    return node == 3 and answer.metadata.message_type == PLAN_TYPE


def test_a_run_over_flowers_own_grid_is_that_over_whole_messages(tmp_path: Path) -> None:
    grid, link = grid_over(nodes())
    found = run_over(tmp_path, grid, run_name="link").newest_checkpoint()
    whole = run_nodes(tmp_path, NodeGrid(nodes()), run_name="whole").newest_checkpoint()
    assert found is not None
    assert whole is not None
    assert all(bool((found.state.tensors[name] == tensor).all()) for name, tensor in whole.state.tensors.items())
    assert len(link.confirmed) == 3 + 2 * 3 + 3  # who they are, two rounds, the delivery


def test_an_array_that_names_a_chunk_many_times_is_refused_before_it_is_put_together(tmp_path: Path) -> None:
    grid, link = grid_over(nodes(), {3: sending(Repeating(512, bytes(2**20), ARRAY_STYPE))})
    tracemalloc.start()
    directory = run_over(tmp_path, grid)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BOUND
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "rejected"}] * 2
    assert reasons(directory)[0].startswith("the answer becomes 5368")
    assert len(link.confirmed) == 3 + 2 * 3 + 3  # the SuperLink keeps nothing of it


def test_an_answer_that_is_simply_too_long_is_refused_before_all_of_it_is_pulled(tmp_path: Path) -> None:
    def long(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        answer = Answer.of(message, honest, None)
        records = pack("report", answer.report, answer.blobs)
        data = bytes(2**20) + bytes(str(plan.round), "ascii")
        arrays = {f"{i}": Array("uint8", (len(data) + 1,), ARRAY_STYPE, data + bytes([i])) for i in range(64)}
        records.array_records[ARRAY_RECORD].update(arrays)
        return [Message(records, reply_to=message)]

    directory = run_over(tmp_path, grid_over(nodes(), {3: long})[0])
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "rejected"}] * 2
    assert "the answer has more than" in reasons(directory)[0]


def test_a_list_of_chunks_that_is_larger_than_they_are_is_not_even_read(tmp_path: Path) -> None:
    directory = run_over(tmp_path, grid_over(nodes(), {3: sending(Repeating(10**6, b"", ARRAY_STYPE))})[0])
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "rejected"}] * 2
    assert reasons(directory)[0] == "the answer describes itself in more than 1048576 bytes"


def test_an_upload_that_never_ends_is_late_and_the_others_count(tmp_path: Path) -> None:
    looks: dict[str, int] = {}

    def endless(node: int, answer: Message, name: str) -> bool | None:
        if not (is_upload(node, answer) and name == answer.metadata.message_id):
            return True
        looks[name] = looks.get(name, 0) + 1
        return None if looks[name] > 15 else False

    directory = run_over(tmp_path, grid_over(nodes(), visible=endless)[0], round_timeout=1.0)
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "late"}] * 2
    assert len(looks) >= 2


def test_an_upload_that_is_slow_counts_when_it_has_ended(tmp_path: Path) -> None:
    looks: dict[str, int] = {}

    def slow(node: int, answer: Message, name: str) -> bool:
        looks[name] = looks.get(name, 0) + 1
        return not is_upload(node, answer) or looks[name] > 2

    directory = run_over(tmp_path, grid_over(nodes(), visible=slow)[0], round_timeout=60.0, num_server_rounds=1)
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "ok"}]
    assert "attempts" not in directory.rounds()[1]["clients"]["cyd"]


def test_an_upload_that_the_superlink_gave_up_is_asked_for_again(tmp_path: Path) -> None:
    lost: list[str] = []

    def once(node: int, answer: Message, name: str) -> bool | None:
        if is_upload(node, answer) and not lost:
            lost.append(name)
            return None
        return True

    directory = run_over(tmp_path, grid_over(nodes(), visible=once)[0], round_timeout=60.0, num_server_rounds=1)
    assert directory.rounds()[1]["clients"]["cyd"]["status"] == "ok"
    assert directory.rounds()[1]["clients"]["cyd"]["attempts"] == 2


def says_for_cyd(link: Link, change: Any) -> None:
    link.says = lambda answer: change(answer) if is_upload(answer.metadata.src_node_id, answer) else answer


def test_whose_answer_it_is_says_the_superlink_and_not_the_answer(tmp_path: Path) -> None:
    """What the client wrote into its message says that it answers what ada was asked."""
    asked: dict[int, str] = {}

    def remember(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        asked[plan.round] = message.metadata.message_id
        return [honest]

    def forged(answer: Message) -> Message:
        report = report_pb2.Report.FromString(answer.content.config_records["fedalloy"]["report"])  # type: ignore[arg-type]
        says = make_message(answer.metadata, answer.content)
        # Messages are on their way side by side: cyd may answer before ada is asked, and then lies in another way.
        claimed = asked.get(report.round, "what nobody was asked")
        metadata = dict(vars(answer.metadata)) | {"_reply_to_message_id": claimed}
        says.__dict__["_metadata"] = type(answer.metadata).__new__(type(answer.metadata))
        says.metadata.__dict__.update(metadata)
        return says

    grid, link = grid_over(nodes(), {1: remember})
    says_for_cyd(link, forged)
    directory = run_over(tmp_path, grid)
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "ok"}] * 2
    assert not any(record.get("late_answers") for record in directory.rounds())


def test_a_message_whose_content_is_none_ends_no_run(tmp_path: Path) -> None:
    def nested(answer: Message) -> Message:
        says = make_message(answer.metadata, RecordDict())
        says.__dict__["_content"] = make_message(answer.metadata, RecordDict())
        return says

    grid, link = grid_over(nodes())
    says_for_cyd(link, nested)
    directory = run_over(tmp_path, grid)
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "failed"}] * 2
    assert reasons(directory)[0] == "the answer cannot be read (MessageInitializationError)"


def test_an_answer_that_the_superlink_itself_cannot_read_ends_no_run(tmp_path: Path) -> None:
    """It says so for all that are pulled with it, and has forgotten them when they are pulled alone."""

    class Failing(Forgetful):
        def PullMessages(self, request: Any) -> Any:
            found = super().PullMessages(request)
            if any(is_upload(m.metadata.src_node_id, m) for m in found.messages_list):
                raise error_500()
            return found

    grid, link = grid_over(nodes())
    grid._client = Failing(link.nodes)  # type: ignore[assignment]
    directory = run_over(tmp_path, grid, round_timeout=60.0)
    assert [set(round_.items()) for round_ in statuses(directory)] == [
        {("ada", "ok"), ("ben", "ok"), ("cyd", "failed")}
    ] * 2


def test_one_object_of_any_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    grid, link = grid_over(nodes(), {3: sending(Repeating(1, bytes(2**25), ARRAY_STYPE))})
    read = over_http(grid, link)
    directory = run_over(tmp_path, grid)
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "rejected"}] * 2
    assert reasons(directory)[0].startswith("the answer has a part of 335544")
    assert max(read) < 2**25  # the others, and of the large one nothing


def test_an_error_of_any_length_is_not_read_and_costs_the_others_one_attempt(tmp_path: Path) -> None:
    def wordy(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        return [Message(Error(0, "x" * 2**25), reply_to=message)]

    grid, link = grid_over(nodes(), {3: wordy})
    read = over_http(grid, Forgetful(link.nodes))
    directory = run_over(tmp_path, grid, round_timeout=60.0)
    assert [set(round_.items()) for round_ in statuses(directory)] == [
        {("ada", "ok"), ("ben", "ok"), ("cyd", "failed")}
    ] * 2
    assert reasons(directory)[0] == "the answer cannot be read (TooLargeError)"
    assert max(read) < 2**25


def test_many_reports_in_one_answer_are_bounded_together() -> None:
    grid, link = grid_over(nodes())
    records = {f"{i}": ConfigRecord({"report": bytes(2**23) + bytes([i])}) for i in range(3)}
    link.says = lambda answer: make_message(answer.metadata, RecordDict(records))
    intake = Intake(grid, print)
    intake.expect(2**26)
    (reply,) = intake.pull(list(grid.push_messages([register_message(3, 60.0)])))
    assert (
        reply.error.reason
        == f"the answer has a report of {sum(map(written, records.values()))} bytes, expected at most 16777216"
    )


def written(record: ConfigRecord) -> int:
    return len(record.deflate())


def test_an_answer_of_many_parts_does_not_keep_the_others_waiting() -> None:
    grid, link = grid_over(nodes())
    arrays = {f"{i}": Array("uint8", (2,), ARRAY_STYPE, i.to_bytes(2, "big")) for i in range(300)}
    many = RecordDict({ARRAY_RECORD: ArrayRecord(arrays)})
    link.says = lambda answer: make_message(answer.metadata, many) if answer.metadata.src_node_id == 1 else answer
    names = [name for node in (1, 2, 3) for name in grid.push_messages([register_message(node, 60.0)])]
    intake = Intake(grid, print)
    turns = [[reply.metadata.src_node_id for reply in intake.pull(names)] for _ in range(7)]
    assert turns == [[2, 3], [], [], [], [], [], [1]]  # 603 objects, 100 a turn


def test_of_each_node_one_upload_may_be_unfinished() -> None:
    """Else what a node begins in every round and never ends would be kept for as long as the run lasts."""
    grid, link = grid_over(nodes(), visible=lambda node, answer, name: name == answer.metadata.message_id)
    intake = Intake(grid, print)

    def ask(node: int) -> list[str]:
        return list(grid.push_messages([register_message(node, 60.0)]))

    old, other = ask(3), ask(2)
    assert list(intake.pull(old + other)) == []
    new = ask(3)
    given_up = list(intake.pull(new + old + other))
    assert [reply.metadata.reply_to_message_id for reply in given_up] == old
    assert given_up[0].error.code == REFUSED
    assert link.confirmed == [given_up[0].metadata.message_id]
    late = [name for _ in range(5) for name in ask(3)]
    assert {reply.metadata.reply_to_message_id for reply in intake.pull(new + other + late)} == set(late)


def test_a_superlink_that_cannot_forget_a_message_ends_no_run(tmp_path: Path) -> None:
    class Stubborn(Link):
        def ConfirmMessageReceived(self, request: Any) -> Any:
            raise error_500()

    grid, link = grid_over(nodes())
    grid._client = Stubborn(link.nodes)  # type: ignore[assignment]
    assert statuses(run_over(tmp_path, grid)) == [{"ada": "ok", "ben": "ok", "cyd": "ok"}] * 2


def test_this_is_the_flower_that_the_intake_was_written_for() -> None:
    """Where this fails: read both functions again, compare run/replies.py with them, then note the new ones."""
    assert version("flwr").startswith("1.39.")
    source = inspect.getsource(HttpGrid.pull_messages) + inspect.getsource(Array.inflate)
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == "59d401f4d31b7e65"
