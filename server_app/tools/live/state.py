"""A run's state, read only from its folder: finished, running or stopped; progress, bytes, expected end."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from client_app.plan.progress_file import NAME as CLIENTS_FILE
from fedalloy_adapters.files.atomic_files import locked
from server_app.run.progress import NAME
from server_app.run.run_directory import RunDirectory, RunDirectoryError

FINISHED, RUNNING, STOPPED, BEGUN = "finished", "running", "stopped", "interrupted"
STALE_SECONDS = 600.0
"""Age in seconds above which a client's progress file belongs to an ended process."""


@dataclass(frozen=True)
class ClientState:
    """One client in the present phase; ``asked`` until it has answered. Loss and steps only if they are known here."""

    name: str
    status: str
    activity: str = ""
    done: int = 0
    total: int = 0
    loss: float | None = None
    score: float | None = None
    seconds: float | None = None
    up: int | None = None
    down: int | None = None


@dataclass(frozen=True)
class RunState:
    """A run at one moment.

    ``state`` is one of the constants above; ``phase`` and ``round`` (of ``rounds``) say where it is; ``why`` is the
    reason if it stopped; ``left`` the seconds until its expected end, None if not known.
    """

    path: Path
    state: str
    strategy: str
    rounds: int
    phase: str = ""
    round: int = 0
    seconds: float = 0.0
    left: float | None = None
    why: str = ""
    clients: Sequence[ClientState] = ()
    records: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come without a new command."""
        return self.state != RUNNING


def read_state(path: Path, *, details: bool = True) -> RunState:
    """The state of the run in a folder.

    Args:
        path: the run's folder.
        details: whether to read clients and bytes, too.

    Raises:
        RunDirectoryError: there is no run.
    """
    directory = RunDirectory(path)
    if not (path / "config.toml").exists():
        raise RunDirectoryError(f"{path} holds no run (no config.toml)")
    config, records = directory.config(), directory.rounds()
    rounds = int(config.get("num-server-rounds", 5))
    now = read_json(path / NAME)
    summary = read_json(path / "summary.json")
    last: Mapping[str, Any] = records[-1] if records else {"phase": "", "round": 0}
    state = _state_of(path, summary, last)
    phase, round_ = str(last["phase"]), int(last["round"])
    if state == RUNNING and now:
        phase, round_ = str(now.get("phase", "")), int(now.get("round", 0))
    return RunState(
        path,
        state,
        str(config.get("strategy", "fedavg")),
        rounds,
        phase,
        round_,
        _seconds(records, now if state == RUNNING else {}),
        _left(records, now, rounds) if state == RUNNING else None,
        str(last.get("reason", "")) if state == STOPPED else "",
        _clients(path, records, now if state == RUNNING else {}) if details else (),
        records,
        summary,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or incomplete."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state_of(path: Path, summary: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    if is_carried_out(path):
        return RUNNING
    if summary:
        return FINISHED
    return STOPPED if last["phase"] == "stopped" else BEGUN


def is_carried_out(path: Path) -> bool:
    """Whether a process on this machine holds the run's lock."""
    if not (path / ".lock").exists():
        return False
    try:
        with locked(path / ".lock", wait=False):
            return False
    except BlockingIOError:
        return True
    except OSError:  # this user may not open it
        return (path / NAME).exists()


def _seconds(records: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> float:
    done = sum(float(record.get("seconds", 0.0)) for record in records if record["phase"] != "resumed")
    return done + (max(0.0, time.time() - float(now["since"])) if "since" in now else 0.0)


def _left(records: Sequence[Mapping[str, Any]], now: Mapping[str, Any], rounds: int) -> float | None:
    """Seconds left, if each further round takes the median time of those done, and the delivery as long as a round."""
    done = [float(record["seconds"]) for record in records if record["phase"] == "train"]
    if not done:
        return None
    finished = max(int(record["round"]) for record in records if record["phase"] == "train")
    since = max(0.0, time.time() - float(now["since"])) if "since" in now else 0.0
    return max(0.0, (rounds - finished + 1) * median(done) - since)


def _clients(path: Path, records: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[ClientState]:
    last: dict[str, Mapping[str, Any]] = {}
    scores: dict[str, float] = {}
    for record in records:
        for name, client in record["clients"].items():
            last[name] = client
            score = score_of(client)
            scores.update({} if score is None else {name: score})
    asked: Mapping[str, Any] = now.get("clients", {})
    moved = _bytes(path)
    found = []
    for name in sorted({*last, *asked}):
        said = asked.get(name, last.get(name, {"status": ""}) if not asked else {"status": "-"})
        losses = [loss for loss in last.get(name, {}).get("train_loss", ()) if loss is not None]
        own = read_json(path / "clients" / name / CLIENTS_FILE) if said.get("status") == "asked" else {}
        if time.time() - float(own.get("time", 0.0)) > STALE_SECONDS or own.get("round") != now.get("round"):
            own = {}
        up, down = moved.get((name, "up")), moved.get((name, "down"))
        loss = own.get("loss", said.get("loss", losses[-1] if losses else None))
        found.append(
            ClientState(
                name,
                str(said.get("status", "")),
                str(own.get("activity", "")),
                int(own.get("done", 0)),
                int(own.get("total", 0)),
                loss,
                scores.get(name),
                said.get("seconds"),
                up,
                down,
            )
        )
    return found


def score_of(client: Mapping[str, Any]) -> float | None:
    """The accuracy of a client's personal model in a record; None if it was not evaluated, or has none."""
    found = client.get("metrics", {}).get("personal", {}).get("accuracy")
    return None if found is None else float(found)


def _bytes(path: Path) -> dict[tuple[str, str], int]:
    """Bytes of Flower's messages so far, by client and direction; empty if the ledger cannot be read."""
    if not (path / "ledger.sqlite").exists():
        return {}
    try:
        with sqlite3.connect(f"file:{path / 'ledger.sqlite'}?mode=ro", uri=True, timeout=1) as db:
            rows = db.execute("SELECT client, direction, SUM(bytes) FROM message GROUP BY client, direction")
            return {(client, direction): int(total) for client, direction, total in rows}
    except sqlite3.Error:
        return {}
