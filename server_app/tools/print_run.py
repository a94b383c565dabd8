"""``fedalloy report RUN``: every client's models next to each other, and the weights that merged them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server_app.run.run_directory import RunDirectory, RunDirectoryError


def print_report(run_dir: Path, console: Console) -> None:
    """Accuracy (or loss) of each model that was evaluated at the end, by client, and how its own was merged.

    Raises:
        RunDirectoryError: there is no run here, or it delivered no models yet.
    """
    records = RunDirectory(run_dir).rounds()
    delivered = [record for record in records if record["phase"] == "deliver"]
    if not delivered:
        reached = records[-1] if records else None
        where = f"it reached {reached['phase']} {reached['round']}" if reached else "no rounds.jsonl or an empty one"
        raise RunDirectoryError(f"{run_dir} has delivered no models: {where}")
    clients: Mapping[str, Mapping[str, Any]] = delivered[-1]["clients"]
    weights = _last_weights(records)
    labels = list(dict.fromkeys(label for client in clients.values() for label in client.get("metrics", {})))
    metric = (
        "accuracy" if any("accuracy" in m for c in clients.values() for m in c.get("metrics", {}).values()) else "loss"
    )
    table = Table(title=f"{run_dir.name}: {metric} of each client's models on its own data", title_justify="left")
    table.add_column("client", overflow="fold")
    for label in labels:
        table.add_column(label, justify="right")
    if weights:
        table.add_column("weight", justify="right")
    for name, client in clients.items():
        row = [_number(client.get("metrics", {}).get(label, {}).get(metric)) for label in labels]
        failed = "" if client["status"] == "ok" else f" ({client['status']})"
        table.add_row(name + failed, *row, *([_weight(weights.get(name))] if weights else []))
    scored = [client["metrics"] for client in clients.values() if client["status"] == "ok"]
    if len(scored) > 1:
        means = [_number(_mean([m[label][metric] for m in scored if metric in m.get(label, {})])) for label in labels]
        table.add_section()
        table.add_row("mean", *means, *([""] if weights else []))
    console.print(table)
    for name, found in weights.items():
        if isinstance(found, Mapping):
            rows = {"": found} | {f" {module}": one for module, one in found.get("modules", {}).items()}
            for module, one in rows.items():
                text = ", ".join(f"{key} {one[key]:.4g}" for key in ("raw", "a", "b", "c", "D", "q") if key in one)
                flag = f" ({one['flag']})" if "flag" in one else ""
                console.print(f"  {name}{module}: {text}{flag}", highlight=False, soft_wrap=True)


def _last_weights(records: list[dict[str, Any]]) -> Mapping[str, Any]:
    """The merge weights of the last round that recorded some, by client."""
    found: Mapping[str, Any] = {}
    for record in records:
        weights = record.get("settled", {}).get("weights")
        found = weights if isinstance(weights, dict) else found
    return found


def _weight(found: Any) -> str:
    if isinstance(found, Mapping):
        if "weight" in found:
            return f"{found['weight']:.3f}"
        values = [module["weight"] for module in found.get("modules", {}).values()]
        return f"{min(values):.2f} to {max(values):.2f}" if values else "-"
    if isinstance(found, list):
        return " ".join(f"{value:.2f}" for value in found)
    return "-"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
