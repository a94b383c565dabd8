"""Who is who in a federation: client, node, key, task, base model, as clients said when they registered last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server_app.run.run_directory import RunDirectory


def registrations(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """What each client of a run said of itself, or why it was refused, by its name; ``run`` is the run's."""
    found: dict[str, dict[str, Any]] = {}
    for record in run.rounds():
        if record["phase"] == "register":
            for client, said in record["clients"].items():
                found[client] = {**said, "tasks": ", ".join(said.get("tasks", [])), "run": run.path.name}
    return found


def last_registrations(runs_dir: Path) -> Mapping[str, Mapping[str, Any]]:
    """The last registration of each client in any run of a folder."""
    found: dict[str, dict[str, Any]] = {}
    runs = [path.parent for path in runs_dir.glob("*/rounds.jsonl")]
    for path in sorted(runs, key=lambda run: (run / "rounds.jsonl").stat().st_mtime):
        found |= registrations(RunDirectory(path))
    return found
