"""The calls and protobuf bytes that stock Flower 1.39 sends on the Fleet connection for one message.

A SuperNode asks for messages (``PullMessages``), fetches each object of the one it gets (``PullObject``) and confirms
it (``ConfirmMessageReceived``); an answer goes out as ``PushMessages`` and one ``PushObject`` per object, after which
the SuperNode asks for the next message at once. Once per run it fetches the run's description and the app bundle.
Source: ``flwr/supernode/start_client_internal.py`` and ``flwr/client/grpc_rere_client/connection.py``.

The requests and responses are built here from the same message, so sizes are serialised sizes, not estimates. The bytes
that gRPC, HTTP/2 and TLS add are not here: they are measured (:mod:`server_app.ledger.reconciliation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto, run_to_proto
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    Reconnect,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.run import Run

# The most bytes in a TLS record (RFC 8446, 5.1).
RECORD_BYTES = 16384
SESSION_ID_BYTES = 36


@dataclass(frozen=True)
class MessageCost:
    """One Flower message on the Fleet connection.

    Args:
        bytes: protobuf bytes in the message's own direction: metadata, object tree, every object.
        objects: Flower objects in it.
        calls: gRPC calls that carry it.
        control_bytes: protobuf bytes of the same calls in the other direction.
        tls_records: TLS records beyond each call's first one, in the message's direction.
    """

    bytes: int
    objects: int
    calls: int
    control_bytes: int
    tls_records: int


def message_cost(message: Message, direction: str) -> MessageCost:
    """The cost of carrying ``message`` ``down`` to a SuperNode or ``up`` to the SuperLink.

    Serialises every object once, which costs as much time as Flower's own push of it.
    """
    metadata = message.metadata
    run_id = metadata.run_id
    with no_object_id_recompute():
        contents = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
        tree = get_object_tree(message)
        bare = message_to_proto(remove_content_from_message(message) if message.has_content() else message)
    if direction == "down":
        node = Node(node_id=metadata.dst_node_id)
        own = [PullMessagesResponse(messages_list=[bare], message_object_trees=[tree]).ByteSize()]
        own += [
            PullObjectResponse(object_found=True, object_available=True, object_content=content).ByteSize()
            for content in contents.values()
        ]
        control = PullMessagesRequest(node=node).ByteSize()
        control += sum(PullObjectRequest(node=node, run_id=run_id, object_id=name).ByteSize() for name in contents)
        confirm = ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=tree.object_id)
        control += confirm.ByteSize()
        calls = len(contents) + 2
    else:
        node = Node(node_id=metadata.src_node_id)
        session = "0" * SESSION_ID_BYTES
        push = PushMessagesRequest(
            node=node, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[1.0]
        )
        own = [push.ByteSize()]
        own += [
            PushObjectRequest(
                node=node, run_id=run_id, object_id=name, object_content=content, session_id=session
            ).ByteSize()
            for name, content in contents.items()
        ]
        answer = PushMessagesResponse(
            reconnect=Reconnect(reconnect=5),
            results={tree.object_id: 0},
            objects_to_push=list(contents),
            session_id=session,
        )
        control = answer.ByteSize() + len(contents) * PushObjectResponse(stored=True).ByteSize()
        calls = len(contents) + 1
    return MessageCost(
        bytes=sum(own),
        objects=len(contents),
        calls=calls,
        control_bytes=control,
        tls_records=sum(map(extra_records, own)),
    )


def extra_records(nbytes: int) -> int:
    """TLS records beyond the first for one gRPC message of ``nbytes``."""
    return max(0, -(-(nbytes + 5) // RECORD_BYTES) - 1)


@dataclass(frozen=True)
class BundleCost:
    """The two calls with which a SuperNode fetches the run's description and the app bundle, once per run."""

    up: int
    down: int
    tls_records: int


def bundle_cost(run: Run, app_directory: Path) -> BundleCost:
    """Protobuf bytes of ``GetRun`` and ``GetFab`` for the app installed in ``app_directory``."""
    node = Node(node_id=(1 << 63) + 1)  # node ids are 64-bit random numbers: ten bytes
    up = GetRunRequest(node=node, run_id=run.run_id).ByteSize()
    up += GetFabRequest(node=node, run_id=run.run_id, hash_str=run.fab_hash).ByteSize()
    description = GetRunResponse(run=run_to_proto(run)).ByteSize()
    fab = Fab(hash_str=run.fab_hash, content=b"\0" * bundle_size(app_directory))
    bundle = GetFabResponse(fab=fab).ByteSize()
    return BundleCost(up, description + bundle, extra_records(description) + extra_records(bundle))


def bundle_size(app_directory: Path) -> int:
    """Bytes of the app bundle that was unpacked to ``app_directory``.

    A packed bundle (``server_app.tools.bundle``) states its size in a file beside its sources. Flower's own is a ZIP of
    stored members and their list.
    """
    for folder in (app_directory, app_directory.parent):
        if (said := folder / "fedalloy_bundle" / "size").is_file():
            return int(said.read_text())
    total, listing = 22, 0
    for path in sorted(app_directory.rglob("*")):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        name = path.relative_to(app_directory).as_posix()
        size = path.stat().st_size
        total += _zip_member(name, size)
        listing += len(f"{name},{'0' * 64},{size * 8}\n".encode())
    return total + _zip_member(".info/CONTENT", max(0, listing - 1))


def _zip_member(name: str, size: int) -> int:
    # Local header, name, content; central directory entry and name again.
    return 30 + 46 + 2 * len(name.encode()) + size
