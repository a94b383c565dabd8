"""A SuperLink's Runtime API in this process, under Flower's own HttpGrid: messages are taken apart and put together.

Behind it are the nodes of :class:`tests.faults.nodes.NodeGrid`; a test says what becomes of an answer's objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
from flwr.app import Array, Message
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde import message_to_proto
from flwr.proto import message_pb2, runtime_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from tests.faults.nodes import Misbehave, NodeGrid
from tests.strategies.conftest import FakeNode, error_from_the_superlink

Visible = Callable[[int, Message, str], bool | None]
"""(node, answer, object id) -> whether the object is here; None: the SuperLink has given its upload up."""


class Repeating(Array):
    """An array that names its one chunk many times: what it becomes is ``times`` what travels."""

    def __init__(self, times: int, data: bytes, stype: str) -> None:
        super().__init__(dtype="uint8", shape=(times * len(data),), stype=stype, data=data)
        self.__dict__["times"] = times

    def slice_array(self) -> list[tuple[str, Any]]:
        chunk = ArrayChunk(memoryview(self.data))
        return [(chunk.object_id, chunk)] * int(self.__dict__["times"])


Repeating.__qualname__ = "Array"  # the name that it travels under


class Link:
    """Stands for Flower's client of the Runtime API."""

    def __init__(self, nodes: NodeGrid, visible: Visible | None = None) -> None:
        self.nodes = nodes
        self.visible = visible or (lambda node, answer, name: True)
        self.objects: dict[str, bytes] = {}
        self.owners: dict[str, Message] = {}
        self.asked: set[str] = set()
        self.confirmed: list[str] = []
        self.says: Callable[[Message], Message] = lambda answer: answer
        """What an answer's objects say."""

    def GetNodes(self, request: Any) -> Any:
        return runtime_pb2.GetNodesResponse(nodes=self.nodes.get_nodes())

    def PushMessages(self, request: Any) -> Any:
        names = [tree.object_id for tree in request.message_object_trees]
        wanted = [name for tree in request.message_object_trees for name in _ids(tree)]
        self.asked |= set(names)
        return runtime_pb2.PushAppMessagesResponse(message_ids=names, objects_to_push=wanted, session_id="session")

    def PushObject(self, request: Any) -> Any:
        self.objects[request.object_id] = request.object_content
        return message_pb2.PushObjectResponse(stored=True)

    def PullMessages(self, request: Any) -> Any:
        found = runtime_pb2.PullAppMessagesResponse()
        for name in request.message_ids:
            if name not in self.asked:
                continue
            self.asked.remove(name)
            message = inflate_object_from_contents(name, dict(self.objects))
            assert isinstance(message, Message)
            message.metadata.__dict__["_message_id"] = name
            for reply in self.nodes.replies(message):
                self.put(found, reply)
        return found

    def put(self, found: Any, reply: Message) -> None:
        """Take an answer apart."""
        says = self.says(reply)
        reply.metadata.__dict__["_message_id"] = says.object_id
        found.messages_list.append(message_to_proto(remove_content_from_message(reply)))
        found.message_object_trees.append(get_object_tree(says))
        for part, item in get_all_nested_objects(says).items():
            self.objects[part] = item.deflate()
            self.owners[part] = reply

    def says_unavailable(self, found: Any, name: str) -> None:
        """As the SuperLink does of a message that it no longer has."""
        message = inflate_object_from_contents(name, dict(self.objects))
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = name
        self.put(found, error_from_the_superlink(message, "Message Unavailable", 3))

    def PullObject(self, request: Any) -> Any:
        name = request.object_id
        is_here = self.visible(self.owners[name].metadata.src_node_id, self.owners[name], name)
        content = self.objects[name] if is_here else b""
        return message_pb2.PullObjectResponse(
            object_found=is_here is not None, object_available=bool(is_here), object_content=content
        )

    def ConfirmMessageReceived(self, request: Any) -> Any:
        self.confirmed.append(request.message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse()


class Forgetful(Link):
    """As the SuperLink: what has been pulled once is not there any more."""

    def PullMessages(self, request: Any) -> Any:
        found = super().PullMessages(request)
        for name in set(request.message_ids) - {m.metadata.reply_to_message_id for m in found.messages_list}:
            self.says_unavailable(found, name)
        return found


class _Body(httpx.SyncByteStream):
    """Counts what is read of it."""

    def __init__(self, data: bytes, read: dict[int, int]) -> None:
        self.data, self.read = data, read

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), 2**16):
            self.read[len(self.data)] = start + 2**16
            yield self.data[start : start + 2**16]


_REQUESTS = {
    "GetNodes": runtime_pb2.GetNodesRequest,
    "PushMessages": runtime_pb2.PushAppMessagesRequest,
    "PullMessages": runtime_pb2.PullAppMessagesRequest,
    "PushObject": message_pb2.PushObjectRequest,
    "PullObject": message_pb2.PullObjectRequest,
    "ConfirmMessageReceived": message_pb2.ConfirmMessageReceivedRequest,
}


def over_http(grid: HttpGrid, link: Link) -> dict[int, int]:
    """Puts Flower's HTTP client between both; how many bytes were read of the last body of each length."""
    read: dict[int, int] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        name = request.url.path.rsplit("/", 1)[-1].title().replace("-", "")
        data = getattr(link, name)(_REQUESTS[name].FromString(request.read())).SerializeToString()
        return httpx.Response(200, headers={"content-length": f"{len(data)}"}, stream=_Body(data, read))

    client = RuntimeHttpClient("http://superlink")
    client._client = httpx.Client(transport=httpx.MockTransport(handle))
    grid._client = client
    return read


def grid_over(
    nodes: Mapping[int, FakeNode], misbehave: Mapping[int, Misbehave] | None = None, visible: Visible | None = None
) -> tuple[HttpGrid, Link]:
    """Flower's grid over these nodes."""
    grid = HttpGrid(token="none")
    link = Link(NodeGrid(nodes, misbehave), visible)
    grid.set_run(Run.create_empty(1))
    grid._client = link  # type: ignore[assignment]
    return grid, link


def _ids(tree: Any) -> list[str]:
    return [name for child in tree.children for name in _ids(child)] + [tree.object_id]
