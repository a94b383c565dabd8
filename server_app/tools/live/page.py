"""``fedalloy report RUN --page``: one run as one HTML file; ``--csv``: every client's metrics by round."""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedalloy_adapters.files.atomic_files import write_durably
from server_app.ledger.store import Ledger, LedgerError
from server_app.run.clients.client_status import times_of
from server_app.run.clients.held_out import PERSONAL
from server_app.run.ending.adoption import words_of
from server_app.tools.compare.figures import COLOURS, DASHES, Table, as_table, figure
from server_app.tools.compare.html import STYLE, THEME, ReportError
from server_app.tools.compare.records import as_csv, kinds_of, read_run
from server_app.tools.live.state import RunState, read_state
from server_app.tools.live.table import clock, headline

LATE = ("late", "left", "absent", "failed", "rejected", "rested")


def write_csv(run: Path, destination: Path) -> None:
    """Write a line for each client, round and phase: status, seconds, metrics, bytes.

    Raises:
        RunDirectoryError: there is no run.
        LedgerError: its ledger cannot be read.
        OSError: the file cannot be written.
    """
    state = read_state(run, details=False)
    found = read_run(state.strategy, int(state.summary.get("seed", 0)), run)
    write_durably(destination.resolve(), as_csv(found.rows).encode())


def write_page(run: Path, destination: Path) -> None:
    """Write the page.

    Raises:
        RunDirectoryError: there is no run.
        ReportError: plotly is not installed.
        OSError: the file cannot be written.
    """
    write_durably(destination.resolve(), as_page(read_state(run)).encode())


def as_page(state: RunState) -> str:
    """A page about a run: its clients, learning curves, late clients, bytes, and times.

    Raises:
        ReportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError("a page needs plotly: pip install 'fedalloy[report]'") from None
    title = f"{state.path.resolve().name}: {state.strategy}"
    parts = [
        ("Clients", as_table(clients(state))),
        ("Learning curves", "".join(curves(state.records, name) for name in ("accuracy", "loss"))),
        ("Training loss", training(state.records)),
        ("What was merged", as_table(weights(state.records))),
        ("Who was late", as_table(outcomes(state.records))),
        ("Bytes", as_table(sizes(state))),
        ("What took the time", as_table(seconds(state.records))),
    ]
    text = "".join(f"<h2>{name}</h2>{part}" for name, part in parts if "<td" in part)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><main>"
        f'<h1>{html.escape(title)}</h1><ul class="glance"><li>{html.escape(headline(state))}</li></ul>'
        f"{text}</main><script>{THEME}</script></body></html>\n"
    )


def clients(state: RunState) -> Table:
    """Each client's last metrics on its own examples, the model that it was given, and why."""
    last: dict[str, Mapping[str, Any]] = {}
    examples: dict[str, Any] = {}
    for record in state.records:
        for name, client in record["clients"].items():
            examples.setdefault(name, client.get("examples", ""))
            if client.get("metrics", {}).get(PERSONAL):
                last[name] = client
    names = sorted({key for client in last.values() for key in client["metrics"][PERSONAL] if "/" not in key})
    body = []
    for name, client in sorted(last.items()):
        choice = client.get("choice") or _adopted(client)
        numbers = [_number(client["metrics"][PERSONAL].get(key)) for key in names]
        body.append([name, examples.get(name, ""), *numbers, choice.get("given", ""), choice.get("why", "")])
    chosen = any(row[-2] for row in body)
    heads = ["client", "training examples", *names, *(["given", "why"] if chosen else [])]
    return heads, [row if chosen else row[:-2] for row in body]


def _adopted(client: Mapping[str, Any]) -> dict[str, str]:
    return {"given": "adopted", "why": words_of(client["adopted"])} if "adopted" in client else {}


