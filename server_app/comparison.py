"""What runs of several strategies say about each other: means, worst clients, intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

RESAMPLES = 10_000
METRICS = {"accuracy": 1, "exact_match": 1, "loss": -1}
"""The first that all final models have is compared; 1: more is better."""
WORK = ("train", "deliver")
"""Phases of a run in which clients work; registration and the last look at counters cost bytes, too."""
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
    """One strategy: final scores, and what they cost (means over seeds, sums over clients).

    ``role`` is ``reference``, ``control`` or empty. ``beyond`` are the differences to the control with the best mean;
    None for references and controls.
    """

    strategy: str
    scores: Scores
    mean: Interval
    worst: Interval
    against: Mapping[str, Paired]
    megabytes: Mapping[str, float]
    seconds: float
    role: str = ""
    beyond: Paired | None = None

    @property
    def label(self) -> str:
        """Its name, with what it is there for."""
        return f"{self.strategy} ({self.role})" if self.role else self.strategy


COSTS: Mapping[str, Callable[[Line], float]] = {
    "bytes": lambda line: line.megabytes["up"] + line.megabytes["down"],
    "seconds": lambda line: line.seconds,
}
"""What a strategy costs: megabytes up and down together, and seconds."""


@dataclass(frozen=True)
class Comparison:
    """All strategies by one metric; ``best_control`` is the control that merging has to beat, empty without one."""

    metric: str
    level: str
    lines: Sequence[Line]
    best_control: str = ""

    @property
    def sign(self) -> int:
        """1: more of the metric is better, -1: less is."""
        return METRICS[self.metric]

    def ranked(self) -> list[Line]:
        """The best mean first; strategies without a score last."""
        return sorted(
            self.lines, key=lambda line: math.inf if math.isnan(line.mean.value) else -self.sign * line.mean.value
        )

    def cheapest(self, cost: Callable[[Line], float]) -> list[Line]:
        """The Pareto front, cheapest first: strategies that no other one beats for at most their cost."""
        front: list[Line] = []
        for line in sorted(self.ranked(), key=cost):  # of equal cost, the best first
            score = self.sign * line.mean.value
            if not math.isnan(score) and (not front or score > self.sign * front[-1].mean.value):
                front.append(line)
        return front


def comparison_of(
    rows: Sequence[Row], strategies: Sequence[str], references: Sequence[str], controls: Sequence[str] = ()
) -> Comparison:
    """Compare final models, in the order of ``strategies``.

    Bytes are those of the lowest level that was measured in every run: the wire, else serialised messages.
    """
    final = [row for row in rows if row.phase == "deliver" and row.status == "ok"]
    metric = next((name for name in METRICS if all(name in row.metrics for row in final)), "loss")
    scores: dict[str, Scores] = {name: {} for name in strategies}
    for row in final:
        if metric in row.metrics:
            scores[row.strategy][row.seed, row.client] = row.metrics[metric]
    served = [row for row in rows if row.phase in WORK]
    measured = all(r.bytes.get(f"{d}_wire") is not None for r in served for d in ("up", "down") if r.status == "ok")
    level = "wire" if rows and measured else "message"
    sign = METRICS[metric]
    judges = [name for name in controls if scores.get(name)]
    best = max(judges, key=lambda name: sign * sum(scores[name].values()) / len(scores[name]), default="")
    lines = []
    for name in strategies:
        own = [row for row in rows if row.strategy == name]
        seeds = max(len({row.seed for row in own}), 1)
        role = "control" if name in controls else "reference" if name in references else ""
        waits: dict[tuple[int, int], float] = {}
        for row in served:
            if row.strategy == name:
                waits[row.seed, row.round] = max(row.seconds, waits.get((row.seed, row.round), 0.0))
        lines.append(
            Line(
                strategy=name,
                scores=scores[name],
                mean=interval(list(scores[name].values())),
                worst=worst_decile(scores[name], sign),
                against={other: paired(scores[name], scores.get(other, {}), sign) for other in references},
                megabytes={d: sum(r.bytes.get(f"{d}_{level}") or 0 for r in own) / seeds / 1e6 for d in ("up", "down")},
                seconds=sum(waits.values()) / seeds,
                role=role,
                beyond=paired(scores[name], scores[best], sign) if best and not role else None,
            )
        )
    return Comparison(metric, level, lines, best)


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


def gains_over(scores: Scores, reference: Scores, sign: int = 1) -> Scores:
    """Differences to the reference where both have a score; positive means better."""
    return {key: sign * (scores[key] - reference[key]) for key in sorted(scores) if key in reference}


def paired(scores: Scores, reference: Scores, sign: int = 1) -> Paired:
    """What :func:`gains_over` finds, in numbers."""
    differences = list(gains_over(scores, reference, sign).values())
    return Paired(interval(differences), sum(d > 0 for d in differences), sum(d < 0 for d in differences))


def as_markdown(found: Comparison, title: str) -> str:
    """The table, with what its numbers are below."""
    heads, body = cells_of(found)
    text = [f"# {title}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    text += [f"| {' | '.join(cells)} |" for cells in body]
    return "\n".join([*text, "", *explanation(found), ""])


def terminal_table(found: Comparison) -> Table:
    """The table's essence, in 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    references = list(found.lines[0].against) if found.lines else []
    heads = [found.metric, "worst", *(f"- {name}" for name in references), "- control"]
    table.add_column("strategy", max_width=18, no_wrap=True, overflow="ellipsis")
    for head in [*heads, "MB up", "MB down", "seconds"]:
        table.add_column(head, justify="right", no_wrap=True)
    for line in found.ranked():
        gains = [None if name == line.strategy else line.against[name] for name in references] + [line.beyond]
        table.add_row(
            line.strategy,
            _number(line.mean.value, 3),
            _number(line.worst.value, 3),
            *("" if gain is None or math.isnan(gain.mean.value) else f"{gain.mean.value:+.3f}" for gain in gains),
            *(_number(line.megabytes[direction], 2) for direction in ("up", "down")),
            _number(line.seconds, 1),
            style="dim" if line.role else None,
        )
    return table


