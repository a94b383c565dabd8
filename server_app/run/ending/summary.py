"""What ``summary.json`` says of a finished run."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

import flwr

from server_app.run.options import RunOptions

Totals = tuple[dict[str, dict[str, int | None]], float | None]


def summary_of(
    options: RunOptions, clients: Mapping[str, Mapping[str, float]], total: float, training: float, wire: Totals
) -> dict[str, Any]:
    """The summary.

    Args:
        options: the run's.
        clients: final metrics of every client that was delivered its model.
        total: seconds of the whole run, before and after it was resumed.
        training: seconds of them that the slowest clients trained.
        wire: bytes by direction and level, and the unexplained fraction.
    """
    totals, unexplained = wire
    return with_scores(
        {
            "strategy": options.strategy,
            "rounds": options.num_server_rounds,
            "seed": options.seed,
            "scenario": options.scenario,
            "clients": clients,
            "mean_accuracy": None,
            "worst_accuracy": None,
            "without_accuracy": [],
            "bytes": totals,
            "unexplained_wire_fraction": unexplained,
            "seconds": {
                "total": round(total, 3),
                "training": round(training, 3),
                "overhead": round(total - training, 3),
            },
            "flwr": flwr.__version__,
            "git": git_commit(),
        }
    )


def with_scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary with the clients' mean and worst accuracy, where they have one."""
    clients = summary["clients"]
    scores = [metrics["accuracy"] for metrics in clients.values() if "accuracy" in metrics]
    mean, worst = (sum(scores) / len(scores), min(scores)) if scores else (None, None)
    without = sorted(name for name in clients if "accuracy" not in clients[name]) if scores else []
    return {**summary, "mean_accuracy": mean, "worst_accuracy": worst, "without_accuracy": without}


def headline(summary: Mapping[str, Any]) -> str:
    """One line: how many sites were delivered their models, which were not and why, and how good the models are."""
    return f"{_sites(summary)}{_scores(summary)}"


def _sites(summary: Mapping[str, Any]) -> str:
    refused, missing = summary.get("refused", {}), summary.get("not_delivered", [])
    if not refused and not missing:
        return ""
    done = len(summary["clients"])
    words = f"{done} of {done + len(refused) + len(missing)} sites"
    words += f"; refused: {'; '.join(f'{who}: {why}' for who, why in refused.items())}" if refused else ""
    words += f"; without their models: {', '.join(missing)} (fedalloy deliver)" if missing else ""
    return f"{words}; "


def _scores(summary: Mapping[str, Any]) -> str:
    """Mean and worst accuracy; where clients have none (texts), mean exact match and perplexity."""
    if summary["mean_accuracy"] is not None:
        missing = summary.get("without_accuracy") or []
        words = f"mean accuracy {summary['mean_accuracy']:.3f}, worst {summary['worst_accuracy']:.3f}"
        return f"{words}; {', '.join(missing)} gave none" if missing else words
    found = []
    for name in ("exact_match", "perplexity"):
        values = [metrics[name] for metrics in summary["clients"].values() if name in metrics]
        if values:
            found.append(f"mean {name.replace('_', ' ')} {sum(values) / len(values):.3f}")
    return ", ".join(found) or "no client was delivered its model"


def git_commit() -> str | None:
    """The commit of the checkout that the process was started in, or None."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
