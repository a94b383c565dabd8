"""Many thin nodes in one process: ``python -m tests.benchmarks.thin.node '{"address": ..., "first": 0, ...}'``.

Each is a node of its own to the SuperLink: a key, registered and activated; heartbeats; a look for messages every
``poll`` seconds, as a SuperNode does; each object of a message pulled, its receipt confirmed, the reply and each of
its objects pushed. Only the sockets are shared: a few channels carry all nodes of the process. The bundle, which a
SuperNode fetches once per run, is left out.

Runs until its standard input ends; then prints a line with what its nodes have done.
"""

from __future__ import annotations

import heapq
import itertools
import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
)
from flwr.common.serde import message_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.grpc import create_channel
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from tests.benchmarks.thin.answers import ThinClient, layout_of_bytes

CHANNELS = 4
BEATING = 4
"""Threads that send heartbeats."""
PATIENCE = 60.0
"""Seconds that the server may keep a call waiting: what is measured is how long it takes, not whether it is in time."""

AGAIN = (
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN
)  # fmt: skip
"""Errors after which a call is repeated, and counted; a SuperLink with a locked database answers with the last two. A
stock SuperNode drops the message then, and nobody answers it."""


class ThinNode:
    """One node: what a SuperNode does, without processes."""

    def __init__(self, stub: FleetStub, client: ThinClient, done: Counter[str]) -> None:
        self.stub = stub
        self.client = client
        self.done = done
        self.private, public = generate_key_pairs()
        self.public = public_key_to_bytes(public)
        self.version = RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()
        self.node = Node()
        self.beat = 0.0

    def call(self, name: str, request: Any) -> Any:
        """One call of the Fleet API, signed as this node; it is repeated if the SuperLink is too busy."""
        for pause in (0.5, 1.0, 2.0, 4.0, 8.0, None):
            timestamp = now().isoformat()
            signature = sign_message(self.private, timestamp.encode("ascii"))
            headers = ((PUBLIC_KEY_HEADER, self.public), (TIMESTAMP_HEADER, timestamp), (SIGNATURE_HEADER, signature))
            try:
                return getattr(self.stub, name)(request, metadata=(*self.version, *headers), timeout=PATIENCE)
            except grpc.RpcError as error:
                self.done[f"{name} {error.code().name}"] += 1
                if pause is None or error.code() not in AGAIN:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def start(self) -> None:
        """Register and activate."""
        self.call("RegisterNode", RegisterNodeFleetRequest(public_key=self.public))
        interval = HEARTBEAT_DEFAULT_INTERVAL
        found = self.call("ActivateNode", ActivateNodeRequest(public_key=self.public, heartbeat_interval=interval))
        self.node = Node(node_id=found.node_id)
        self.beat = time.monotonic()

    def heartbeat(self) -> None:
        """Send a heartbeat if it is time."""
        if time.monotonic() - self.beat > 0.7 * HEARTBEAT_DEFAULT_INTERVAL:
            self.beat = time.monotonic()
            request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            self.call("SendNodeHeartbeat", request)

    def turn(self) -> bool:
        """Look for a message, and answer it; returns whether there was one."""
        found = self.call("PullMessages", PullMessagesRequest(node=self.node))
        if not found.messages_list:
            return False
        self._answer(found.messages_list[0], found.message_object_trees[0])
        return True

    def _answer(self, bare: Any, tree: Any) -> None:
        metadata = metadata_from_proto(bare.metadata)
        contents = {part.object_id: self._object(metadata.run_id, part.object_id) for part in iterate_object_tree(tree)}
        confirm = ConfirmMessageReceivedRequest(
            node=self.node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        self.call("ConfirmMessageReceived", confirm)
        asked = inflate_object_from_contents(metadata.message_id, contents)
        assert isinstance(asked, Message)
        asked.metadata.__dict__["_message_id"] = metadata.message_id
        reply = Message(self._content(asked), reply_to=asked)
        reply.metadata.__dict__["_src_node_id"] = self.node.node_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        pushed = self.call(
            "PushMessages",
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.1],
            ),
        )
        for name in pushed.objects_to_push:
            content = objects[name].deflate()
            request = PushObjectRequest(
                node=self.node,
                run_id=metadata.run_id,
                object_id=name,
                object_content=content,
                session_id=pushed.session_id,
            )
            stored = self.call("PushObject", request).stored
            self.done["stored" if stored else "not stored"] += 1
            self.done["bytes up"] += len(content)
        self.done["answers"] += 1
        self.done["bytes down"] += sum(map(len, contents.values()))

    def _content(self, asked: Message) -> Any:
        """Stock Flower's messages are sent back as they are."""
        return asked.content if asked.metadata.message_type == "train" else self.client.answer(asked)

    def _object(self, run_id: int, name: str) -> bytes:
        """An object of the message, waited for while the ServerApp is still pushing it."""
        request = PullObjectRequest(node=self.node, run_id=run_id, object_id=name)
        for pause in itertools.chain((0.1, 0.2, 0.5, 1.0), itertools.repeat(2.0, 60)):
            found = self.call("PullObject", request)
            if not found.object_found:
                break
            if found.object_available:
                return bytes(found.object_content)
            time.sleep(pause)
        raise RuntimeError(f"object {name} is not at the SuperLink")


