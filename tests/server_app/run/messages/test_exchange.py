"""Messages are announced a few at a time, and none is made before it is pushed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedalloy_adapters.wire.flower_records import pack
from proto.fedalloy.v1 import plan_pb2
from server_app.run.messages.exchange import AT_ONCE, BATCH, BATCH_BYTES, Exchange


class Network:
    """A federation whose pushes wait until they may go on, and a watch."""

    def __init__(self, gone: Sequence[str] = ()) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # what Flower's process start sets
        self.grid = HttpGrid(token="t")
        self.may_go = threading.Event()
        self.batches: list[list[str]] = []
        self.away: list[str] = []
        self.made: list[str] = []
        self._gone = gone

    def make(self, name: str, size: int) -> Message:
        self.made.append(name)
        content = pack("plan", plan_pb2.Plan(version=1, client_id=name), {"global": bytes(size)}, beside=True)
        return Message(content, dst_node_id=1, message_type="train.plan", group_id=name)

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        names = [message.metadata.group_id for message in messages]
        self.batches.append(names)
        self.may_go.wait(30)
        return [None if name in self._gone else f"id of {name}" for name in names]

    def gone(self, client_id: str) -> None:
        self.away.append(client_id)

    def overdue(self, message_id: str, client_id: str) -> None:
        raise AssertionError("unreachable")

    def pushing(self, client_id: str) -> None:
        pass

    def pushed(self, client_id: str, message: Message) -> None:
        pass

    def lost(self, client_id: str, message: Message) -> None:
        pass


def exchange_of(network: Network, sizes: dict[str, int]) -> Exchange:
    makes: dict[str, Callable[[], Message]] = {name: partial(network.make, name, size) for name, size in sizes.items()}
    return Exchange(network, makes, network)


def settle(exchange: Exchange, network: Network) -> None:
    network.may_go.set()
    deadline = time.monotonic() + 30
    while (exchange._queue or exchange._pushes) and time.monotonic() < deadline:
        exchange.push()
        exchange.wait(0.01)
    exchange.push()


def test_small_messages_are_announced_together_and_no_more_are_made_than_are_pushed() -> None:
    network = Network(gone=["c05"])
    names = [f"c{number:02d}" for number in range(30)]
    exchange = exchange_of(network, dict.fromkeys(names, 100))
    exchange.push()
    assert network.made == names[: AT_ONCE * BATCH]
    settle(exchange, network)
    assert sorted(map(tuple, network.batches)) == [tuple(names[n : n + BATCH]) for n in range(0, 30, BATCH)]
    assert network.away == list(exchange.lost) == ["c05"]
    assert exchange.waiting == {f"id of {name}": name for name in names if name != "c05"}


@pytest.mark.parametrize(("size", "together"), [(BATCH_BYTES, 1), (BATCH_BYTES // 2, 2)])
def test_large_messages_are_pushed_by_themselves(size: int, together: int) -> None:
    network = Network()
    exchange = exchange_of(network, {f"c{number}": size for number in range(6)})
    settle(exchange, network)
    assert [len(batch) for batch in sorted(network.batches)] == [together] * (6 // together)


def test_another_grid_gets_one_message_at_a_time() -> None:
    network = Network()
    network.grid = cast(HttpGrid, object())
    network.may_go.set()
    exchange = exchange_of(network, dict.fromkeys("abc", 10))
    exchange.push()
    assert network.batches == [["a"], ["b"], ["c"]]
