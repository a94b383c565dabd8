"""Statistics over runs of several strategies: means, worst clients, intervals, paired differences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

RESAMPLES = 10_000
METRICS = {"accuracy": 1, "exact_match": 1, "score": 1, "loss": -1}
"""Metrics in order of preference: the first one that all final models have is compared; 1 means more is better. For
``score``, see :func:`with_score`."""
WORK = ("train", "deliver")
"""Phases of a run in which clients work; registration and the last look at counters cost bytes, too."""
Scores = dict[tuple[int, str], float]
"""Scores by seed and client."""
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """One client's results in one round of one run; ``metrics`` are those of its personal model."""

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
    """A number with its 95 % bootstrap interval, from :func:`interval`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Differences to a reference, client by client of the same seed; ``better`` and ``worse`` count them."""

    mean: Interval
    better: int
    worse: int
    equal: int = 0


@dataclass(frozen=True)
class Line:
    """One strategy: final scores and costs (sums over clients; bytes: means over seeds, seconds: medians).

    ``role`` is ``reference``, ``control`` or empty. ``rival`` is the control that merging must beat: the one with the
    best mean among those that see no other examples than this strategy; ``beyond`` are the differences to it. Both are
    empty for references and controls. ``seeds`` is the number of seeds in the comparison, ``learns_from`` the splits of
    a client's data that its model depends on, empty if not known.
    """

    strategy: str
    scores: Scores
    mean: Interval
    worst: Interval
    against: Mapping[str, Paired]
    megabytes: Mapping[str, float]
    seconds: float
    role: str = ""
    rival: str = ""
    beyond: Paired | None = None
    seeds: int = 0
    learns_from: Sequence[str] = ()

    @property
    def unserved(self) -> int:
        """Number of seeds without a score."""
        return self.seeds - len({seed for seed, _ in self.scores})

    @property
    def label(self) -> str:
        """The strategy's name with its role, and the number of seeds if some are missing."""
        some = f"{self.seeds - self.unserved} of {self.seeds} seeds" if self.unserved else ""
        said = "; ".join(part for part in (self.role, some) if part)
        return f"{self.strategy} ({said})" if said else self.strategy


COSTS: Mapping[str, Callable[[Line], float]] = {
    "bytes": lambda line: line.megabytes["up"] + line.megabytes["down"],
    "seconds": lambda line: line.seconds,
}
"""A strategy's cost: megabytes up and down together, and seconds."""


@dataclass(frozen=True)
class Comparison:
    """All strategies by one metric."""

    metric: str
    level: str
    lines: Sequence[Line]

    @property
    def controlled(self) -> bool:
        """Whether a strategy has a control that it must beat."""
        return any(line.rival for line in self.lines)

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
        """The Pareto front, cheapest first: strategies that no other one beats at the same or lower cost.

        Controls are left out: one that sees more examples for no bytes would hide all others.
        """
        front: list[Line] = []
        known = [line for line in self.ranked() if line.role != "control"]
        for line in sorted(known, key=cost):  # at equal cost, the best first
            score = self.sign * line.mean.value
            if not math.isnan(score) and (not front or score > self.sign * front[-1].mean.value):
                front.append(line)
        return front


def comparison_of(
    rows: Sequence[Observation],
    strategies: Sequence[str],
    references: Sequence[str],
    controls: Sequence[str] = (),
    learns_from: Mapping[str, Sequence[str]] | None = None,
) -> Comparison:
    """Compare final models, in the order of ``strategies``; ``learns_from`` has the splits that each depends on.

    Bytes are counted at the lowest level that was measured in every run: the wire, else serialised messages.
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
    judges.sort(key=lambda name: -sign * sum(scores[name].values()) / len(scores[name]))
    seen = learns_from or {}
    lines, every_seed = [], len({row.seed for row in rows})
    for name in strategies:
        own = [row for row in rows if row.strategy == name]
        seeds = max(len({row.seed for row in own}), 1)
        role = "control" if name in controls else "reference" if name in references else ""
        rival = "" if role else next((other for other in judges if sees_no_more(other, name, seen)), "")
        waits = defaultdict[int, dict[int, float]](dict)
        for row in served:
            if row.strategy == name:
                waits[row.seed][row.round] = max(row.seconds, waits[row.seed].get(row.round, 0.0))
        lines.append(
            Line(
                strategy=name,
                scores=scores[name],
                mean=interval(scores[name]),
                worst=worst_decile(scores[name], sign),
                against={other: paired(scores[name], scores.get(other, {}), sign) for other in references},
                megabytes={d: sum(r.bytes.get(f"{d}_{level}") or 0 for r in own) / seeds / 1e6 for d in ("up", "down")},
                seconds=median([sum(rounds.values()) for rounds in waits.values()] or [0.0]),
                role=role,
                rival=rival,
                beyond=paired(scores[name], scores[rival], sign) if rival else None,
                seeds=every_seed,
                learns_from=seen.get(name, ()),
            )
        )
    return Comparison(metric, level, lines)


def sees_no_more(control: str, strategy: str, learns_from: Mapping[str, Sequence[str]]) -> bool:
    """Whether a control's models depend on no split that the strategy's models do not; also if that is not known."""
    return strategy not in learns_from or set(learns_from.get(control, ())) <= set(learns_from[strategy])


def with_score(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with ``score``: the mean over tasks (``task/metric``) of accuracy, or of exact match for texts."""
    tasks = sorted({task for task, slash, _ in (name.partition("/") for name in metrics) if slash})
    found = [metrics.get(f"{task}/accuracy", metrics.get(f"{task}/exact_match")) for task in tasks]
    known = [value for value in found if value is not None]
    return {**metrics, "score": sum(known) / len(known)} if known else dict(metrics)


