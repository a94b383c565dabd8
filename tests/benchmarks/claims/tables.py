"""The results: a table for each setting of the dial, and a verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from server_app.tools.compare.statistics import Interval, Scores, interval, paired
from tests.benchmarks.claims.designs import Claim, Place
from tests.benchmarks.claims.found import Line
from tests.benchmarks.claims.jobs import Wanted

SIGNS = {"loss": -1, "accuracy": 1, "score": 1}
COSTS: Sequence[Callable[[Line], float]] = (
    lambda line: line["train_steps"],
    lambda line: line["looks"],
    lambda line: line["bytes"]["up"] / 1000,
    lambda line: line["bytes"]["down"] / 1000,
)
"""What a client spends in a whole run: training steps, examples looked at without training, kilobytes."""
SEEN, NOT_SEEN, OPEN = "seen", "not seen", "cannot be told here"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one claim at one setting of the dial; ``gain`` is that of the comparison which decides it."""

    word: str
    gain: Interval
    against: str
    seeds: int


def page(asked: Wanted, lines: Sequence[Line]) -> str:
    """Markdown: every table, the claims, and what was shrunk."""
    text = [f"### {asked.experiment.title}: {asked.base_name}", "", f"Shrunk: {asked.experiment.shrunk}", ""]
    by_dial = {dial: of_dial(asked, lines, dial) for dial in asked.chosen_dials}
    for dial, found in by_dial.items():
        place = asked.design.places[dial]
        text += [f"**{dial}** (`{place.scenario}`, {len(place.clients)} clients): {place.about}.", ""]
        text += [*table(asked, lines, found), ""] if found else ["Nothing has been run.", ""]
        text += [*by_client(asked, found, place), ""] if found and place.each else []
    metric = score_of(lines)
    for measured in ("loss", metric):
        text += [
            f"| claim, by {measured} | {' | '.join(asked.chosen_dials)} |",
            "|---" * (1 + len(asked.chosen_dials)) + "|",
        ]
        for claim in asked.claims:
            cells = [said(verdict(asked, claim, found, dial, measured)) for dial, found in by_dial.items()]
            text.append(f"| {claim.text} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def score_of(lines: Sequence[Line]) -> str:
    """The name of the metric beside loss: ``score`` where clients have tasks of several kinds."""
    return "score" if any("score" in line["metrics"] for line in lines) else "accuracy"


def of_dial(asked: Wanted, lines: Sequence[Line], dial: str) -> dict[str, list[Line]]:
    """Test lines by arm at one setting of the dial: those of the settings that the search has chosen."""
    arms: dict[tuple[str, int], list[str]] = {}  # two arms share a run if their searches chose the same
    for job in asked.test_jobs(lines):
        if job.dial == dial:
            arms.setdefault(job.key, []).append(job.arm.name)
    found: dict[str, list[Line]] = {}
    for line in lines:
        for name in arms.get((line["digest"], line["seed"]), []):
            found.setdefault(name, []).append(line)
    return found


def scores(found: Mapping[str, Sequence[Line]], name: str, metric: str, clients: Sequence[str] = ()) -> Scores:
    """Scores by seed and client of an arm's model, or of another model that its runs measured (``potara/searched``)."""
    arm, _, model = name.partition("/")
    kept = [line for line in found.get(arm, ()) if not clients or line["client"] in clients]
    models = {(line["seed"], line["client"]): line["models"].get(model, {}) if model else line["metrics"]
              for line in kept}  # fmt: skip
    return {key: numbers[metric] for key, numbers in models.items() if metric in numbers}


def table(asked: Wanted, lines: Sequence[Line], found: Mapping[str, Sequence[Line]]) -> list[str]:
    """A row for each arm, the smallest loss first, then models that arms have measured beside their own."""
    score = score_of(next(iter(found.values())))
    first = asked.method
    others = sorted({f"{arm}/{model}" for arm in found for line in found[arm] for model in line["models"]})
    names = sorted(found, key=lambda name: mean_of(scores(found, name, "loss"))) + others
    heads = ["", "setting", "loss", score, f"`{first}`'s loss is lower by"]
    heads += ["steps", "looks", "kB up", "kB down", "seeds"]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in names:
        own, arm = scores(found, name, "loss"), name.partition("/")[0]
        gain = paired(scores(found, first, "loss"), own, SIGNS["loss"]) if name != first and first in found else None
        role = asked.experiment.arm(arm).role if name == arm else ""
        cells = [
            f"`{name}` ({role})" if role else f"`{name}`",
            "",
            interval_of(own),
            interval_of(scores(found, name, score)),
        ]
        cells.append(f"{shown(gain.mean)} ({gain.better}/{gain.worse})" if gain is not None else "")
        if name == arm:
            design = asked.experiment.arm(arm)
            edge = "; at the edge" if asked.at_edge(design, lines) else ""
            cells[1] = in_words(asked.setting(design, lines) or {}) + edge
            cells += [f"{fmean(number(line) for line in found[arm]):.0f}" for number in COSTS]
            cells.append(str(len({line["seed"] for line in found[arm]})))
        else:
            cells += [""] * 5
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def by_client(asked: Wanted, found: Mapping[str, Sequence[Line]], place: Place) -> list[str]:
    """A row for each kind of client that its place tells apart: losses, the mean over clients and seeds, by arm."""
    names = sorted(found, key=lambda name: mean_of(scores(found, name, "loss")))
    rows = [f"| a client's loss | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (1 + len(names)) + "|"]
    kinds: dict[str, list[str]] = {}
    for number, has in zip(place.clients, place.each, strict=True):
        kinds.setdefault(has, []).append(f"client-{number}")
    for has, clients in kinds.items():
        means = [mean_of(scores(found, name, "loss", clients)) for name in names]
        rows.append(f"| {has} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return rows


def verdict(
    asked: Wanted, claim: Claim, found: Mapping[str, Sequence[Line]], dial: str, metric: str = "loss"
) -> Verdict | None:
    """The verdict on a claim; None if an arm has no scores.

    Better: *seen* if the interval against every one of ``against`` is above zero, *not seen* if one is below it. As
    good: the same with minus ``within`` in the place of zero. Otherwise it cannot be decided; nor with fewer than three
    seeds of any pair, nor where a client of either has no number, because its model broke down.
    """
    place = asked.design.places[dial]
    clients = [f"client-{place.clients[index]}" for index in claim.clients if index < len(place.clients)]
    if claim.clients and not clients:
        return None
    own = scores(found, claim.arm, metric, clients)
    gains: dict[str, Interval] = {}
    seeds, whole = set[int](), True
    for other in claim.against:
        theirs = scores(found, other, metric, clients)
        if not own or not theirs:
            return None
        gains[other] = paired(own, theirs, SIGNS[metric]).mean
        both = {seed for seed, _ in own.keys() & theirs.keys()}
        seeds = both if len(gains) == 1 else seeds & both
        whole = whole and all(_all_have(found, name, metric, clients) for name in (claim.arm, other))
    if len(seeds) < 3 or not whole:
        word = OPEN
    elif all(gain.low > -claim.within for gain in gains.values()):
        word = SEEN
    else:
        word = NOT_SEEN if any(gain.high < -claim.within for gain in gains.values()) else OPEN
    least = min(gains, key=lambda name: gains[name].high if word == NOT_SEEN else gains[name].low)
    return Verdict(word, gains[least], least, len(seeds))


def _all_have(found: Mapping[str, Sequence[Line]], name: str, metric: str, clients: Sequence[str]) -> bool:
    """Whether every client of every run has the metric: one that is not finite has been left out."""
    lines = [line for line in found[name.partition("/")[0]] if not clients or line["client"] in clients]
    return len(scores(found, name, metric, clients)) == len(lines)


def in_words(setting: Mapping[str, Any]) -> str:
    """A setting in words, such as ``learning-rate 0.003, damping 0.01``."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in setting.items())


def said(found: Verdict | None) -> str:
    """A verdict as a cell of a table."""
    if found is None:
        return "not run"
    few = f"; {found.seeds} of 3 seeds" if found.seeds < 3 else ""
    return f"**{found.word}**: {shown(found.gain)} against `{found.against}`{few}"


def shown(found: Interval, digits: int = 3) -> str:
    """A difference with its interval."""
    if math.isnan(found.value):
        return "-"
    return f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def interval_of(found: Scores) -> str:
    """A mean with its interval."""
    mean = interval(found)
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]" if found else "-"


def mean_of(found: Mapping[Any, float]) -> float:
    """The mean; infinity without numbers."""
    return fmean(found.values()) if found else math.inf
