"""Reads finished runs of a comparison from disk: rows of numbers, merge weights, and bytes by kind."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_app.ledger.reconciliation import SKETCH, Accounts
from server_app.ledger.store import Ledger
from server_app.run.run_directory import RunDirectory
from server_app.tools.compare.statistics import Observation, with_score

LEVELS = ("tensor", "message", "wire")
DIRECTIONS = ("up", "down")


@dataclass(frozen=True)
class FinishedRun:
    """One run.

    Args:
        strategy: its name.
        seed: its seed.
        rows: a row for each client and round, and for the delivery.
        rounds: its records, as in ``rounds.jsonl``.
        kinds: bytes of all clients by direction and kind; they add up to the lowest level that was measured.
        unexplained: the unexplained share of the wire's bytes; None if the wire was not measured.
    """

    strategy: str
    seed: int
    rows: Sequence[Observation]
    rounds: Sequence[Mapping[str, Any]]
    kinds: Mapping[str, Mapping[str, int]]
    unexplained: float | None


def read_run(strategy: str, seed: int, run: Path) -> FinishedRun:
    """A finished run.

    Raises:
        LedgerError: its ledger cannot be read.
    """
    with Ledger(run / "ledger.sqlite", read_only=True) as ledger:
        accounts = ledger.accounts()
    rounds = RunDirectory(run).rounds()
    rows = list(_rows(strategy, seed, rounds, accounts))
    return FinishedRun(strategy, seed, rows, rounds, kinds_of(accounts), accounts.unexplained_fraction())


def remarks(runs: Sequence[FinishedRun], failed: Mapping[str, str]) -> list[str]:
    """Remarks on single runs: those that were interrupted, and those that failed (by name) and why."""
    resumed = [f"{r.strategy} (seed {r.seed})" for r in runs if any(c["phase"] == "resumed" for c in r.rounds)]
    said = [f"Interrupted and resumed, so that some bytes were sent twice: {', '.join(resumed)}."] if resumed else []
    return said + [f"Failed: {name}: {why}" for name, why in failed.items()]


def kinds_of(accounts: Accounts) -> dict[str, dict[str, int]]:
    """The wire's reconciliation; without a wire, Flower's serialised bytes: tensors, sketches, the rest."""
    found = accounts.reconciliation()
    for direction in DIRECTIONS:
        if found[direction]:
            continue
        meant, sketched = (
            sum(r.bytes for r in accounts.tensors if r.direction == direction and (r.kind == SKETCH) == is_sketch)
            for is_sketch in (False, True)
        )
        whole = sum(row.bytes for row in accounts.messages if row.direction == direction)
        found[direction] = {"tensors": meant, "sketches": sketched, "message framing": whole - meant - sketched}
    return found


def as_csv(rows: Sequence[Observation]) -> str:
    """One line for each client, seed, strategy and round; empty where something was not measured."""
    metrics = sorted({name for row in rows for name in row.metrics})
    counts = [f"{direction}_{level}" for direction in DIRECTIONS for level in LEVELS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = ["strategy", "seed", "client", "round", "phase", "status", "seconds", "train_seconds"]
    writer.writerow([*keys, *metrics, *(f"{name}_bytes" for name in counts)])
    for row in rows:
        numbers = [row.metrics.get(name, "") for name in metrics]
        sizes = ["" if row.bytes.get(name) is None else row.bytes[name] for name in counts]
        writer.writerow([*(getattr(row, key) for key in keys), *numbers, *sizes])
    return text.getvalue()


def _rows(strategy: str, seed: int, rounds: Sequence[Mapping[str, Any]], accounts: Accounts) -> Iterator[Observation]:
    """Rows of the registration, the rounds (with evaluations of the received models), delivery and last counters."""
    counted = defaultdict[tuple[int, str], dict[str, int | None]](dict)
    for item in accounts.rows():
        counted[item.round, item.client] |= {f"{item.direction}_{level}": getattr(item, level) for level in LEVELS}
    networked = any(accounts.reconciliation().values())
    for record in rounds:
        if record["phase"] == "register" and record["round"] > 0:  # repeated by a resumed run
            continue
        for client, answer in record.get("clients", {}).items():
            # In one process a client's answer also waits for the clients before it; its own time does not.
            seconds = (
                answer.get("seconds", 0.0) if networked else answer.get("client_seconds", answer.get("seconds", 0.0))
            )
            yield Observation(
                strategy,
                seed,
                client,
                int(record["round"]),
                record["phase"],
                answer["status"],
                with_score(answer.get("metrics", {}).get("personal", {})),
                float(seconds),
                float(answer.get("train_seconds", 0.0)),
                counted[int(record["round"]), client],
            )
