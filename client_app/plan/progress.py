"""A plan's progress, for listeners; and the only place where a plan can be cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
Watcher = Callable[[str, int, int, float | None], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


_deadline: ContextVar[tuple[float, float] | None] = ContextVar("deadline", default=None)


class OutOfTimeError(ValueError):
    """The plan has taken longer than the client's owner allows."""

    @property
    def told(self) -> str:
        """The whole message: the server may know the bound."""
        return str(self)


class Cancelled(RuntimeError):
    """Nobody waits for this plan any more; its changes are thrown away."""


def tick(activity: str, done: int = 0, total: int = 0, loss: float | None = None) -> None:
    """Report that ``done`` of ``total`` batches are done; loops over batches call it for each one.

    ``loss`` is the last batch's, if it has one.

    Raises:
        Cancelled: the plan must end here.
        OutOfTimeError: it is past the bound of :func:`within`.
    """
    bound = _deadline.get()
    if bound is not None and time.monotonic() > bound[0]:
        raise OutOfTimeError(f"the plan took longer than client.max-seconds, {bound[1]:g}")
    listener = _listener.get()
    if listener is not None:
        listener(activity, done, total)
    watcher = _watcher.get()
    if watcher is not None:
        watcher(activity, done, total, loss)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside the block, ``watcher`` also sees every :func:`tick`, but cannot end the plan."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block, ``listener`` is called with every :func:`tick`; what it raises ends the plan."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Inside the block, :func:`tick` ends the plan after this many seconds; 0: no bound."""
    token = _deadline.set((time.monotonic() + seconds, seconds) if seconds else None)
    try:
        yield
    finally:
        _deadline.reset(token)
