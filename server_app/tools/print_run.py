"""``fedalloy report RUN``: the participants, all clients' models side by side, and the weights that merged them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server_app.run.clients.held_out import LABEL as HELD_OUT
from server_app.run.clients.held_out import PERSONAL
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from server_app.tools.who import registrations, who_table
from strategies.framework import round_record

METRICS = ("accuracy", "exact_match", "perplexity", "loss")
"""Models are compared by the first of these metrics that a run has."""
HIDDEN = ("answers",)
"""Counts behind other metrics; they are shown on a line of their own."""
MOMENTS = {
    "raw": "the federated adapter's weight before it is cut to 0 ... 1",
    "a": "expected error of the federated adapter",
    "b": "expected error of the local adapter",
    "c": "mean inner product of the two errors",
    "D": "a + b - 2c: what a wrong weight costs",
    "q": "distance between the two adapters",
}
"""Potara's numbers, by their names in ``rounds.jsonl``."""


def report_of(run_dir: Path, metric: str = "") -> dict[str, Any]:
    """The contents of ``report``, as JSON values.

    Raises:
        RunDirectoryError: there is no run here, no client has evaluated a model yet, or none has this metric; the
            message names the known metrics.
    """
    run = RunDirectory(run_dir)
    records = run.rounds()
    shown = _last_evaluated(records)
    if shown is None:
        reached = f"it has reached {records[-1]['phase']} {records[-1]['round']}" if records else "it has no records"
        raise RunDirectoryError(f"{run_dir}: no client has evaluated a model yet; {reached}")
    clients: Mapping[str, Mapping[str, Any]] = shown["clients"]
    values = [found for client in clients.values() for found in client.get("metrics", {}).values()]
    known = list(dict.fromkeys(name for found in values for name in found))
    if metric and metric not in known:
        raise RunDirectoryError(f"{run_dir} has no metric {metric!r}; it has {', '.join(known)}")
    summary = json.loads((run_dir / "summary.json").read_text()) if run.finished else {}
    rounds = int(run.config().get("num-server-rounds", 0)) if (run_dir / "config.toml").exists() else 0
    return {
        "run": run_dir.resolve().name,
        "finished": run.finished,
        "delivered": shown["phase"] == "deliver",
        "round": shown["round"],
        "rounds": rounds,
        "metric": metric or next((name for name in METRICS if name in known), known[0]),
        "clients": clients,
        "who": registrations(run),
        "weights": _last_weights(records),
        "refused": summary.get("refused", {}),
        "absent": summary.get("absent", []),
        "not_delivered": summary.get("not_delivered", []),
        "diverged": summary.get("diverged", {}),
    }


