"""Made-up runs of a comparison, with everything that a report shows; numbers that tests can work out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server_app.tools.compare.records import FinishedRun
from server_app.tools.compare.statistics import Comparison, Observation, comparison_of

SCORES: Mapping[str, tuple[float, ...]] = {
    "local": (0.5, 0.7, 0.9),
    "fedavg": (0.6, 0.6, 0.6),
    "rival": (0.6, 0.8, 0.85),
    "fedavg-head": (0.6, 0.65, 0.6),
    "local-twice": (0.55, 0.72, 0.9),
}
CONTROLS = ("fedavg-head", "local-twice")
CLIENTS = ("client-0", "client-1", "client-2")
ROUNDS = ((1, "train", 0.5), (2, "train", 0.8), (3, "deliver", 1.0))


def rows_of(wire: int | None = 3_000_000, metric: str = "accuracy", sign: int = 1) -> list[Observation]:
    """Two seeds of each strategy: every client takes as many seconds as its place, and sends the same bytes."""
    return [
        Observation(
            strategy,
            seed,
            CLIENTS[index],
            round_,
            phase,
            "ok",
            {metric: sign * share * score, "loss": 1.0},
            seconds=1.0 + index,
            train_seconds=0.5,
            bytes={
                "up_tensor": 400_000,
                "down_tensor": 500_000,
                "up_message": 1_000_000,
                "down_message": 2_000_000,
                "up_wire": wire,
                "down_wire": wire,
            },
        )
        for strategy, scores in SCORES.items()
        for seed in (0, 1)
        for index, score in enumerate(scores)
        for round_, phase, share in ROUNDS
    ]


def compared(
    rows: list[Observation] | None = None, learns_from: Mapping[str, Sequence[str]] | None = None
) -> Comparison:
    """The strategies that appear in the rows."""
    rows = rows_of() if rows is None else rows
    return comparison_of(rows, list(SCORES), ("local", "fedavg"), CONTROLS, learns_from)


def runs_of(rows: list[Observation], wired: bool = True) -> list[FinishedRun]:
    """The rows' runs; ``rival`` has merged in every way that there is."""
    kinds: dict[str, dict[str, int]] = {
        "up": {"tensors": 3_600_000, "sketches": 0, "message framing": 5_400_000},
        "down": {"tensors": 4_500_000, "sketches": 0, "message framing": 13_500_000},
    }
    if wired:
        for direction, counts in kinds.items():
            counts |= {"app bundle": 2_000_000 * (direction == "down"), "TCP/IP headers": 100_000, "unexplained": 9_000}
    return [
        FinishedRun(
            strategy,
            seed,
            [row for row in rows if (row.strategy, row.seed) == (strategy, seed)],
            merged_rounds() if strategy == "rival" else [],
            kinds,
            (0.0012 + 0.001 * seed) if wired else None,
        )
        for strategy in SCORES
        for seed in (0, 1)
    ]


def merged_rounds() -> list[dict[str, Any]]:
    """Records as strategies write them: a mixture of models, relevance, one weight with two ends, replacements."""
    uneven = {"client-0": [0.0, 0.75, 0.25], "client-1": [0.5, 0.0, 0.5], "client-2": [0.125, 0.875, 0.0]}
    even = {client: [0.5 * (i != j) for j in range(3)] for i, client in enumerate(CLIENTS)}
    fired = {"digit": {"replaced": True, "source_loss": 0.4, "target_loss": 0.6}, "number": {"replaced": False}}
    losses = [0.9, 0.7, 0.65, 0.8, 1.1]
    ends = {"local": {"accuracy": 0.6}, "half": {"accuracy": 0.7}, "federated": {"accuracy": 0.55}}
    answers = {client: {"metrics": {"personal": {"accuracy": 0.75}, **ends}} for client in CLIENTS}
    return [
        {
            "phase": "train",
            "round": 1,
            "clients": {},
            "settled": {"relevance": even, "entropy": 1.0, "replacements": {client: fired for client in CLIENTS}},
        },
        {
            "phase": "train",
            "round": 2,
            "clients": {},
            "settled": {"relevance": uneven, "entropy": 0.5, "replacements": {"client-1": fired}},
        },
        {
            "phase": "train",
            "round": 3,
            "clients": {},
            "settled": {"weights": {client: {"weight": 0.4375, "search_losses": losses} for client in CLIENTS}},
        },
        {"phase": "deliver", "round": 4, "clients": answers},
    ]
