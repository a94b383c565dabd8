"""A run as a table of at most 80 columns, and as plain lines without a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from server_app.tools.live.state import FINISHED, RUNNING, ClientState, RunState

WIDTH = 80
SHOWN = 30
"""Largest number of clients shown, working ones first: a screen has no room for more."""
_WORDS = {
    "register": "clients register", "waiting": "waiting for clients", "train": "training", "deliver": "delivery",
    "counters": "last counters", "resumed": "resumed", "stopped": "stopped", "": "starting",
    "adopt": "newcomers adopt", "lend": "adapters are lent",
}  # fmt: skip


def as_table(run: RunState) -> RenderableType:
    """Each client's step, progress, loss, score and bytes so far."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("client", width=16, no_wrap=True, overflow="ellipsis")
    table.add_column("state", width=16, no_wrap=True, overflow="ellipsis")
    for name, width in (("steps", 11), ("loss", 7), ("score", 6), ("kB up", 8), ("kB down", 8)):
        table.add_column(name, width=width, justify="right", no_wrap=True)
    ordered = sorted(run.clients, key=lambda client: (client.status != "asked", client.name))
    for client in ordered[:SHOWN]:
        table.add_row(
            client.name,
            _state(client),
            f"{client.done}/{client.total}" if client.total else "",
            _number(client.loss),
            _number(client.score),
            _kilobytes(client.up),
            _kilobytes(client.down),
        )
    more = [Text(f"... and {len(ordered) - SHOWN} more")] if len(ordered) > SHOWN else []
    return Group(Text(headline(run), style="bold", no_wrap=True, overflow="ellipsis"), table, *more)


def headline(run: RunState) -> str:
    """The state of a run, in one line."""
    where = f"round {run.round}/{run.rounds}" if run.phase == "train" else _WORDS.get(run.phase, run.phase)
    words = [f"{run.path.name}: {run.strategy}, {where if run.state == RUNNING else run.state}", clock(run.seconds)]
    if run.left is not None:
        words.append(f"about {clock(run.left)} left")
    waiting = sum(client.status == "asked" for client in run.clients)
    if run.state == RUNNING and waiting:
        words.append(f"{waiting} at work")
    if run.state == FINISHED and run.summary.get("mean_accuracy") is not None:
        words.append(f"mean accuracy {run.summary['mean_accuracy']:.3f}")
    return ", ".join(words)


def line_of(record: Mapping[str, Any], rounds: int) -> str:
    """One line for a finished phase: how many answered, the mean score, and who did not answer and why."""
    clients = record["clients"]
    what = f"round {record['round']}/{rounds}" if record["phase"] == "train" else _WORDS.get(record["phase"], "")
    good = [client for client in clients.values() if client["status"] == "ok"]
    parts = [f"{what or record['phase']}: {len(good)} of {len(clients)} answered" if clients else what]
    losses = [loss for client in good for loss in client.get("train_loss", ())[-1:] if loss is not None]
    parts += [f"loss {sum(losses) / len(losses):.3f}"] if losses else []
    scores = [client["metrics"]["personal"]["accuracy"] for client in good if "accuracy" in _personal(client)]
    parts += [f"accuracy {sum(scores) / len(scores):.3f}"] if scores else []
    parts.append(clock(float(record.get("seconds", 0.0))))
    bad: dict[str, list[str]] = {}
    for name, client in clients.items():
        if client["status"] != "ok":
            bad.setdefault(client["status"], []).append(name)
    parts += [f"{status}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for status, names in bad.items()]
    return ", ".join(parts) + (f": {record['reason']}" if "reason" in record else "")


def _personal(client: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = client.get("metrics", {}).get("personal", {})
    return found


def _state(client: ClientState) -> str:
    if client.status == "asked":
        return client.activity or "at work"
    seconds = f" {client.seconds:.1f} s" if client.seconds is not None and client.status == "ok" else ""
    return f"{client.status}{seconds}"


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes.

    >>> clock(65), clock(7260)
    ('1:05', '2 h 01 min')
    """
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}"


def _kilobytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1000:,.0f}"
