"""How far a plan is, told to whoever listens; and the one place where a plan can be cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Cancelled(RuntimeError):
    """Nobody waits for this plan any more; its changes are thrown away."""


def tick(activity: str, done: int = 0, total: int = 0) -> None:
    """Say that ``done`` of ``total`` batches are done; loops over batches call it for each.

    Raises:
        Cancelled: the plan is to end here.
    """
    listener = _listener.get()
    if listener is not None:
        listener(activity, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block, ``listener`` is called with every :func:`tick`; what it raises ends the plan."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
