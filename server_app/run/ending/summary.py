"""The contents of ``summary.json`` for a finished run."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

import flwr

from server_app.run.options import RunOptions

COUNTS = ("examples", "answers")
"""Keys among a client's metrics that are not metrics."""
Totals = tuple[dict[str, dict[str, int | None]], float | None]


def summary_of(
    options: RunOptions,
    clients: Mapping[str, Mapping[str, float]],
    total: float,
    spent: Mapping[str, float],
    wire: Totals,
    about: Mapping[str, str],
) -> dict[str, Any]:
    """The summary.

    Args:
        options: the run's.
        clients: final metrics of every client that was delivered its model.
        total: seconds of the whole run, before and after it was resumed.
        spent: seconds of them that the slowest client of each phase trained (``train``), evaluated (``evaluation``) and
            computed what merges need (``statistics``); the rest is overhead.
        wire: bytes by direction and level, and the unexplained fraction.
        about: the scenario, or the base model if clients have data of their own.
    """
    totals, unexplained = wire
    return with_scores(
        {
            "strategy": options.strategy,
            "rounds": options.num_server_rounds,
            "seed": options.seed,
            **about,
            "clients": clients,
            "bytes": totals,
            "unexplained_wire_fraction": unexplained,
            "seconds": {
                "total": round(total, 3),
                "training": round(spent.get("train", 0.0), 3),
                "evaluation": round(spent.get("evaluation", 0.0), 3),
                "statistics": round(spent.get("statistics", 0.0), 3),
                "overhead": round(total - sum(spent.values()), 3),
            },
            "flwr": flwr.__version__,
            "git": git_commit(),
        }
    )


def with_scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary with the mean of each metric, and mean and worst accuracy if clients have one."""
    clients = summary["clients"]
    scores = [metrics["accuracy"] for metrics in clients.values() if "accuracy" in metrics]
    names = dict.fromkeys(name for metrics in clients.values() for name in metrics if name not in COUNTS)
    values = {name: [metrics[name] for metrics in clients.values() if name in metrics] for name in names}
    found = {key: value for key, value in summary.items() if not key.endswith("_accuracy")}
    found["means"] = {name: sum(of) / len(of) for name, of in values.items()}
    if scores:
        found |= {"mean_accuracy": sum(scores) / len(scores), "worst_accuracy": min(scores)}
        found["without_accuracy"] = sorted(name for name in clients if "accuracy" not in clients[name])
    return found


def given_in(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The models that clients were given by choice, and those that newcomers adopted; empty without any."""
    given = {name: record["choice"]["given"] for name, record in records.items() if "choice" in record}
    adopted = {name: record["adopted"] for name, record in records.items() if "adopted" in record}
    return {key: found for key, found in (("given", given), ("adopted", adopted)) if found}


def headline(summary: Mapping[str, Any]) -> str:
    """One line: how many sites were delivered their models, which were not and why, and how good the models are."""
    return f"{_sites(summary)}{_scores(summary)}{_diverged(summary)}{_privacy(summary)}"


def _diverged(summary: Mapping[str, Any]) -> str:
    """The clients whose models became worse, and the round of the model that each was given."""
    found = []
    for name, lost in summary.get("diverged", {}).items():
        now = "not finite" if lost["loss"] is None else f"{lost['loss']:.3g}"
        words = f"{name} (validation loss {now}, {lost['first_loss']:.3g} before training; "
        found.append(f"{words}it has the model after round {lost['delivered_round']})")
    return f"; became worse: {', '.join(found)}" if found else ""


def _sites(summary: Mapping[str, Any]) -> str:
    refused, missing, away = summary.get("refused", {}), summary.get("not_delivered", []), summary.get("absent", [])
    if not refused and not missing and not away:
        return ""
    done = len(summary["clients"])
    words = f"{done} of {done + len(refused) + len(missing) + len(away)} sites"
    words += f"; absent from the start: {', '.join(away)}" if away else ""
    words += f"; refused: {'; '.join(f'{who}: {why}' for who, why in refused.items())}" if refused else ""
    words += f"; without their models: {', '.join(missing)} (fedalloy deliver)" if missing else ""
    return f"{words}; "


def _privacy(summary: Mapping[str, Any]) -> str:
    """The worst epsilon, and how many clients have one."""
    found = summary.get("privacy", {}).values()
    if not found:
        return ""
    worst = max(found, key=lambda said: said["epsilon"])
    return (
        f"; {len(found)} of {len(summary['clients'])} clients under differential privacy by record, epsilon at most "
        f"{worst['epsilon']:.3f} (delta {worst['delta']:g})"
    )


def _scores(summary: Mapping[str, Any]) -> str:
    """Mean and worst accuracy; if clients have none (texts), mean exact match and perplexity, else mean loss."""
    if summary.get("mean_accuracy") is not None:
        missing = summary.get("without_accuracy") or []
        words = f"mean accuracy {summary['mean_accuracy']:.3f}, worst {summary['worst_accuracy']:.3f}"
        return f"{words}; {', '.join(missing)} gave none" if missing else words
    found = []
    for name in ("exact_match", "perplexity"):
        values = [metrics[name] for metrics in summary["clients"].values() if name in metrics]
        if values:
            answers = sum(metrics.get("answers", 0) for metrics in summary["clients"].values())
            counted = f" of {answers:.0f} answers" if answers and name == "exact_match" else ""
            found.append(f"mean {name.replace('_', ' ')} {sum(values) / len(values):.3f}{counted}")
    losses = [metrics["loss"] for metrics in summary["clients"].values() if "loss" in metrics]
    if not found and losses:
        found.append(f"mean loss {sum(losses) / len(losses):.3f}")
    return ", ".join(found) or (
        "no client tells a score" if summary["clients"] else "no client was delivered its model"
    )


def git_commit() -> str | None:
    """The commit of the checkout that the process was started in, or None."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
