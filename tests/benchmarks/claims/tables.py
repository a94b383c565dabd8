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
    """The verdict on one claim at one setting of the dial; ``gain`` is the smallest over all comparisons."""

    word: str
    gain: Interval
    against: str
    seeds: int


def page(asked: Wanted, lines: Sequence[Line]) -> str:
    """Markdown: every table, the claims, and what was shrunk."""
    text = [f"### {asked.experiment.title}: {asked.base_name}", "", f"Shrunk: {asked.experiment.shrunk}", ""]
    for dial in asked.chosen_dials:
        place = asked.design.places[dial]
        found = of_dial(asked, lines, dial)
        text += [f"**{dial}** (`{place.scenario}`, {len(place.clients)} clients): {place.about}.", ""]
        text += [*table(asked, lines, found), ""] if found else ["Nothing has been run.", ""]
        text += [*by_client(asked, found, place), ""] if found and place.each else []
    text += ["| claim | " + " | ".join(asked.chosen_dials) + " |", "|" + "---|" * (1 + len(asked.chosen_dials))]
    for claim in asked.claims:
        cells = [said(verdict(asked, claim, of_dial(asked, lines, dial), dial)) for dial in asked.chosen_dials]
        text.append(f"| {claim.text} | {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def of_dial(asked: Wanted, lines: Sequence[Line], dial: str) -> dict[str, list[Line]]:
    """Test lines by arm at one setting of the dial: those of the settings that the search has chosen."""
    keys = {job.key: job.arm.name for job in asked.test_jobs(lines) if job.dial == dial}
    found: dict[str, list[Line]] = {}
    for line in lines:
        name = keys.get((line["digest"], line["seed"]))
        if name is not None:
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
    score = "score" if any("score" in line["metrics"] for line in next(iter(found.values()))) else "accuracy"
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
            cells[1] = in_words(asked.setting(asked.experiment.arm(arm), lines) or {})
            cells += [f"{fmean(number(line) for line in found[arm]):.0f}" for number in COSTS]
            cells.append(str(len({line["seed"] for line in found[arm]})))
        else:
            cells += [""] * 5
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def by_client(asked: Wanted, found: Mapping[str, Sequence[Line]], place: Place) -> list[str]:
    """A row for each client, as its place says what it has: losses, the mean over seeds, by arm."""
    names = sorted(found, key=lambda name: mean_of(scores(found, name, "loss")))
    rows = [f"| each client's loss | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (1 + len(names)) + "|"]
    for number, has in zip(place.clients, place.each, strict=True):
        means = [mean_of(scores(found, name, "loss", [f"client-{number}"])) for name in names]
        rows.append(f"| {has} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return rows


def verdict(
    asked: Wanted, claim: Claim, found: Mapping[str, Sequence[Line]], dial: str, metric: str = "loss"
) -> Verdict | None:
    """The verdict on a claim; None if an arm has no scores.

    Better: *seen* if the interval against every one of ``against`` is above zero, *not seen* if a mean gain is not. As
    good: seen if all intervals are above minus ``within``, not seen if one is below it. Otherwise, and with fewer than
    three seeds, it cannot be decided.
    """
    place = asked.design.places[dial]
    clients = [f"client-{place.clients[index]}" for index in claim.clients if index < len(place.clients)]
    if claim.clients and not clients:
        return None
    own = scores(found, claim.arm, metric, clients)
    gains: dict[str, Interval] = {}
    for other in claim.against:
        theirs = scores(found, other, metric, clients)
        if not own or not theirs:
            return None
        gains[other] = paired(own, theirs, SIGNS[metric]).mean
    least = min(gains, key=lambda name: gains[name].low)
    seeds = len({seed for seed, _ in own})
    return Verdict(_word(gains, claim.within, seeds), gains[least], least, seeds)


def _word(gains: Mapping[str, Interval], within: float, seeds: int) -> str:
    if seeds < 3:
        return OPEN
    if within:
        if all(gain.low > -within for gain in gains.values()):
            return SEEN
        return NOT_SEEN if any(gain.high < -within for gain in gains.values()) else OPEN
    if all(gain.low > 0 for gain in gains.values()):
        return SEEN
    return NOT_SEEN if any(gain.value <= 0 for gain in gains.values()) else OPEN


def in_words(setting: Mapping[str, Any]) -> str:
    """A setting in words, such as ``learning-rate 0.003, damping 0.01``."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in setting.items())


def said(found: Verdict | None) -> str:
    """A verdict as a cell of a table."""
    if found is None:
        return "not run"
    few = f"; {found.seeds} of 3 seeds" if found.seeds < 3 else ""
    return f"**{found.word}**: {shown(found.gain)} against `{found.against}`{few}"


def shown(found: Interval) -> str:
    """A difference with its interval."""
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]" if not math.isnan(found.value) else "-"


def interval_of(found: Scores) -> str:
    """A mean with its interval."""
    mean = interval(found)
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]" if found else "-"


def mean_of(found: Mapping[Any, float]) -> float:
    """The mean; infinity without numbers."""
    return fmean(found.values()) if found else math.inf
