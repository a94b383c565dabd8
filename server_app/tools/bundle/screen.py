"""A streamed log without Flower's traceback: one line of ours says why a run ended."""

from __future__ import annotations

import re
from collections.abc import Callable

_FAILED = re.compile(r"ServerApp raised an exception")
"""What Flower (1.39) writes before the traceback, and "Exit Code: 201" after it; both are the last that a run says."""
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):$", re.M)
_LOGGED = re.compile(r"^(\x1b\[\d+m)?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b.*", re.M | re.S)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_OURS = ("client_app.", "fedalloy_adapters.", "server_app.", "strategies.")
"""Packages whose errors are in words for people: their class says nothing more."""
STOPPED = "stopped: "
"""What a run itself writes when it cannot go on, before it raises."""


class Screen:
    """Passes on what a run says, up to its failure, and then the reason in one line.

    Args:
        write: prints text as it is.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._rest = ""  # of a line that has not ended
        self._said = ""  # why the run stopped, in its own words
        self._kept: list[str] = []  # from the failure on
        self.failed = False

    def feed(self, text: str) -> None:
        """A piece of the log, which may end within a line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line + "\n")

    def end(self) -> None:
        """Nothing more comes: the reason of a failure, unless the run has said it."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        if not self.failed:
            return
        kept, self._kept = "".join(self._kept), []
        reason = reason_in(kept)
        if not reason:
            self._write(kept)
        elif reason != self._said:
            self._write(f"error: {reason}\n")

    def _line(self, line: str) -> None:
        if self.failed or _FAILED.search(line):
            self.failed = True
            self._kept.append(line)
            return
        if STOPPED in line:
            self._said = _COLOURS.sub("", line.split(STOPPED, 1)[1]).strip()
        self._write(line)


def reason_in(log: str) -> str:
    """The words of the last error in a log with a traceback; empty where there is none."""
    *_, last = _TRACEBACK.split(log)
    if last == log:
        return ""
    body = _LOGGED.sub("", last).strip("\n").split("\n")
    raised = [line.strip() for line in body if line.strip() and not line.startswith(" ")]
    if not raised:
        return ""
    name, _, words = " ".join(raised).partition(": ")
    if words and name.startswith(_OURS):
        return words
    return f"{name.rpartition('.')[2]}: {words}" if words else name.rpartition(".")[2]