def cells_of(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table's heads and rows, the best mean first."""
    references = list(found.lines[0].against) if found.lines else []
    heads = ["strategy", f"mean {found.metric}", "worst decile", *(f"against {name}" for name in references)]
    heads += [f"against {found.best_control} (control)"] if found.best_control else []
    heads += ["MB up", "MB down", "seconds"]
    body = []
    for line in found.ranked():
        cells = [line.label, _shown(line.mean), _shown(line.worst)]
        cells += ["" if name == line.strategy else _difference(line.against[name]) for name in references]
        if found.best_control:
            cells.append(_difference(line.beyond) if line.beyond else "")
        cells += [_number(line.megabytes["up"], 2), _number(line.megabytes["down"], 2), _number(line.seconds, 1)]
        body.append(cells)
    return heads, body


def explanation(found: Comparison) -> list[str]:
    """What the table's numbers are, a line for each."""
    less = " (less is better)" if found.sign < 0 else ""
    wired = found.level == "wire"
    level = "on the wire" if wired else "of serialised messages (the wire was not measured)"
    waited = (
        "until the slowest client of each round had answered" if wired else "that each round's slowest client worked"
    )
    return [
        f"* {found.metric}{less} of each client's personal model on its own data after the last round; in brackets 95 "
        f"% bootstrap intervals ({RESAMPLES:,} resamples of clients and seeds, taken as independent).",
        "* Worst decile: mean of the worst tenth of all clients and seeds.",
        "* Against: mean of the differences, client by client of the same seed; positive is better (better/worse).",
        f"* MB: {level}, everything from registration on, all clients, mean over seeds. Seconds: {waited}, summed over "
        "rounds, likewise.",
        "* Controls say what is gained without merging: `fedavg-head` (FedAvg, heads re-fitted locally), "
        "`fedavg-tuned` (FedAvg and fine-tuning, equal compute), `local-twice` (two local runs of one client, "
        "averaged). A gain by merging counts only beyond them.",
    ]


def _shown(found: Interval) -> str:
    return f"{_number(found.value, 3)} [{_number(found.low, 3)}, {_number(found.high, 3)}]"


def _difference(found: Paired) -> str:
    mean = found.mean
    if math.isnan(mean.value):
        return "-"
    return f"{mean.value:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}] ({found.better}/{found.worse})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