def print_report(run_dir: Path, console: Console, metric: str = "") -> None:
    """Print :func:`report_of`.

    Raises:
        RunDirectoryError: as for :func:`report_of`.
    """
    found = report_of(run_dir, metric)
    console.print(_title(found), style="bold", highlight=False, markup=False)
    console.print(_models(found))
    for line in _notes(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _print_weights(found["weights"], console)
    console.print()
    console.print(who_table(found["who"]))


def _last_evaluated(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The delivery, or else the last round in which clients evaluated the models that it began with."""
    found = [
        record
        for record in records
        if record["phase"] in ("train", "deliver") and any(said.get("metrics") for said in record["clients"].values())
    ]
    delivered = [record for record in found if record["phase"] == "deliver"]
    return next(reversed(delivered or found), None)


def _models(found: Mapping[str, Any]) -> Table:
    """A line for each client: its model's metrics, and one metric of the other models that it evaluated."""
    metric, clients = found["metric"], found["clients"]
    said = [client.get("metrics", {}) for client in clients.values()]
    own = list(
        dict.fromkeys(
            name for metrics in said for name in metrics.get(PERSONAL, {}) if name not in HIDDEN and "/" not in name
        )
    )
    own.sort(key=lambda name: name != metric)
    others = [
        label
        for label in dict.fromkeys(label for m in said for label in m)
        if label != PERSONAL and not label.startswith(HELD_OUT)
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("client", overflow="fold")
    for name in [*own, *(f"{metric} of {label}" for label in others)]:
        table.add_column(name.replace("_", " "), justify="right")
    if found["weights"]:
        table.add_column("weight", justify="right")
    rows: list[list[float | None]] = []
    for name, client in clients.items():
        metrics = client.get("metrics", {})
        row = [metrics.get(PERSONAL, {}).get(key) for key in own]
        row += [metrics.get(label, {}).get(metric) for label in others]
        rows.append(row)
        state = "" if client["status"] == "ok" else f" ({client['status']})"
        weight = [_weight(found["weights"].get(name))] if found["weights"] else []
        table.add_row(name + state, *map(_number, row), *weight)
    if len(rows) > 1:
        table.add_section()
        table.add_row("mean", *(_number(_mean(column)) for column in zip(*rows, strict=True)))
    return table


def _title(found: Mapping[str, Any]) -> str:
    if found["delivered"]:
        return f"{found['run']}: the delivered models, each on its client's {_looked_at(found)}"
    begun = f"round {found['round']} of {found['rounds']}" if found["rounds"] else f"round {found['round']}"
    return (
        f"{found['run']}: not finished. The models that {begun} began with, before its training, each on its client's "
        f"{_looked_at(found)}"
    )


def _looked_at(found: Mapping[str, Any]) -> str:
    looked = [client.get("evaluated", {}).get(PERSONAL, {}) for client in found["clients"].values()]
    splits = sorted({str(one["split"]) for one in looked if one})
    return f"{' or '.join(splits)} examples" if splits else "own data"


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    """Notes below the table."""
    own = {name: (said.get("evaluated", {}), said.get("metrics", {})) for name, said in found["clients"].items()}
    counts = [f"{name} {of[PERSONAL]['examples']}" for name, (of, _) in own.items() if PERSONAL in of]
    if counts:
        yield f"examples: {', '.join(counts)}"
    answers = {name: metrics.get(PERSONAL, {}).get("answers") for name, (_, metrics) in own.items()}
    written = [f"{name} {count:.0f}" for name, count in answers.items() if count is not None]
    if written:
        yield f"exact match and the like are of so many written answers: {', '.join(written)} (generate-examples)"
    for name, client in found["clients"].items():
        if said := client.get("privacy"):
            yield (
                f"{name}: epsilon {said['epsilon']:.3f} of {said['budget']:g} is spent (delta {said['delta']:g}); it "
                f"covers {said['covers']}"
            )
    for name, said in found["clients"].items():
        if "choice" in said:
            yield f"{name} was given {said['choice']['given']}: {said['choice']['why']}"
    for name, reason in found["refused"].items():
        yield f"refused: {name}: {reason}"
    for name, said in found["who"].items():
        if said.get("status") == "rejected" and name not in found["refused"]:
            yield f"refused: {name}: {said['reason']}"
    if found["absent"]:
        yield f"absent from the start: {', '.join(found['absent'])}"
    if found["not_delivered"]:
        yield f"without their models: {', '.join(found['not_delivered'])} (fedalloy deliver)"
    for name, lost in found["diverged"].items():
        now = "not finite" if lost["loss"] is None else f"{lost['loss']:.3g}"
        yield (
            f"became worse: {name}: validation loss {now}, {lost['first_loss']:.3g} before training; it has the model "
            f"after round {lost['delivered_round']}"
        )


def _last_weights(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The merge weights of the last round that recorded some, by client."""
    found: Mapping[str, Any] = {}
    for record in records:
        weights = record.get("settled", {}).get(round_record.WEIGHTS)
        found = weights if isinstance(weights, dict) else found
    return found


def _print_weights(weights: Mapping[str, Any], console: Console) -> None:
    shown: list[str] = []
    for name, found in weights.items():
        if isinstance(found, Mapping):
            rows = {"": found} | {f" {module}": one for module, one in found.get("modules", {}).items()}
            for module, one in rows.items():
                numbers = {key: one[key] for key in MOMENTS if key in one}
                shown += [key for key in numbers if key not in shown]
                text = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
                flag = f" ({one['flag']})" if "flag" in one else ""
                console.print(f"  {name}{module}: {text}{flag}", highlight=False, soft_wrap=True)
    if shown:
        legend = "; ".join(f"{key}: {MOMENTS[key]}" for key in MOMENTS if key in shown)
        console.print(f"  weight: of the federated adapter, the local one has the rest. {legend}", highlight=False)
    elif any(isinstance(found, list) for found in weights.values()):
        console.print("  weight: of each global model in the client's mixture", highlight=False)


def _weight(found: Any) -> str:
    if isinstance(found, Mapping):
        if "weight" in found:
            return f"{found['weight']:.3f}"
        values = [module["weight"] for module in found.get("modules", {}).values()]
        return f"{min(values):.2f} to {max(values):.2f}" if values else "-"
    if isinstance(found, list):
        return " ".join(f"{value:.2f}" for value in found)
    return "-"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"
