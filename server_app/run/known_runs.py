"""Where the runs of a SuperLink are, wherever they were written: a list that its ServerApps keep, for tools beside it.

``<FLWR_HOME>/fedalloy/runs.jsonl`` has the absolute path of each run's folder on a line of its own, the oldest first.
Without ``FLWR_HOME`` in a ServerApp's environment there is no such file.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from fedalloy_adapters.files.atomic_files import open_private, private_folder


def note_run(run: Path) -> None:
    """Add a run's folder to the list of this process's ``FLWR_HOME``; nothing depends on that list."""
    home = os.environ.get("FLWR_HOME")
    if not home:
        return
    with contextlib.suppress(OSError):
        path = _list(Path(home).expanduser())
        private_folder(path.parent)
        with open(open_private(path, os.O_WRONLY | os.O_APPEND), "a") as file:
            file.write(json.dumps(str(run.resolve())) + "\n")


def known_runs(home: Path) -> list[Path]:
    """The list of a ``FLWR_HOME``: folders that may be gone by now."""
    with contextlib.suppress(OSError, ValueError):
        return [Path(json.loads(line)) for line in _list(home).read_text().splitlines()]
    return []


def _list(home: Path) -> Path:
    return home / "fedalloy" / "runs.jsonl"
