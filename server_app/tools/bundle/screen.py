"""A streamed log without Flower's traceback: one line says why a run ended.

If the error is ours, the ServerApp itself has logged it in one line (:mod:`server_app.run.ending.failure`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from server_app.run.ending.failure import FAILED, OURS, STOPPED

_RAISED = re.compile(r"ServerApp raised an exception")
"""Flower (1.39) writes this before the traceback, and "Exit Code: 201" after it, both at the end of a run's log."""
_TOLD = re.compile(rf"^(?:\x1b\[\d+m)?ERROR\b.*?:\s+(?:{FAILED}|{STOPPED})(.*)$", re.M)
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):$", re.M)
_LOGGED = re.compile(r"^(\x1b\[\d+m)?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b.*", re.M | re.S)


class Screen:
    """Passes on a run's log; if a failure has a traceback, only its reason, in one line.

    Args:
        write: prints text as it is.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._rest = ""  # the part of a line that has not ended
        self._kept: list[str] = []  # everything from the traceback on
        self.failed = False

    @property
    def kept_back(self) -> bool:
        """Whether Flower has written more than was passed on."""
        return bool(self._kept)

    def feed(self, text: str) -> None:
        """Take a piece of the log, which may end within a line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line + "\n")

    def end(self) -> None:
        """End the log: write the reason of a failure, unless the run has said it."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        if not self._kept:
            return
        kept = "".join(self._kept)
        reason = reason_in(kept)
        self._write(f"error: {reason}\n" if reason else kept)

    def _line(self, line: str) -> None:
        if self._kept or _RAISED.search(line):
            self.failed = True
            self._kept.append(line)
            return
        self.failed = self.failed or bool(_TOLD.search(line))
        self._write(line)


def reason_in(log: str) -> str:
    """Why the run failed, by its log: its own reason, or the message of the last traceback's error; else empty."""
    if told := _TOLD.findall(log):
        return str(told[-1]).strip()
    *_, last = _TRACEBACK.split(log)
    if last == log:
        return ""
    body = _LOGGED.sub("", last).strip("\n").split("\n")
    raised = [line.strip() for line in body if line.strip() and not line.startswith(" ")]
    if not raised:
        return ""
    name, _, words = " ".join(raised).partition(": ")
    if words and name.startswith(OURS):
        return words
    return f"{name.rpartition('.')[2]}: {words}" if words else name.rpartition(".")[2]
