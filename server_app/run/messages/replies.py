"""Takes replies off the SuperLink. Each has a bound on its size, and none waits for another client's upload.

Flower 1.39 pulls replies one after the other (``HttpGrid.pull_messages``). A client is heard as soon as its message is
announced, and the pull then waits until all objects of that message have been uploaded, as long as one more comes every
three minutes. And an array may name the same chunk any number of times, so that a few bytes become gigabytes when it is
put together (``Array.inflate``). Here, an incomplete message is looked at again at the next pull, and the size of a
complete one is known before Flower puts it together. Only the order of the calls is ours: ``PullMessages``, a
``PullObject`` per object, ``ConfirmMessageReceived``.

A client's objects are pulled a few at a time, so that a client that sends thousands delays nobody. Each node may have
one unfinished upload; a second one is given up, so memory does not grow with the rounds.

The SuperLink itself has only Flower's own bounds.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from flwr.app import Array, ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.recorddict_pb2 import ConfigRecord as ProtoConfigRecord
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid import HttpGrid
from google.protobuf.message import DecodeError
from httpx import HTTPStatusError, Response

from fedalloy_adapters.wire.flower_records import MAX_MESSAGE_BYTES
from fedalloy_adapters.wire.wire_counts import TooManyError, require_few

FAILED, MESSAGE_UNAVAILABLE = 2, 3
"""Flower's error codes for a client that failed, and for an answer that was lost between SuperLink and ServerApp."""
REFUSED = 1413
"""Our own code, not Flower's: an answer that was not assembled because it is too large."""
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, DecodeError, HTTPStatusError)
"""Errors that Flower raises when it assembles a message with parts that a client has made up; or the SuperLink's, for
example for parts that are nested more than a hundred deep."""
MAX_LISTING_BYTES = 2**20
"""Most bytes of everything that only lists a message's parts; parsed, it takes tens of times as much memory."""
MAX_ANNOUNCEMENT_BYTES = 16 * 2**20
"""Bytes of a SuperLink response that is not an object: lists of nodes and messages, and a client's errors."""
MAX_OBJECTS = 10_000
MAX_ITEMS = 1000
"""Most values in one of Flower's records; ours have one."""
OBJECTS_A_TURN = 100
"""Most objects of one upload before it is the others' turn. Honest answers have fewer: a chunk has 5 MiB."""
WINDOW = 64
"""Most messages that one look asks for."""
AT_ONCE = 4
"""Replies whose objects are fetched side by side."""
BATCH = 8
"""Messages that are requested at once from a grid without objects, which hands over whole replies."""
PAUSE_SECONDS = 1.0
"""Longest pause between two looks for the next object of an upload that has not ended."""


class TooLargeError(ValueError):
    """A message would have more bytes than its sender may send."""


@dataclass
class _Upload:
    """An announced message, and its parts so far; ``missing`` lists parts before those that contain them."""

    metadata: Metadata
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    listing: int = 0
    report: int = 0
    pause: float = 0.0
    look_at: float = 0.0

    @property
    def message_id(self) -> str:
        return self.metadata.message_id

    def take(self, content: bytes, max_bytes: int) -> None:
        """Add one more object.

        Raises:
            TooLargeError: together they have more than ``max_bytes``, or describe more parts than any answer has.
        """
        kind = content[: content.find(b" ")]
        is_listing = kind not in (b"ArrayChunk", b"ConfigRecord")
        self.size += len(content)
        self.listing += len(content) if is_listing else 0
        self.report += len(content) if kind == b"ConfigRecord" else 0
        if kind == b"ConfigRecord":
            require_few(get_object_body(content, ConfigRecord), ProtoConfigRecord.DESCRIPTOR, MAX_ITEMS)
        if self.size > max_bytes:
            raise TooLargeError(f"has more than {max_bytes} bytes, which is the most that was asked for")
        if self.listing > MAX_LISTING_BYTES:
            raise TooLargeError(f"describes itself in more than {MAX_LISTING_BYTES} bytes")
        if self.report > MAX_MESSAGE_BYTES + MAX_LISTING_BYTES:
            raise TooLargeError(f"has a report of {self.report} bytes, expected at most {MAX_MESSAGE_BYTES}")
        self.contents[self.missing.pop()] = content
        self.pause = 0.0


