"""Refusals: by the client's id or its key's name, one line, in the log as warnings, in the records, and at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo

from fedalloy_adapters.wire.flower_records import REGISTER_TYPE
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.ledger.recorder import WireLog
from server_app.run.clients.rehearsal import why_not_for_private_clients
from server_app.run.federation import NoClientError, NotEnoughClientsError
from strategies.algorithms.fedavg import FedAvg
from strategies.framework.answers import client_from
from tests.faults.nodes import NodeGrid, nodes, run_nodes
from tests.faults.reports import LAYOUT
from tests.strategies.conftest import FakeNode

RAISED = "<class 'client_app.guard.disclosure.ClientError'>:<'DataError: line 17, column 'label''>"


class Refusing(NodeGrid):
    """Node 3 cannot register; its key is registered as ``shop``, the others' as their client ids."""

    def get_nodes(self) -> Any:
        names = {1: "ada", 2: "ben", 3: "shop"}
        return [NodeInfo(node_id=n.node_id, name=names[n.node_id]) for n in super().get_nodes()]

    def replies(self, message: Message) -> list[Message]:
        if message.metadata.dst_node_id == 3 and message.metadata.message_type == REGISTER_TYPE:
            return [Message(Error(2, RAISED), reply_to=message)]
        return super().replies(message)


def grid() -> Refusing:
    return Refusing(nodes("ada", "ben", "cyd"))


def test_by_default_all_that_are_online_must_be_taken_in(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughClientsError) as raised:
        run_nodes(tmp_path, grid(), min_clients=0)
    assert str(raised.value) == (
        "2 of 3 sites that are online can take part; refused: shop: DataError: line 17, column 'label'. Put that "
        "right and start again, or go on without: min-clients=2"
    )
    assert run_nodes(tmp_path, NodeGrid(nodes()), min_clients=0, run_name="all").rounds()[-1]["phase"] != "stopped"


@pytest.mark.parametrize(("mode", "kept"), [("allowed", ["ada", "ben"]), ("required", ["ada"]), ("forbidden", ["ben"])])
def test_a_server_may_insist_on_trainers_that_owners_have_installed_or_on_those_of_the_run(
    mode: str, kept: list[str], tmp_path: Path
) -> None:
    class Installed(FakeNode):
        def registration(self) -> report_pb2.Registration:
            found = super().registration()
            found.trainer = report_pb2.TRAINER_MODE_INSTALLED
            return found

    two = {1: Installed("ada", LAYOUT, 10), 2: FakeNode("ben", LAYOUT, 10)}
    directory = run_nodes(tmp_path, NodeGrid(two), min_clients=1, site_mode=mode)
    (clients,) = [record["clients"] for record in directory.rounds() if record["phase"] == "register"]
    assert sorted(name for name, said in clients.items() if said["status"] == "ok") == kept
    refused = [said["reason"] for said in clients.values() if said["status"] != "ok"]
    assert all(f"site-mode is {mode!r}" in reason for reason in refused)


