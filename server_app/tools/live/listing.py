"""``fedalloy runs``: every run of a folder, with its state and score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from server_app.run.run_directory import RunDirectoryError
from server_app.tools.live.state import RunState, read_state
from server_app.tools.live.table import clock


def runs_in(folder: Path) -> Iterator[RunState]:
    """The runs of a folder, oldest first; other files are skipped.

    Raises:
        RunDirectoryError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunDirectoryError(f"{folder} is not a folder, expected one with runs in it (runs-dir)")
    found = [path.parent for path in folder.glob("*/config.toml")]
    for path in sorted(found, key=lambda run: ((run / "config.toml").stat().st_mtime, run.name)):
        try:
            yield read_state(path, details=False)
        except RunDirectoryError:  # its configuration cannot be read
            continue


def as_row(run: RunState) -> dict[str, Any]:
    """One run as a row of the list."""
    trained = [int(record["round"]) for record in run.records if record["phase"] == "train"]
    wire: Mapping[str, Mapping[str, Any]] = run.summary.get("bytes", {})
    moved = [sizes.get("wire") or sizes.get("message") for sizes in wire.values()]
    return {
        "run": run.path.name,
        "strategy": run.strategy,
        "state": run.state,
        "rounds": f"{max(trained, default=0)}/{run.rounds}",
        "mean_accuracy": run.summary.get("mean_accuracy"),
        "worst_accuracy": run.summary.get("worst_accuracy"),
        "megabytes": round(sum(size for size in moved if size) / 1e6, 3) if any(moved) else None,
        "seconds": round(run.seconds, 1),
        "why": run.why,
    }


def as_list(rows: list[dict[str, Any]]) -> Table:
    """The list, as wide as a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", max_width=28)
    for name in ("strategy", "state"):
        table.add_column(name)
    for name in ("rounds", "mean", "worst", "MB", "time"):
        table.add_column(name, justify="right")
    for row in rows:
        scores = [row["mean_accuracy"], row["worst_accuracy"], row["megabytes"]]
        shown = ["" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.0f}" for value in scores]
        table.add_row(row["run"], row["strategy"], row["state"], row["rounds"], *shown, clock(row["seconds"]))
    return table
