"""Clients come late, leave, return, never answer, answer twice or for another round: each outcome has a name."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import httpx
import pytest
import torch
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedalloy_adapters.wire.flower_records import PLAN_TYPE, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.clients import client_status
from server_app.run.federation import PAUSES, NotEnoughClientsError
from server_app.run.options import RunOptions
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from tests.faults.nodes import NodeGrid, nodes, run_nodes, statuses
from tests.faults.reports import LAYOUT
from tests.strategies.conftest import FakeNode, error_from_the_superlink, layout_of


def back_as_another(grid: NodeGrid) -> None:
    """Instead of node 3, node 9 is here."""
    grid.online = {1, 2, 9}


def stopped(message: Message) -> list[Message]:
    return [Message(Error(8, "ClientApp stopped responding."), reply_to=message)]


def model_of(directory: RunDirectory) -> torch.Tensor:
    found = directory.newest_checkpoint()
    assert found is not None
    return found.state.tensors["model"]


class Gone:
    """The node dies with the plan of one round, and is back after some looks (0: never)."""

    def __init__(self, grid: NodeGrid, node_id: int, round_: int, back_after: int) -> None:
        self.grid, self.node_id, self.round, self.back_after = grid, node_id, round_, back_after
        self.died = False

    def __call__(self, plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        if plan.round != self.round or self.died:
            return [honest]
        self.died = True
        self.grid.online.discard(self.node_id)
        if self.back_after:
            self.grid.at[self.grid.looks + self.back_after] = lambda grid: grid.online.add(self.node_id)
        return [error_from_the_superlink(message)]


def test_a_client_that_comes_late_takes_part_from_then_on(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    grid.online = {1, 2}
    grid.at[4] = lambda grid: grid.online.add(3)  # before the second round
    directory = run_nodes(tmp_path, grid, num_server_rounds=4)
    found = statuses(directory)
    assert set(found[0]) == {"ada", "ben"}
    assert set(found[-1]) == {"ada", "ben", "cyd"}
    assert all(status == client_status.OK for round_ in found for status in round_.values())
    assert statuses(directory, "deliver")[0]["cyd"] == "ok"


def test_a_client_that_leaves_is_absent_and_takes_part_again_when_it_is_back(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    grid.misbehave[3] = Gone(grid, 3, round_=2, back_after=4)
    directory = run_nodes(tmp_path, grid, num_server_rounds=6)
    cyd = [round_["cyd"] for round_ in statuses(directory)]
    assert cyd[:3] == ["ok", "left", "absent"]
    assert cyd[-1] == "ok"
    reasons = [r["clients"]["cyd"].get("reason", "") for r in directory.rounds() if r["phase"] == "train"]
    assert "Node Unavailable" in reasons[1]


@pytest.mark.parametrize("code", [5, 8])
def test_where_its_answer_is_needed_a_client_that_died_is_asked_again_and_nothing_is_different(
    code: int, tmp_path: Path
) -> None:
    grid = NodeGrid(nodes())
    if code == 5:
        grid.misbehave[3] = Gone(grid, 3, round_=2, back_after=1)
    else:
        died: list[bool] = []

        def stop_once(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
            if plan.round != 2 or died:
                return [honest]
            died.append(True)
            return stopped(message)

        grid.misbehave[3] = stop_once
    directory = run_nodes(tmp_path, grid, min_clients=3, round_timeout=60.0, run_name="died")
    plain = run_nodes(tmp_path, NodeGrid(nodes()), min_clients=3, run_name="plain")
    second = [record for record in directory.rounds() if record["phase"] == "train"][1]["clients"]["cyd"]
    assert (second["status"], second["attempts"]) == ("ok", 2)
    assert torch.equal(model_of(directory), model_of(plain))


def test_a_client_that_keeps_dying_has_failed(tmp_path: Path) -> None:
    def stop(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        return stopped(message)

    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: stop}), num_server_rounds=1, min_clients=2)
    assert statuses(directory) == [{"ada": "ok", "ben": "ok", "cyd": "failed"}]


def test_silence_is_late_and_the_answer_that_comes_later_is_counted_and_not_used(tmp_path: Path) -> None:
    kept: list[tuple[str, Message]] = []
    grid = NodeGrid(nodes())

    def delay(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        if kept:  # what is asked in the next round finds the old answer as well
            name, late = kept[0]
            grid.waiting.setdefault(name, []).append(late)
            return [honest]
        kept.append((message.metadata.message_id, honest))
        return []

    grid.misbehave[3] = delay
    directory = run_nodes(tmp_path, grid)
    assert [round_["cyd"] for round_ in statuses(directory)] == ["late", "ok"]
    second = [record for record in directory.rounds() if record["phase"] == "train"][1]
    assert second["late_answers"] == {"cyd": 1}
    assert second["settled"]["merged"] == 3


def test_who_answers_twice_counts_once(tmp_path: Path) -> None:
    def twice(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        return [honest, honest]

    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: twice}), run_name="twice")
    plain = run_nodes(tmp_path, NodeGrid(nodes()), run_name="plain")
    assert torch.equal(model_of(directory), model_of(plain))
    assert [round_["cyd"] for round_ in statuses(directory)] == ["ok", "ok"]
    assert all(record["late_answers"] == {"cyd": 1} for record in directory.rounds() if record["phase"] == "train")


def test_an_answer_for_another_round_is_refused_and_the_round_goes_on(tmp_path: Path) -> None:
    def another(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        report, blobs = unpack(honest.content, "report", report_pb2.Report)
        report.round = plan.round + 1
        return [Message(pack("report", report, blobs), reply_to=message)]

    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: another}), num_server_rounds=1)
    record = next(found for found in directory.rounds() if found["phase"] == "train")["clients"]["cyd"]
    assert record["status"] == "rejected"
    assert "answered for round 2, expected 1" in record["reason"]


def test_below_min_clients_the_run_waits_says_so_stops_cleanly_and_goes_on_when_they_are_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flwr = logging.getLogger("flwr")
    flwr.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="flwr")
    grid = NodeGrid(nodes())
    config = {"min_clients": 3, "num_server_rounds": 4, "round_timeout": 5.0}
    grid.misbehave[3] = Gone(grid, 3, round_=2, back_after=0)
    try:
        with pytest.raises(NotEnoughClientsError, match="round 2: 2 of at least 3 clients gave a usable answer"):
            run_nodes(tmp_path, grid, **config)
        directory = RunDirectory(tmp_path / "run")
        assert directory.rounds()[-1]["phase"] == "stopped"
        assert "resume.toml" in directory.rounds()[-1]["reason"]
        with pytest.raises(NotEnoughClientsError, match="2 of at least 3 SuperNodes are online"):
            run_nodes(tmp_path, grid, resume=str(tmp_path / "run"), **config)
    finally:
        flwr.removeHandler(caplog.handler)
    assert "waiting for cyd to come back" in caplog.text or "waiting for clients" in caplog.text
    grid.online.add(3)
    resumed = run_nodes(tmp_path, grid, resume=str(tmp_path / "run"), **config)
    assert [round_["cyd"] for round_ in statuses(resumed)] == ["ok"] * 4
    assert [r["round"] for r in resumed.rounds() if r["phase"] == "train"] == [1, 2, 3, 4]
    plain = run_nodes(tmp_path, NodeGrid(nodes()), run_name="plain", **config)
    assert torch.equal(model_of(resumed), model_of(plain))


def test_before_a_round_too_few_are_waited_for_and_named(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    grid.at[3] = lambda grid: grid.online.discard(3)
    with pytest.raises(
        NotEnoughClientsError, match=r"round 1: 2 of at least 3 clients are here \(ada, ben\) after 1 s"
    ):
        run_nodes(tmp_path, grid, min_clients=3)
    assert grid.looks > 4


def test_without_keys_a_restarted_client_gets_its_id_back_only_when_the_old_node_is_gone(tmp_path: Path) -> None:
    grid = NodeGrid(nodes() | {9: FakeNode("cyd", LAYOUT, examples=30)})
    grid.online = {1, 2, 3, 9}  # two nodes say that they are cyd
    directory = run_nodes(tmp_path, grid, run_name="both")
    refused = directory.rounds()[0]["clients"]
    assert "node 9 claims client-id 'cyd', which node 3 holds already" in refused["node 9"]["reason"]
    grid = NodeGrid(nodes() | {9: FakeNode("cyd", LAYOUT, examples=30)})
    grid.online = {1, 2, 3}
    grid.at[4] = back_as_another
    directory = run_nodes(tmp_path, grid, run_name="restarted", num_server_rounds=4)
    assert statuses(directory)[-1]["cyd"] == "ok"
    assert grid.nodes[9].plans


def test_with_keys_nobody_takes_an_id_even_of_a_client_that_is_gone(tmp_path: Path) -> None:
    grid = NodeGrid(nodes() | {9: FakeNode("cyd", LAYOUT)})
    grid.online, grid.keys = {1, 2, 3}, {3: b"cyd's", 9: b"another"}
    grid.at[4] = back_as_another
    directory = run_nodes(tmp_path, grid, num_server_rounds=4)
    assert statuses(directory)[-1]["cyd"] == "absent"
    assert not grid.nodes[9].plans


def test_a_client_that_comes_back_as_another_is_refused(tmp_path: Path) -> None:
    grid = NodeGrid(nodes() | {9: FakeNode("cyd", layout_of(rank=2))})
    grid.online = {1, 2, 3}
    grid.at[4] = back_as_another
    directory = run_nodes(tmp_path, grid, num_server_rounds=4)
    assert statuses(directory)[-1]["cyd"] == "absent"
    assert not grid.nodes[9].plans


def test_a_run_that_somebody_still_carries_out_is_not_carried_out_twice(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    tried: list[str] = []

    def second(grid: NodeGrid) -> None:
        with pytest.raises(RunDirectoryError, match="another process is carrying out the run") as caught:
            run_nodes(tmp_path, NodeGrid(nodes()), resume=str(tmp_path / "run"))
        tried.append(str(caught.value))

    grid.at[3] = second
    run_nodes(tmp_path, grid)
    assert len(tried) == 1


def test_what_resume_refuses(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run"):
        run_nodes(tmp_path, NodeGrid(nodes()), resume=str(tmp_path / "nothing"))
    run_nodes(tmp_path, NodeGrid(nodes()))
    with pytest.raises(RunDirectoryError, match="is finished after 2 rounds; to train on, set num-server-rounds"):
        run_nodes(tmp_path, NodeGrid(nodes()), resume=str(tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"another run-config: seed = 8, it was 7.*resume.toml"):
        run_nodes(tmp_path, NodeGrid(nodes()), resume=str(tmp_path / "run"), seed=8)


def test_a_quorum_does_not_wait_for_the_last(tmp_path: Path) -> None:
    grid = NodeGrid(nodes(), misbehave={3: lambda plan, message, honest: []})
    directory = run_nodes(tmp_path, grid, num_server_rounds=1, quorum=2, grace=0.0, round_timeout=3600.0)
    (found,) = statuses(directory)
    assert found == {"ada": "ok", "ben": "ok", "cyd": "late"}  # or the test would not end


def test_a_silent_client_costs_some_of_the_others_answers_times_and_a_strike(tmp_path: Path) -> None:
    grid = NodeGrid(nodes(), misbehave={3: lambda plan, message, honest: []})
    config = {"grace": 0.0, "grace_ratio": 1.0, "round_timeout": 3600.0, "strikes": 1}
    directory = run_nodes(tmp_path, grid, num_server_rounds=2, **config)
    first, second = statuses(directory)
    assert first == {"ada": "ok", "ben": "ok", "cyd": "late"}  # or the test would not end
    assert second["cyd"] == "rested"


def test_only_named_clients_get_a_plan(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    directory = run_nodes(tmp_path, grid, num_server_rounds=1, clients="ada, c*")
    (found,) = statuses(directory)
    assert {name for name, status in found.items() if status == "ok"} == {"ada", "cyd"}


def test_a_round_waits_for_clients_that_take_part_not_for_as_many_others(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    back: list[int] = []

    def away(grid: NodeGrid) -> None:
        grid.online.discard(3)
        back.append(grid.looks + 6)
        grid.at[back[0]] = lambda grid: grid.online.add(3)

    grid.at[2] = away  # before round 1; ada and ben stay
    directory = run_nodes(tmp_path, grid, num_server_rounds=1, min_clients=2, clients="ada, cyd")
    (found,) = statuses(directory)
    assert back
    assert grid.looks >= back[0]
    assert {name for name, status in found.items() if status == "ok"} == {"ada", "cyd"}


@pytest.mark.parametrize(
    ("min_clients", "clients", "least"),
    [(0, "", 2), (5, "", 5), (0, "a", 1), (5, "a, b,a,", 2), (1, "a,b,c", 1), (0, "site-*", 2), (3, "a, site-?", 3)],
)
def test_no_more_clients_are_needed_than_are_named(min_clients: int, clients: str, least: int) -> None:
    assert RunOptions(min_clients=min_clients, clients=clients).least == least
    assert RunOptions(min_clients=min_clients, clients=clients, resume="r", deliver="all").least == 1


def test_a_named_client_that_comes_after_the_start_is_waited_for(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    grid.online = {1, 2}  # ada and ben; nobody knows cyd yet
    grid.at[8] = lambda grid: grid.online.add(3)
    (found,) = statuses(run_nodes(tmp_path, grid, num_server_rounds=1, min_clients=2, clients="ada, cyd"))
    assert grid.looks >= 8
    assert {name for name, status in found.items() if status == "ok"} == {"ada", "cyd"}


def test_a_run_of_one_named_client_starts_without_others(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    grid.online = {3}
    (found,) = statuses(run_nodes(tmp_path, grid, num_server_rounds=1, clients="cyd"))
    assert found == {"cyd": "ok"}


def test_one_client_alone_takes_part_if_it_is_the_only_one_named(tmp_path: Path) -> None:
    (found,) = statuses(run_nodes(tmp_path, NodeGrid(nodes()), num_server_rounds=1, min_clients=2, clients="cyd"))
    assert {name for name, status in found.items() if status == "ok"} == {"cyd"}


def test_names_that_nobody_has_stop_the_run_and_say_who_there_is(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughClientsError, match=r"clients = 'zoe' fits none of the run's clients: ada, ben, cyd"):
        run_nodes(tmp_path, NodeGrid(nodes()), num_server_rounds=1, clients="zoe")


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_answer_that_a_quorum_did_not_wait_for_counts_in_the_next_round_where_the_strategy_says_so(
    tmp_path: Path, weight: float
) -> None:
    kept: list[Message] = []

    def slow(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        if plan.round == 1:
            kept.append(honest)
        elif kept:
            late = kept.pop()
            grid.waiting[late.metadata.reply_to_message_id] = [late]
        return []

    grid = NodeGrid(nodes(), misbehave={3: slow})
    config = {"fedavg.late-weight": weight}
    directory = run_nodes(tmp_path, grid, num_server_rounds=2, quorum=2, grace=0.0, round_timeout=3600.0, **config)
    rounds = [record for record in directory.rounds() if record["phase"] == "train"]
    assert [record["settled"] for record in rounds] == [
        {"merged": 2},
        {"merged": 3, "late": {"cyd": 0.5}} if weight else {"merged": 2},
    ]
    assert ("late_answers" in rounds[1]) == (not weight), "told as lost only where it is"


LOCKED = httpx.HTTPStatusError("500", request=httpx.Request("POST", "http://link"), response=httpx.Response(500))
UNTAKEN = ObjectPushError("an object", 1, "a session")


class Hasty(NodeGrid):
    """Pushes fail some times: Flower takes "stored already" for a failure, or the SuperLink's database is locked."""

    def __init__(self, times: int, error: Exception) -> None:
        super().__init__(nodes())
        self.times = times
        self.error = error
        self.fails_to_look = False

    def get_nodes(self) -> Iterable[NodeInfo]:
        self.fails_to_look = self.error is LOCKED and not self.fails_to_look and self.looks > 1
        if self.fails_to_look:
            raise self.error
        return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        found = super().push_messages(messages)
        if self.times and next(iter(messages)).metadata.message_type == PLAN_TYPE:
            self.times -= 1
            raise self.error
        return found


@pytest.mark.parametrize("error", [UNTAKEN, LOCKED])
@pytest.mark.parametrize("times", [1, len(PAUSES) - 1])
def test_a_push_that_fails_at_a_busy_superlink_is_made_again(tmp_path: Path, times: int, error: Exception) -> None:
    directory = run_nodes(tmp_path, Hasty(times, error))
    assert statuses(directory) == [dict.fromkeys(("ada", "ben", "cyd"), "ok")] * 2


@pytest.mark.parametrize("error", [UNTAKEN, LOCKED])
def test_a_client_whose_messages_cannot_be_pushed_is_left_out_and_the_run_goes_on(
    tmp_path: Path, error: Exception
) -> None:
    directory = run_nodes(tmp_path, Hasty(len(PAUSES), error))
    assert sorted(statuses(directory)[0].values()) == ["left", "ok", "ok"]
    assert statuses(directory)[1] == dict.fromkeys(("ada", "ben", "cyd"), "ok")