def interval(scores: Scores, statistic: Callable[[Numbers, Numbers], Numbers] | None = None) -> Interval:
    """A statistic (the mean) of scores with its percentile bootstrap interval; NaN without scores.

    Seeds and clients are each drawn with replacement, and a score's weight is how often its seed was drawn times how
    often its client was (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007): the scores of one client
    over all seeds, or of one seed over all clients, are not independent evidence.

    Args:
        scores: scores by seed and client; some may be missing.
        statistic: makes a number for each resample from the scores and their weights (resamples x scores).
    """
    if not scores:
        return Interval(math.nan, math.nan, math.nan)
    take = statistic or (lambda values, weights: weights @ values / weights.sum(axis=1))
    values, generator = np.asarray(list(scores.values()), dtype=np.float64), np.random.default_rng(0)
    weights = np.ones((RESAMPLES, len(scores)))
    for kept in zip(*scores, strict=True):  # the seeds of the scores, then their clients
        names, places = np.unique(np.asarray(kept), return_inverse=True)
        weights *= generator.multinomial(len(names), [1 / len(names)] * len(names), RESAMPLES)[:, places]
    weights = weights[weights.any(axis=1)]  # if scores are missing, a resample may have none
    low, high = np.percentile(take(values, weights), [2.5, 97.5])
    return Interval(float(take(values, np.ones((1, len(scores))))[0]), float(low), float(high))


def worst_decile(scores: Scores, sign: int = 1) -> Interval:
    """The mean of the worst tenth of all clients and seeds, rounded up; ``sign`` -1: high is bad.

    One or two scores have no interval, because resamples can hardly change them.
    """

    def take(values: Numbers, weights: Numbers) -> Numbers:
        order = np.argsort(sign * values)
        weights = weights[:, order]
        count = np.ceil(weights.sum(axis=1, keepdims=True) / 10)
        taken = np.clip(count - (weights.cumsum(axis=1) - weights), 0, weights)
        return np.asarray(taken @ values[order] / count[:, 0])

    found = interval(scores, take)
    return found if len(scores) > 2 * 10 else Interval(found.value, math.nan, math.nan)


def gains_over(scores: Scores, reference: Scores, sign: int = 1) -> Scores:
    """Differences to the reference where both have a score; positive means better."""
    return {key: sign * (scores[key] - reference[key]) for key in sorted(scores) if key in reference}


def paired(scores: Scores, reference: Scores, sign: int = 1) -> Paired:
    """Summary numbers of :func:`gains_over`."""
    gains = gains_over(scores, reference, sign)
    better, worse = (sum(side * gain > 0 for gain in gains.values()) for side in (1, -1))
    return Paired(interval(gains), better, worse, len(gains) - better - worse)