def curves(records: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Each client's model at the start of each round, and the delivered one; empty if no client has the metric."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        if record["phase"] in ("train", "deliver"):
            for name, client in record["clients"].items():
                values = client.get("metrics", {}).get(PERSONAL, {})
                if metric in values:
                    found[name][int(record["round"]) - 1] = values[metric]
    caption = f"{metric.capitalize()} of each client's model"
    return _lines(
        found, caption, "rounds done", metric, "Rounds are on validation examples, the delivery is on test examples."
    )


def training(records: Sequence[Mapping[str, Any]]) -> str:
    """The mean loss of a round's last train step, by client."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        for name, client in record["clients"].items() if record["phase"] == "train" else ():
            losses = [loss for loss in client.get("train_loss", ()) if loss is not None]
            if losses:
                found[name][int(record["round"])] = losses[-1]
    return _lines(found, "Training loss", "round", "mean loss of the last train step", "")


def _lines(found: Mapping[str, Mapping[int, float]], caption: str, x: str, y: str, note: str) -> str:
    if not found:
        return ""
    import plotly.graph_objects as go

    chart, body = go.Figure(), []
    for place, (name, values) in enumerate(sorted(found.items())):
        line = {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place // len(COLOURS) % len(DASHES)]}
        ordered = sorted(values.items())
        chart.add_scatter(
            x=[at for at, _ in ordered], y=[value for _, value in ordered], mode="lines+markers", name=name, line=line
        )
        body.append([name, " ".join(f"{at}: {value:.3f}" for at, value in ordered)])
    rounds = max(at for values in found.values() for at in values)
    chart.update_layout(xaxis_title=x, yaxis_title=y, xaxis_dtick=max(1, -(-rounds // 12)))  # no half rounds
    said = f"{caption}, a line for each of {len(body)} clients."
    return figure(chart, caption, said, (["client", f"{y} by {x}"], body), 420 + 8 * len(body), note)


def weights(records: Sequence[Mapping[str, Any]]) -> Table:
    """The weights of the last round that recorded some, as the strategy writes them."""
    last: Any = {}
    for record in records:
        found = record.get("settled", {}).get("weights")
        last = found if isinstance(found, dict) and found else last
    return ["client", "weights"], [[name, _weights(found)] for name, found in sorted(last.items())]


def _weights(found: Any) -> str:
    if isinstance(found, Mapping):
        return ", ".join(f"{key} {_number(value)}" for key, value in found.items() if isinstance(value, int | float))
    if isinstance(found, list):
        return ", ".join(_number(value) for value in found)
    return _number(found)


def outcomes(records: Sequence[Mapping[str, Any]]) -> Table:
    """How often each client did not answer, and why; only clients that missed something."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for name, client in record["clients"].items() if record["phase"] in ("train", "deliver") else ():
            counts[name][client["status"]] += 1
    heads = ["client", "ok", *LATE]
    missed = {name: found for name, found in sorted(counts.items()) if sum(found[status] for status in LATE)}
    return heads, [[name, *(found[status] for status in heads[1:])] for name, found in missed.items()]


def sizes(state: RunState) -> Table:
    """Where the bytes of all clients went, in both directions."""
    try:
        with Ledger(state.path / "ledger.sqlite", read_only=True) as ledger:
            found = kinds_of(ledger.accounts())
    except LedgerError:
        return ["what", "up", "down"], []
    names = list(dict.fromkeys(name for kinds in found.values() for name in kinds))
    return ["what", "up", "down"], [
        [name, *(f"{found[way].get(name, 0):,}" for way in ("up", "down"))] for name in names
    ]


def seconds(records: Sequence[Mapping[str, Any]]) -> Table:
    """Each phase's time, its slowest client, and what that client did."""
    body = []
    for record in records:
        answered = {name: client for name, client in record["clients"].items() if client.get("seconds") is not None}
        row = [f"{record['phase']} {record['round']}", clock(float(record.get("seconds", 0.0))), "", ""]
        if answered:
            slowest = max(answered, key=lambda name: float(answered[name]["seconds"]))
            spent = [f"{what} {took:.1f} s" for what, took in times_of(answered[slowest]).items() if took]
            row[2:] = [f"{slowest} ({float(answered[slowest]['seconds']):.1f} s)", ", ".join(spent)]
        body.append(row)
    return ["phase", "time", "slowest client", "of that"], body


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
