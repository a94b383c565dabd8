"""A client's progress, in a file beside its slots, for people at that machine. Nothing of it is sent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from client_app.plan.progress import watched
from fedalloy_adapters.files.atomic_files import write_lightly

NAME = "progress.json"


class ProgressFile:
    """Rewrites the file at most every few seconds; the plan goes on even if the disk is full or missing."""

    def __init__(self, folder: Path, round_: int, seconds: float) -> None:
        self._path = folder / NAME
        self._round = round_
        self._seconds = seconds
        self._last: tuple[float, str] = (float("-inf"), "")

    def __call__(self, activity: str, done: int, total: int, loss: float | None) -> None:
        """Write the file, unless it was written a moment ago."""
        now = time.monotonic()
        if now - self._last[0] < self._seconds:
            return
        self._last = now, activity
        found: dict[str, object] = {
            "round": self._round,
            "activity": activity,
            "done": done,
            "total": total,
            "time": time.time(),
        }
        if loss is not None:
            found["loss"] = float(f"{loss:.6g}")
        with suppress(OSError):
            write_lightly(self._path, found)

    def remove(self) -> None:
        """Remove the file, because the plan is done."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


@contextmanager
def shown_in(folder: Path, round_: int, seconds: float) -> Iterator[None]:
    """Inside the block, ``folder/progress.json`` says how far the plan is; with 0 seconds there is no such file."""
    if not seconds:
        yield
        return
    file = ProgressFile(folder, round_, seconds)
    try:
        with watched(file):
            yield
    finally:
        file.remove()
