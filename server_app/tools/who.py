"""The clients of a federation: id, node, key, task, base model, and when each was last seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from server_app.run.run_directory import RunDirectory


def registrations(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Each client's registration in a run, or why it was refused, by name.

    ``run`` is the run's name; ``seen`` the time (ISO 8601, UTC) of the client's last answer that counted, if any.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in run.rounds():
        for client, said in record["clients"].items():
            if record["phase"] == "register":
                seen = found.get(client, {}).get("seen", "")
                found[client] = {**said, "tasks": ", ".join(said.get("tasks", [])), "run": run.path.name, "seen": seen}
            if said.get("status") == "ok" and client in found:
                found[client]["seen"] = record.get("time", "")
    return found


def last_registrations(runs_dir: Path, more: Iterable[Path] = ()) -> Mapping[str, Mapping[str, Any]]:
    """The last registration of each client in any run of a folder, or in one of ``more`` runs."""
    found: dict[str, dict[str, Any]] = {}
    runs = {path.resolve() for path in (*runs_dir.glob("*"), *more) if (path / "rounds.jsonl").exists()}
    for path in sorted(runs, key=lambda run: (run / "rounds.jsonl").stat().st_mtime):
        found |= registrations(RunDirectory(path))
    return found


def who_table(clients: Mapping[str, Mapping[str, Any]], now: datetime | None = None) -> Table:
    """A table with a line for each client; a key is named if its name is not the client's."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title="Who is who", title_justify="left")
    for column in ("client", "node", "key", "examples", "task", "base model", "seen"):
        whole = column in ("node", "seen")  # a number on two lines cannot be copied
        table.add_column(column, overflow="fold", no_wrap=whole, justify="right" if column == "examples" else "left")
    for name, said in clients.items():
        key = str(said["key"]) or "none" if "key" in said else ""
        status = {"rejected": "refused", "left": "absent"}.get(str(said.get("status", "")), "")
        seen = status or ago(str(said.get("seen", "")), now)
        shown = [str(said.get(column, "")) for column in ("node", "examples", "tasks")]
        base = str(said.get("base", ""))
        shown.append(Path(base).name if base.startswith("/") else base)  # report --json has all of it
        table.add_row(name, shown[0], "same" if key == name else key, *shown[1:], seen)
    return table


def ago(time: str, now: datetime | None = None) -> str:
    """The time since something happened, in one unit."""
    try:
        seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(time)).total_seconds()
    except (ValueError, TypeError):
        return ""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
