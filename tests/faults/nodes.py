"""The real round loop over nodes that answer without a model and misbehave as a test says: seconds for whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from fedalloy_adapters.wire.flower_records import COUNTERS_TYPE, PLAN_TYPE, REGISTER_TYPE, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.loop import run
from server_app.run.run_directory import RunDirectory
from tests.faults.reports import LAYOUT
from tests.in_process import run_config_of
from tests.strategies.conftest import FakeGrid, FakeNode

Misbehave = Callable[[plan_pb2.Plan, Message, Message], list[Message]]
"""(plan, message, honest answer) -> what the SuperLink holds for the server: nothing, one answer, or several."""
Event = Callable[["NodeGrid"], None]


class NodeGrid(FakeGrid):
    """Nodes that come, leave, are late and lie.

    Args:
        nodes: by node id.
        misbehave: by node id; applies to plans.
        at: what happens just before the n-th look at who is online (from 1).
    """

    def __init__(
        self,
        nodes: Mapping[int, FakeNode],
        misbehave: Mapping[int, Misbehave] | None = None,
        at: Mapping[int, Event] | None = None,
    ) -> None:
        super().__init__([])
        self.nodes = dict(nodes)
        self.misbehave = dict(misbehave or {})
        self.at = dict(at or {})
        self.online = set(nodes)
        self.keys: dict[int, bytes] = {}
        self.waiting: dict[str, list[Message]] = {}
        self.looks = 0
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1

    def get_nodes(self) -> Iterable[NodeInfo]:
        self.looks += 1
        if event := self.at.get(self.looks):
            event(self)
        return [NodeInfo(node_id=node_id, public_key=self.keys.get(node_id, b"")) for node_id in sorted(self.online)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            self.count += 1
            name = f"message-{self.count}"
            message.metadata.__dict__["_message_id"] = name
            names.append(name)
            self.waiting[name] = self.replies(message)
        return names

    def replies(self, message: Message) -> list[Message]:
        node_id, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind == REGISTER_TYPE:
            return [self.answer(message)]
        if kind == COUNTERS_TYPE:
            return [Message(pack("counters", report_pb2.Counters(version=1)), reply_to=message)]
        assert kind == PLAN_TYPE
        plan, _ = unpack(message.content, "plan", plan_pb2.Plan)
        honest = self.answer(message)
        return self.misbehave[node_id](plan, message, honest) if node_id in self.misbehave else [honest]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for name in message_ids for reply in self.waiting.pop(name, [])]


def nodes(*names: str) -> dict[int, FakeNode]:
    """Nodes 1, 2, ... with ten examples, twenty, ...; ada, ben and cyd where nobody is named."""
    found = enumerate(names or ("ada", "ben", "cyd"), start=1)
    return {number: FakeNode(name, LAYOUT, examples=10 * number) for number, name in found}


def run_nodes(runs: Path, grid: NodeGrid, **config: Any) -> RunDirectory:
    """A run over these nodes; keys as in :func:`tests.in_process.run_config_of`."""
    given = {
        "min-clients": 2, "num-server-rounds": 2, "poll-interval": 0.01, "startup-timeout": 1.0, "round-timeout": 1.0,
        "run-name": "run", "runs-dir": str(runs), "seed": 7, "strategy": "fedavg",
    }  # fmt: skip
    given |= run_config_of(**config)
    if given["strategy"] == "straggler-resilient":
        given.setdefault("straggler-resilient.first", 1.0)  # everybody from the start
    return run(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=given))


def statuses(directory: RunDirectory, phase: str = "train") -> list[dict[str, str]]:
    """What became of every client, round by round."""
    return [
        {client: record["status"] for client, record in found["clients"].items()}
        for found in directory.rounds()
        if found["phase"] == phase
    ]