class Intake:
    """The only place that takes replies off the SuperLink.

    Args:
        grid: Flower's grid. Grids other than ``HttpGrid`` (a simulation) are asked for whole messages.
        say: called with progress messages.
    """

    def __init__(self, grid: Grid, say: Callable[[str], None]) -> None:
        self.grid = grid
        self.say = say
        self.max_bytes = MAX_MESSAGE_BYTES + MAX_LISTING_BYTES
        self.asking_seconds = 0.0  # that the SuperLink last needed to say which messages have been answered
        self._uploads: dict[str, _Upload] = {}
        self._one_by_one = False
        self._asked: dict[str, int] = {}  # when each message was asked for last
        self._turn = 0
        self._pool = ThreadPoolExecutor(AT_ONCE)

    def expect(self, max_bytes: int) -> None:
        """From now on, allow answers of up to ``max_bytes`` (plus what Flower writes around them)."""
        self.max_bytes = max(self.max_bytes, max_bytes + MAX_LISTING_BYTES)

    def pull(self, ids: list[str]) -> Iterator[Message]:
        """Yield replies to these messages that are complete, or (:data:`REFUSED`, :data:`FAILED`) cannot be accepted.

        A look asks for at most :data:`WINDOW` messages, starting with those that were asked for longest ago, so its
        cost does not grow with silent clients. Objects of a few replies are fetched side by side, and no others before
        the first of these is taken. Each reply is yielded once. An incomplete one stays: it comes with a later call, or
        not at all. Only one stays for each node: the one whose message comes first in ``ids``.
        """
        if not isinstance(self.grid, HttpGrid):
            for start in range(0, len(ids), BATCH):
                yield from self._each(ids[start : start + BATCH], self.grid.pull_messages)
            return
        grid = self.grid
        self._bound(grid)
        yield from self._each(self._window(ids), lambda new: self._announced(grid, new))
        staying: dict[int, str] = {}
        for name in [name for name in ids if name in self._uploads]:
            staying.setdefault(self._uploads[name].metadata.src_node_id, name)
        for name, upload, reply in self._looks(grid):
            if reply is None and staying.get(upload.metadata.src_node_id) != name:
                self._confirm(grid, upload)
                reply = make_message(upload.metadata, error=Error(REFUSED, "its node has begun another upload"))
            if reply is not None:
                del self._uploads[name]
                yield reply

    def _window(self, ids: list[str]) -> list[str]:
        """The messages to ask for now."""
        asked = {name: self._asked.get(name, 0) for name in ids if name not in self._uploads}
        chosen = sorted(asked, key=lambda name: asked[name])[:WINDOW]
        self._turn += 1
        self._asked = asked | dict.fromkeys(chosen, self._turn)
        return chosen

    def _looks(self, grid: HttpGrid) -> Iterator[tuple[str, _Upload, Message | None]]:
        """:meth:`_look` at every upload, a few side by side."""
        waiting: deque[tuple[str, _Upload, Future[Message | None]]] = deque()
        for name, upload in list(self._uploads.items()):
            waiting.append((name, upload, self._pool.submit(self._look, grid, upload)))
            if len(waiting) == AT_ONCE:
                name, upload, found = waiting.popleft()
                yield name, upload, found.result()
        for name, upload, found in waiting:
            yield name, upload, found.result()

    def _each(self, ids: list[str], take: Callable[[list[str]], Iterable[Message]]) -> list[Message]:
        """Take all at once; after a message that cannot be read, take each alone.

        Such a message costs all that were taken with it: the SuperLink no longer has them, and their clients are asked
        again.
        """
        if not ids:
            return []
        if not self._one_by_one:
            try:
                return list(take(ids))
            except UNREADABLE as error:
                self._one_by_one = True
                self.say(f"an answer cannot be read ({type(error).__name__}); from now on each is pulled alone")
        found: list[Message] = []
        for message_id in ids:
            try:
                found += take([message_id])
            except UNREADABLE as error:
                found.append(error_reply(message_id, FAILED, _unreadable(error)))
        return found

    def _bound(self, grid: HttpGrid) -> None:
        """Check each response's size before it is read, from now on."""
        client = getattr(grid._runtime_client, "_client", None)
        if client is not None and self._require_short not in client.event_hooks["response"]:
            client.event_hooks["response"].append(self._require_short)

    def _require_short(self, response: Response) -> None:
        """Refuse a long response: without this, one object or error text may have two gigabytes, gRPC's bound."""
        is_object = response.request.url.path.endswith("/pull-object")
        most = self.max_bytes + MAX_LISTING_BYTES if is_object else MAX_ANNOUNCEMENT_BYTES
        size = int(response.headers.get("content-length", 0))
        if size > most:
            raise TooLargeError(f"has a part of {size} bytes, expected at most {most}")

    def _announced(self, grid: HttpGrid, ids: list[str]) -> list[Message]:
        """Ask which of these have been answered, and begin their uploads; none is complete yet."""
        started = time.monotonic()
        response = grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=ids))
        self.asking_seconds = time.monotonic() - started
        for bare, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            # The SuperLink has checked the sender and the question; what the objects say of these does not count.
            metadata = metadata_from_proto(bare.metadata)
            if metadata.reply_to_message_id in ids:
                parts = islice(iterate_object_tree(tree), MAX_OBJECTS + 1)
                missing = dict.fromkeys(part.object_id for part in parts)
                self._uploads[metadata.reply_to_message_id] = _Upload(metadata, list(missing))
        return []

    def _look(self, grid: HttpGrid, upload: _Upload) -> Message | None:
        """The reply if it is complete; None if another look is needed."""
        if time.monotonic() < upload.look_at:
            return None
        pull = make_pull_object_fn_protobuf(grid._runtime_client.PullObject, grid.node, grid.run.run_id)
        try:
            if len(upload.missing) > MAX_OBJECTS:
                raise TooLargeError(f"consists of more than {MAX_OBJECTS} objects")
            for name in upload.missing[: -OBJECTS_A_TURN - 1 : -1]:
                upload.take(pull(name), self.max_bytes)
            if upload.missing:
                return None
            size = array_bytes(upload.contents)
            if size > self.max_bytes:
                raise TooLargeError(f"becomes {size} bytes, expected at most {self.max_bytes}")
            self._confirm(grid, upload)
            return _inflated(upload)
        except ObjectUnavailableError:
            upload.pause = min(2 * upload.pause or 0.05, PAUSE_SECONDS)
            upload.look_at = time.monotonic() + upload.pause
            return None
        except ObjectPullError as error:  # the SuperLink has given up this upload
            reply_to = upload.metadata.reply_to_message_id or ""
            return error_reply(reply_to, MESSAGE_UNAVAILABLE, f"the upload was not finished ({error})")
        except (TooLargeError, TooManyError) as error:
            self._confirm(grid, upload)
            return make_message(upload.metadata, error=Error(REFUSED, f"the answer {error}"))
        except UNREADABLE as error:
            self._confirm(grid, upload)
            return make_message(upload.metadata, error=Error(FAILED, _unreadable(error)))

    def _confirm(self, grid: HttpGrid, upload: _Upload) -> None:
        """Let the SuperLink forget the message; if that fails, the memory is the SuperLink's problem."""
        request = ConfirmMessageReceivedRequest(
            node=grid.node, run_id=grid.run.run_id, message_object_id=upload.message_id
        )
        with contextlib.suppress(HTTPStatusError):
            grid._runtime_client.ConfirmMessageReceived(request)