def as_markdown(found: Comparison, title: str, remarks: Sequence[str] = ()) -> str:
    """The table, with an explanation of its numbers and remarks on the runs below."""
    heads, body = cells_of(found)
    text = [f"# {title}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    text += [f"| {' | '.join(cells)} |" for cells in body]
    return "\n".join([*text, "", *explanation(found), *(f"* {remark}" for remark in remarks), ""])


def terminal_table(found: Comparison) -> Table:
    """The most important columns of the table, in 80 characters."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    references = list(found.lines[0].against) if found.lines else []
    heads = [found.metric, "worst", *(f"vs {name}" for name in references), "vs control"]
    table.add_column("strategy", max_width=18, no_wrap=True, overflow="ellipsis")
    for head in [*heads, "MB up", "down", "s"]:
        table.add_column(head, justify="right", no_wrap=True)
    for line in found.ranked():
        gains = [None if name == line.strategy else line.against[name] for name in references] + [line.beyond]
        table.add_row(
            line.strategy,
            number(line.mean.value, 3),
            number(line.worst.value, 3),
            *("" if gain is None or math.isnan(gain.mean.value) else f"{gain.mean.value:+.3f}" for gain in gains),
            *(number(line.megabytes[direction], 2) for direction in ("up", "down")),
            number(line.seconds, 1),
            style="dim" if line.role else None,
        )
    return table


def cells_of(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table's heads and rows, the best mean first."""
    references = list(found.lines[0].against) if found.lines else []
    heads = ["strategy", f"mean {found.metric}", "worst decile", *(f"against {name}" for name in references)]
    heads += ["against the best control"] if found.controlled else []
    heads += ["MB up", "MB down", "seconds", "learns from"]
    body = []
    for line in found.ranked():
        cells = [line.label, _shown(line.mean), _shown(line.worst)]
        cells += ["" if name == line.strategy else difference(line.against[name]) for name in references]
        if found.controlled:
            cells.append(f"{difference(line.beyond)} {line.rival}" if line.beyond else "")
        cells += [number(line.megabytes["up"], 2), number(line.megabytes["down"], 2), number(line.seconds, 1)]
        cells.append(" + ".join(line.learns_from) or "-")
        body.append(cells)
    return heads, body


def explanation(found: Comparison, brief: bool = False) -> list[str]:
    """Explains the table's numbers, a line for each; ``brief``: for a table without intervals."""
    which = " (less is better)" if found.sign < 0 else ""
    if found.metric == "score":
        which = " (mean over a client's tasks of accuracy, or of exact match if texts are written)"
    wired = found.level == "wire"
    total = max((len(line.scores) for line in found.lines), default=0)
    count = math.ceil(total / 10)
    level = "on the wire" if wired else "of serialised messages (the wire was not measured)"
    waited = (
        "until the slowest client of each round had answered" if wired else "that each round's slowest client worked"
    )
    lines = {
        "metric": f"* {found.metric}{which} of each client's personal model on its own data after the last round.",
        "intervals": f"* In brackets 95 % bootstrap intervals ({RESAMPLES:,} resamples of seeds, and of clients). "
        "They show only the variation of these few seeds.",
        "decile": f"* Worst decile: mean of the worst tenth of all clients and seeds, rounded up ({count} of {total}). "
        "Its interval, left out for fewer than 3, cannot reach beyond the worst that was seen.",
        "against": "* Against: mean of the differences, client by client of the same seed; positive is better "
        "(better/worse). Each interval is for one difference: of 40 strategies that are no better, one is expected "
        "above 0 by chance.",
        "costs": f"* MB: {level}, everything from registration on, all clients, mean over seeds. Seconds: {waited}, "
        "summed over rounds, median over seeds.",
        "learns": "* Learns from: the examples that decide a client's model, by training or by choosing weights or "
        "models. A choice on validation examples has seen more than `local`; `local-all` trains on them, too.",
        "controls": "* Controls show what is gained without merging: `fedavg-head` (FedAvg, heads re-fitted locally), "
        "`fedavg-tuned` (FedAvg and fine-tuning, equal compute), `local-all` (local training on training and "
        "validation examples), `local-twice` (two local runs of one client, "
        "averaged). A strategy gains by merging only what it has beyond the best control that learns from no other "
        "examples than it does: `local-all` judges those that choose on validation examples.",
    }
    if brief:
        del lines["intervals"]
        lines["decile"] = f"* Worst: mean of the worst tenth of all clients and seeds, rounded up ({count} of {total})."
        lines["against"] = "* vs: mean of the differences, client by client of the same seed; positive is better."
    return list(lines.values())


def _shown(found: Interval) -> str:
    if math.isnan(found.low):
        return number(found.value, 3)
    return f"{number(found.value, 3)} [{number(found.low, 3)}, {number(found.high, 3)}]"


def difference(found: Paired) -> str:
    """Mean, interval, and numbers of better and worse pairs."""
    mean = found.mean
    if math.isnan(mean.value):
        return "-"
    return f"{mean.value:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}] ({found.better}/{found.worse})"


def number(value: float | None, digits: int) -> str:
    """A number with so many digits; a dash if there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
