"""Why a client failed, in plain words: without Flower's classes and error numbers, and with our own error first."""

from __future__ import annotations

import re

from flwr.app import Error, Message

from fedalloy_adapters.words import one_line
from strategies.framework.exchange import MAX_REASON

_RAISED = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>:<'(.*)'>", re.S)
_CARRIERS = ("ClientError", "JobFailedError", "SiteError")
"""Our errors whose message names the original error; their own class means nothing to a user."""
SILENT = "did not answer in time"
LOST = "it did not answer in time, or its answer was lost on the way"
OFFLINE = "its SuperNode is not online"
PASSING = (SILENT, LOST, OFFLINE)
"""Beginnings of reasons that may have passed the next time."""
CODES = {
    1: "its ClientApp cannot be loaded: is FedAlloy installed there, for the Python that its SuperNode runs?",
    3: LOST,
    4: LOST,
    5: OFFLINE,
    7: "it got another app than this one",
    8: "its process ended: killed, or out of memory?",
}
"""Flower's error codes (1.39) in words."""


def is_from_client(reply: Message | None) -> bool:
    """Whether a reply comes from a client's app, not from the SuperLink in its stead; None is no reply."""
    return reply is not None and not (reply.has_error() and CODES.get(reply.error.code) in (LOST, OFFLINE))


def reason_of(error: Error) -> str:
    """The reason in an error reply of a client or the SuperLink, in one line."""
    said = str(error.reason or "")
    if raised := _RAISED.fullmatch(said.strip()):
        name, words = raised.groups()
        said = words if name in _CARRIERS else f"{name}: {words}" if words else name
    elif words := CODES.get(error.code):
        said = f"{words} ({said})" if said and words != LOST else words  # Flower's sentence lists possible causes
    return one_line(said or f"it gave no reason (Flower's error {error.code})", MAX_REASON)