def array_bytes(contents: Mapping[str, bytes]) -> int:
    """The size of the arrays that Flower makes of these objects: a chunk counts as often as an array names it.

    Raises:
        ValueError, LookupError, TypeError: the objects are not in Flower's form.
    """
    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == "Array":
            named = Counter(json.loads(get_object_body(content, Array))["arraychunk_ids"])
            total += sum(times * len(contents[children[index]]) for index, times in named.items())
    return total


def _inflated(upload: _Upload) -> Message:
    """The message, with the SuperLink's metadata."""
    found = inflate_object_from_contents(upload.message_id, upload.contents)
    if not isinstance(found, Message):
        raise TypeError(f"{type(found).__name__} instead of a message")
    if found.has_error():
        return make_message(upload.metadata, error=found.error)
    if not isinstance(found.content, RecordDict):
        raise TypeError(f"{type(found.content).__name__} instead of records")
    return make_message(upload.metadata, found.content)


def _unreadable(error: Exception) -> str:
    return f"the answer cannot be read ({type(error).__name__})"


def error_reply(message_id: str, code: int, reason: str) -> Message:
    """An error reply that no client sent, in the form of the SuperLink's own."""
    return make_message(
        Metadata(
            run_id=0,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id=message_id,
            group_id="",
            created_at=time.time(),
            ttl=1.0,
            message_type="query",
        ),
        error=Error(code, reason),
    )
