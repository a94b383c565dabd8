"""One exchange of messages: only a few are on their way to the SuperLink at any time; the others are not made yet."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from fedalloy_adapters.wire.flower_records import blobs_in
from server_app.run.messages.replies import MESSAGE_UNAVAILABLE, error_reply

NODE_UNAVAILABLE, APP_STOPPED = 5, 8
"""Flower's (1.39) error codes for a client that is gone, and for one whose process ended."""
ATTEMPTS = {NODE_UNAVAILABLE: 3, APP_STOPPED: 3, MESSAGE_UNAVAILABLE: 2}
"""Largest number of times that a client is asked, by error."""
Make = Callable[[], Message]
"""Makes a client's message, again each time it is asked: stored messages would cost memory."""
AT_ONCE = 4
"""Pushes side by side; their messages are held in memory until the SuperLink has all of them."""
BATCH, BATCH_BYTES = 4, 2**20
"""Most messages in one push, which one call announces, and bytes of their adapters (one alone may be larger)."""


class Watch(Protocol):
    """Called just before and just after each message is pushed, and for replies that are not handed on."""

    def pushing(self, client_id: str) -> None:
        """A message is about to be pushed."""

    def pushed(self, client_id: str, message: Message) -> None:
        """It has been pushed."""

    def lost(self, client_id: str, message: Message) -> None:
        """A reply that is not an answer; the client may be asked again."""


@dataclass(frozen=True)
class Reply:
    """The outcome of one message: the reply, or None if the time ran out. It was sent ``attempts`` times."""

    client_id: str
    message: Message | None
    seconds: float
    attempts: int = 1


class Sender(Protocol):
    """Sends messages and hears about clients; see :class:`server_app.run.federation.Federation`."""

    grid: Grid

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Send the messages; returns their ids, or None for a message whose node went away in between."""

    def overdue(self, message_id: str, client_id: str) -> None:
        """Nobody waits for the answer to this message any more."""

    def gone(self, client_id: str) -> None:
        """The client is not there."""


class Exchange:
    """The state of an exchange by client: still to be asked, waited for, or lost.

    Messages are made in the order of ``makes``, a few when there is room for them. If the grid is Flower's
    ``HttpGrid``, threads push them; any other grid takes them in this process, before the next look for replies.
    """

    def __init__(self, federation: Sender, makes: Mapping[str, Make], watch: Watch) -> None:
        self.federation = federation
        self.makes = makes
        self.watch = watch
        self.waiting: dict[str, str] = {}  # clients by the message that they should answer
        self.lost: dict[str, Message] = {}
        self.started = time.monotonic()
        self._attempts = dict.fromkeys(makes, 0)
        self._queue = deque(makes)
        self._pushes: dict[Future[list[str | None]], dict[str, Message]] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE) if isinstance(federation.grid, HttpGrid) else None

    @property
    def is_open(self) -> bool:
        """Whether a client must still be asked, or must still answer."""
        return bool(self._queue or self._pushes or self.waiting)

    def push(self) -> None:
        """Make and push as many messages as there is room for; record those that have been pushed."""
        self._book([push for push in self._pushes if push.done()])
        while self._queue and len(self._pushes) < AT_ONCE:
            batch = self._batch()
            messages = list(batch.values())
            if self._pool is not None:
                self._pushes[self._pool.submit(self.federation.push, messages)] = batch
            else:
                self._pushed(batch, self.federation.push(messages))

    def _batch(self) -> dict[str, Message]:
        """The next messages, by client: at least one, and no more than fit (:data:`BATCH`)."""
        batch: dict[str, Message] = {}
        size, most = 0, BATCH if self._pool is not None else 1
        while self._queue and len(batch) < most and size < BATCH_BYTES and self._queue[0] not in batch:
            client_id = self._queue.popleft()
            self._attempts[client_id] += 1
            batch[client_id] = message = self.makes[client_id]()
            size += sum(map(len, blobs_in(message.content).values()))
            self.watch.pushing(client_id)
        return batch

    def taken(self, reply: Message, again: Callable[[str, Message], bool]) -> Reply | None:
        """Take a reply to one of :attr:`waiting`; None if its client is asked again (at once if ``again``)."""
        client_id = self.waiting.pop(reply.metadata.reply_to_message_id)
        if again(client_id, reply):
            self.watch.lost(client_id, reply)
            self._queue.append(client_id)
            return None
        if reply.has_error() and self._attempts[client_id] < ATTEMPTS.get(reply.error.code, 0):
            self.lost[client_id] = reply
            if reply.error.code == NODE_UNAVAILABLE:
                self.federation.gone(client_id)
            return None
        return self._reply(client_id, reply)

    def again(self, client_id: str) -> None:
        """Ask one of :attr:`lost` once more."""
        self.watch.lost(client_id, self.lost.pop(client_id))
        self._queue.append(client_id)

    def wait(self, seconds: float) -> None:
        """Wait until a push has ended, or the time is over."""
        if self._pushes:
            wait(self._pushes, timeout=seconds, return_when=FIRST_COMPLETED)
        elif not self._queue and (self.waiting or self.lost):
            time.sleep(seconds)

    def left(self) -> Iterator[Reply]:
        """At the end, the clients that are lost, were never asked, or have not answered."""
        if self._pool is not None:
            self._pool.shutdown()
        self._book(list(self._pushes))
        for client_id, message in self.lost.items():
            yield self._reply(client_id, message)
        for client_id in self._queue:
            yield self._reply(client_id, None)
        for message_id, client_id in self.waiting.items():
            self.federation.overdue(message_id, client_id)
            yield self._reply(client_id, None)

    def _book(self, ended: list[Future[list[str | None]]]) -> None:
        for push in ended:
            self._pushed(self._pushes.pop(push), push.result())

    def _pushed(self, batch: Mapping[str, Message], message_ids: Sequence[str | None]) -> None:
        for (client_id, message), message_id in zip(batch.items(), message_ids, strict=True):
            self.watch.pushed(client_id, message)
            if message_id is not None:
                self.waiting[message_id] = client_id
                continue
            reason = "the SuperLink did not take the message for this node"
            self.lost[client_id] = error_reply("", NODE_UNAVAILABLE, reason)
            self.federation.gone(client_id)

    def _reply(self, client_id: str, message: Message | None) -> Reply:
        return Reply(client_id, message, time.monotonic() - self.started, self._attempts[client_id])
