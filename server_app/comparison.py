"""What runs of several strategies say about each other: means, worst clients, intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
METRICS = {"accuracy": 1, "exact_match": 1, "loss": -1}
"""The first that all final models have is compared; 1: more is better."""
Scores = dict[tuple[int, str], float]
"""By seed and client."""
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What one client did in one round of one run; ``metrics`` are those of its personal model."""

    strategy: str
    seed: int
    client: str
    round: int
    phase: str
    status: str
    metrics: Mapping[str, float]
    seconds: float
    train_seconds: float
    bytes: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Differences to a reference, client by client of the same seed; ``better`` and ``worse`` count them."""

    mean: Interval
    better: int
    worse: int


@dataclass(frozen=True)
class Line:
    """One strategy: final scores, and what they cost (means over seeds, sums over clients)."""

    strategy: str
    scores: Scores
    mean: Interval
    worst: Interval
    against: Mapping[str, Paired]
    megabytes: Mapping[str, float | None]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All strategies by one metric."""

    metric: str
    level: str
    lines: Sequence[Line]


def comparison_of(rows: Sequence[Row], strategies: Sequence[str], references: Sequence[str]) -> Comparison:
    """Compare final models, in the order of ``strategies``.

    Bytes are those of the lowest level that was measured in every run: the wire, else serialised messages.
    """
    final = [row for row in rows if row.phase == "deliver" and row.status == "ok"]
    metric = next((name for name in METRICS if all(name in row.metrics for row in final)), "loss")
    scores: dict[str, Scores] = {name: {} for name in strategies}
    for row in final:
        if metric in row.metrics:
            scores[row.strategy][row.seed, row.client] = row.metrics[metric]
    measured = all(row.bytes.get(f"{d}_wire") is not None for row in rows for d in ("up", "down") if row.status == "ok")
    level = "wire" if rows and measured else "message"
    lines = []
    for name in strategies:
        own = [row for row in rows if row.strategy == name]
        seeds = max(len({row.seed for row in own}), 1)
        sizes = {d: sum(row.bytes.get(f"{d}_{level}") or 0 for row in own) / seeds / 1e6 for d in ("up", "down")}
        waits = [
            max(row.seconds for row in own if (row.seed, row.round) == key) for key in {(r.seed, r.round) for r in own}
        ]
        lines.append(
            Line(
                name,
                scores[name],
                interval(list(scores[name].values())),
                worst_decile(scores[name], METRICS[metric]),
                {other: paired(scores[name], scores.get(other, {}), METRICS[metric]) for other in references},
                sizes,
                sum(waits) / seeds,
            )
        )
    return Comparison(metric, level, lines)


def interval(values: Sequence[float], statistic: Callable[[Numbers], Numbers] | None = None) -> Interval:
    """A statistic (the mean) of values with its percentile bootstrap interval; NaN without values.

    Args:
        values: one for each client and seed, taken as independent.
        statistic: of the last axis.
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    take = statistic or (lambda array: np.asarray(array.mean(axis=-1)))
    found = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.percentile(take(found[drawn]), [2.5, 97.5])
    return Interval(float(take(found)), float(low), float(high))


def worst_decile(scores: Scores, sign: int = 1) -> Interval:
    """The mean of the worst tenth of all clients and seeds, at least one; ``sign`` -1: high is bad."""
    count = max(1, math.ceil(len(scores) / 10))

    def take(values: Numbers) -> Numbers:
        return np.asarray(sign * np.sort(sign * values, axis=-1)[..., :count].mean(axis=-1))

    return interval(list(scores.values()), take)


def paired(scores: Scores, reference: Scores, sign: int = 1) -> Paired:
    """Differences to the reference where both have a score; positive means better."""
    differences = [sign * (scores[key] - reference[key]) for key in sorted(scores) if key in reference]
    return Paired(interval(differences), sum(d > 0 for d in differences), sum(d < 0 for d in differences))


def as_markdown(found: Comparison, title: str) -> str:
    """The table, with what its numbers are below."""
    references = list(found.lines[0].against) if found.lines else []
    heads = ["strategy", f"mean {found.metric}", "worst decile", *(f"against `{name}`" for name in references)]
    heads += ["MB up", "MB down", "seconds"]
    text = [f"# {title}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for line in found.lines:
        cells = [f"`{line.strategy}`", _shown(line.mean), _shown(line.worst)]
        for name in references:
            cells.append("" if name == line.strategy else _difference(line.against[name]))
        cells += [_number(line.megabytes["up"], 2), _number(line.megabytes["down"], 2), _number(line.seconds, 1)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", *explanation(found), ""])


def explanation(found: Comparison) -> list[str]:
    """What the table's numbers are, a line for each."""
    less = " (less is better)" if METRICS[found.metric] < 0 else ""
    level = "on the wire" if found.level == "wire" else "of serialised messages (the wire was not measured)"
    return [
        f"* {found.metric}{less} of each client's personal model on its own data after the last round; in brackets 95 "
        f"% bootstrap intervals ({RESAMPLES:,} resamples of clients and seeds, taken as independent).",
        "* Worst decile: mean of the worst tenth of all clients and seeds.",
        "* Against: mean of the differences, client by client of the same seed; positive is better (better/worse).",
        f"* MB: {level}, all clients, mean over seeds. Seconds: of the slowest client of each round, likewise.",
        "* `fedavg-head`, `fedavg-tuned` and `local-twice` are controls: a gain by merging counts beyond them.",
    ]


def _shown(found: Interval) -> str:
    return f"{_number(found.value, 3)} [{_number(found.low, 3)}, {_number(found.high, 3)}]"


def _difference(found: Paired) -> str:
    mean = found.mean
    return f"{mean.value:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}] ({found.better}/{found.worse})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