class Crowd:
    """All nodes of this process; a free thread takes the node that is due next. Heartbeats have threads of their own,
    as in a SuperNode: a node that waits for a message's objects is online all the same."""

    def __init__(self, nodes: list[ThinNode], poll: float, threads: int) -> None:
        self.poll = poll
        self.threads = threads
        self.stopped = threading.Event()
        self.failures: Counter[str] = Counter()
        self._due = [(index * poll / len(nodes), index, node) for index, node in enumerate(nodes)]
        self._nodes = nodes
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Work until :attr:`stopped`."""
        with ThreadPoolExecutor(self.threads + BEATING) as pool:
            for number in range(BEATING):
                pool.submit(self._beat, self._nodes[number::BEATING])
            for _ in range(self.threads):
                pool.submit(self._work)

    def _beat(self, nodes: list[ThinNode]) -> None:
        while not self.stopped.wait(0.5):
            for node in nodes:
                try:
                    node.heartbeat()
                except Exception as error:
                    self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Whatever it is, it is counted, and the others go on."""
        self.failures[f"{type(error).__name__}: {str(error)[:200]}"] += 1

    def _work(self) -> None:
        while not self.stopped.is_set():
            with self._lock:
                due = heapq.heappop(self._due) if self._due else None
            if due is None:
                time.sleep(0.01)
                continue
            at, index, node = due
            wait = at - (time.monotonic() - self._began)
            if wait > 0:
                if wait > 0.05:  # another one may be due before
                    with self._lock:
                        heapq.heappush(self._due, due)
                    time.sleep(0.02)
                    continue
                time.sleep(wait)
            answered = False
            try:
                answered = node.turn()
            except Exception as error:
                self._failed(error)
            with self._lock:
                heapq.heappush(
                    self._due, (time.monotonic() - self._began + (0 if answered else self.poll), index, node)
                )


def main() -> None:
    asked = json.loads(sys.argv[1])
    channels = [create_channel(asked["address"], insecure=True) for _ in range(CHANNELS)]
    stubs = [FleetStub(channel) for channel in channels]
    layout = layout_of_bytes(asked["bytes"])
    done: Counter[str] = Counter()
    nodes = [
        ThinNode(stubs[number % CHANNELS], ThinClient(f"thin-{number:05d}", layout), done)
        for number in range(asked["first"], asked["first"] + asked["count"])
    ]
    with ThreadPoolExecutor(asked["threads"]) as pool:
        list(pool.map(ThinNode.start, nodes))
    print(json.dumps({"online": len(nodes)}), flush=True)
    crowd = Crowd(nodes, asked["poll"], asked["threads"])
    thread = threading.Thread(target=crowd.run)
    thread.start()
    sys.stdin.read()
    crowd.stopped.set()
    thread.join()
    print(json.dumps({"done": done, "failures": crowd.failures}), flush=True)


if __name__ == "__main__":
    main()