def test_a_strategy_that_is_not_private_is_refused_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Potara asks for Fisher sums in its last round only: by then a client would have spent the rounds before."""
    asked: list[str] = []

    class Private(FakeNode):
        def registration(self) -> report_pb2.Registration:
            found = super().registration()
            found.privacy.budget = 8.0
            return found

        def run(self, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> tuple[report_pb2.Report, dict[str, bytes]]:
            asked.append(plan.run_name)
            return super().run(plan, blobs)

    def over(strategy: str) -> list[dict[str, Any]]:
        three = {1: Private("ada", LAYOUT, 10), 2: FakeNode("ben", LAYOUT, 10), 3: FakeNode("cyd", LAYOUT, 10)}
        run = run_nodes(tmp_path, NodeGrid(three), strategy=strategy, run_name=strategy)
        return [record["clients"]["ada"] for record in run.rounds() if record["phase"] == "register"]

    (refused,) = over("potara")
    assert refused["status"] == "rejected"
    assert "strategy 'potara' is not private: it would ask for fisher in round 2, and" in refused["reason"]
    assert not asked
    (taken,) = over("fedavg")
    assert taken["status"] == "ok"
    assert asked
    with monkeypatch.context() as patch:  # what a layout of the client's own might do
        patch.setattr(FedAvg, "brief", lambda *_: {}["nothing"])
        assert "cannot be rehearsed with its layout (KeyError)" in why_not_for_private_clients(
            FedAvg(), client_from(Private("ada", LAYOUT, 10).registration(), LAYOUT, 1)
        )


def test_a_refusal_is_a_warning_with_a_name_and_stands_in_the_records_and_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flwr = logging.getLogger("flwr")
    flwr.addHandler(caplog.handler)
    try:
        directory = run_nodes(tmp_path, grid(), min_clients=2)
    finally:
        flwr.removeHandler(caplog.handler)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "refused: shop: DataError: line 17, column 'label'" in warnings
    last = caplog.records[-1].getMessage()
    assert last.startswith("finished: 2 of 3 sites; refused: shop: DataError: line 17, column 'label'; ")
    clients = directory.rounds()[0]["clients"]
    assert clients["shop"] == {"status": "rejected", "reason": "DataError: line 17, column 'label'", "node": "3"}
    assert (clients["ada"]["node"], clients["ada"]["key"], clients["ada"]["base"]) == ("1", "ada", "toy")
    summary = json.loads((directory.path / "summary.json").read_text())
    assert summary["refused"] == {"shop": "DataError: line 17, column 'label'"}


def test_whoever_answers_has_fetched_the_app_and_is_booked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(WireLog, "fetched", lambda self, client, sure=True: fetched.extend([client] * sure))
    run_nodes(tmp_path, grid(), min_clients=2)
    assert sorted(fetched) == ["ada", "ben", "node 3"]
    fetched.clear()
    run_nodes(tmp_path, Killed(nodes()), min_clients=2, run_name="killed")
    assert sorted(fetched) == ["ada", "ben"]


def test_who_claims_anothers_id_is_called_by_its_node(tmp_path: Path) -> None:
    found = NodeGrid(nodes() | {9: FakeNode("cyd", LAYOUT)})
    directory = run_nodes(tmp_path, found)
    assert "node 9" in directory.rounds()[0]["clients"]


class Killed(NodeGrid):
    """Node 3, whose key is registered as ``cyd``, is known to the SuperLink until it is asked something."""

    def get_nodes(self) -> Any:
        names = {1: "ada", 2: "ben", 3: "cyd"}
        return [NodeInfo(node_id=n.node_id, name=names[n.node_id]) for n in super().get_nodes()]

    def replies(self, message: Message) -> list[Message]:
        if message.metadata.dst_node_id == 3:
            self.online.discard(3)
            return [Message(Error(5, "Node Unavailable - node 3"), reply_to=message)]
        return super().replies(message)


def test_a_supernode_that_was_killed_just_before_is_absent_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flwr = logging.getLogger("flwr")
    flwr.addHandler(caplog.handler)
    try:
        first = run_nodes(tmp_path, Killed(nodes()), min_clients=0)
        assert caplog.records[-1].getMessage().startswith("finished: 2 of 3 sites; absent from the start: cyd; ")
        caplog.clear()
        whole = run_nodes(tmp_path, NodeGrid(nodes()), run_name="whole")
        run_nodes(tmp_path, Killed(nodes()), resume=str(whole.path), num_server_rounds=3)
    finally:
        flwr.removeHandler(caplog.handler)
    assert first.rounds()[0]["clients"]["cyd"]["status"] == "left"
    assert caplog.records[-1].getMessage().startswith("finished: 2 of 3 sites; without their models: cyd (fed")
    summary = json.loads((whole.path / "summary.json").read_text())
    assert (summary["refused"], summary["absent"], summary["not_delivered"]) == ({}, [], ["cyd"])


def test_where_all_fail_for_one_reason_it_is_said_once(tmp_path: Path) -> None:
    class AllRefuse(NodeGrid):
        def replies(self, message: Message) -> list[Message]:
            return [Message(Error(2, RAISED), reply_to=message)]

    with pytest.raises(
        NoClientError, match=r"^none of 3 clients can take part, all for one reason: DataError: line 17, "
    ):
        run_nodes(tmp_path, AllRefuse(nodes()))
