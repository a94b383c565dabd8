"""A run's progress, in ``progress.json`` of its folder, for ``fedalloy watch``: who was asked and has answered.

A client cannot send a message on Flower's Fleet link while it works: a SuperNode answers one message at a time.
So the server knows phases and finished clients; steps and losses within a round are in the clients' own folders
(:mod:`client_app.plan.progress_file`), and no byte is sent for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedalloy_adapters.files.atomic_files import write_lightly

NAME = "progress.json"
LEAST_SECONDS = 0.5


class Progress:
    """Rewrites the file at most every half second, and at each new phase; the run goes on even if the disk is full."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self._path = folder / NAME
        self._found: dict[str, Any] = {"rounds": rounds, "clients": {}}
        self._last = float("-inf")

    def phase(self, phase: str, round_: int, clients: Iterable[str]) -> None:
        """Begin a phase in which these clients are asked."""
        asked = {name: {"status": "asked"} for name in sorted(clients)}
        self._found |= {"phase": phase, "round": round_, "since": time.time(), "clients": asked}
        self._write()

    def answered(self, client_id: str, record: Mapping[str, Any]) -> None:
        """Note that one of them has answered, or failed."""
        losses = [loss for loss in record.get("train_loss", ()) if loss is not None]
        said = {"status": record["status"], "seconds": record.get("seconds")}
        self._found["clients"][client_id] = said | ({"loss": losses[-1]} if losses else {})
        if time.monotonic() - self._last >= LEAST_SECONDS:
            self._write()

    def remove(self) -> None:
        """Remove the file, because the run has ended."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._last = time.monotonic()
        with suppress(OSError):
            write_lightly(self._path, self._found)
