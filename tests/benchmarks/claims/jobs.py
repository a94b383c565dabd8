"""Which runs an experiment wants next: first a search of settings for each arm, the same budget for all, then tests.

The search is on seeds from 100 on, by the mean loss of delivered models on *validation* examples, at one setting of the
dial. Each arm has up to five tries: both learning rates; then, at the better one, the method's other setting, if it has
one; then rates beyond the best one, until there are worse ones on both of its sides. Seeds 0, 1 and 2 are tested with
the winner.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tests.benchmarks.claims.designs import QUIET, Arm, Base, Claim, Config, Experiment, Place
from tests.benchmarks.claims.found import Line


@dataclass(frozen=True)
class Job:
    """One run."""

    experiment: str
    base: str
    dial: str
    place: Place
    arm: Arm
    seed: int
    split: str
    setting: tuple[tuple[str, Any], ...]
    config: tuple[tuple[str, Any], ...]

    @property
    def digest(self) -> str:
        """A digest of everything that decides the run except its seed: the clients' places, and their settings."""
        place = [self.place.scenario, self.place.clients, self.place.of]
        told = [self.base, place, self.arm.apart, self.arm.oracle and self.place.groups, self.split]
        text = json.dumps([told, sorted(self.config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def key(self) -> tuple[str, int]:
        """The run's key in :func:`tests.benchmarks.claims.found.done`."""
        return self.digest, self.seed

    @property
    def name(self) -> str:
        """A name to read."""
        return f"{self.arm.name}-{self.dial}-seed{self.seed}-{self.digest}"

    @property
    def folder(self) -> str:
        """The run's name and the name of its folder: arms and settings of the dial may have spaces in theirs."""
        return f"seed{self.seed}-{self.digest}"


@dataclass(frozen=True)
class Wanted:
    """An experiment on one base model, as the command line asks for it.

    Args:
        experiment: which one.
        base: name of one of its bases, which decides the design.
        model: another base model in its place: hub id or folder; empty: the design's.
        seeds: seeds that are tested.
        search_seeds: seeds on which settings are chosen; empty: the design's.
        dials: settings of the dial; empty: all.
        arms: names of arms; empty: all.
        more: run-config that replaces the design's.
        tries: of one arm's search, at most.
    """

    experiment: Experiment
    base: str
    model: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    search_seeds: tuple[int, ...] = ()
    dials: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    more: tuple[tuple[str, Any], ...] = ()
    tries: int = 5

    @property
    def design(self) -> Base:
        """The base's design."""
        return self.experiment.bases[self.base]

    @property
    def base_name(self) -> str:
        """The base model's name in lines and tables, without a folder of this machine."""
        return self.model.rstrip("/").rpartition("/")[2] or self.base

    @property
    def claims(self) -> list[Claim]:
        """The claims that can be decided on this base."""
        return [claim for claim in self.experiment.claims if not claim.bases or self.base in claim.bases]

    @property
    def method(self) -> str:
        """The arm that all others are compared with."""
        return self.claims[0].arm

    @property
    def chosen_arms(self) -> list[Arm]:
        """Those asked for."""
        there = [arm for arm in self.experiment.arms if not arm.bases or self.base in arm.bases]
        return [arm for arm in there if not self.arms or arm.name in self.arms]

    @property
    def chosen_dials(self) -> list[str]:
        """Those asked for."""
        return [dial for dial in self.design.places if not self.dials or dial in self.dials]

    def job(self, arm: Arm, dial: str, seed: int, split: str, setting: Config) -> Job:
        """One run of it."""
        design = self.design
        config: dict[str, Any] = dict(QUIET) | dict(design.config)
        config |= ({} if self.model else dict(design.model)) | dict(design.by_dial.get(dial, {}))
        config |= {**arm.config, **dict(self.more), **setting, "strategy": arm.strategy, "evaluate-split": split}
        place = design.places[dial]
        told = tuple(sorted(config.items()))
        return Job(
            self.experiment.name, self.base_name, dial, place, arm, seed, split, tuple(sorted(setting.items())), told
        )

    def searches(self, arm: Arm, lines: Sequence[Line]) -> list[Config]:
        """Settings that an arm tries, as far as they are known: each but the first two depends on those before."""
        low, high = self.design.rates
        tried: list[Config] = [{"learning-rate": low}, {"learning-rate": high}]
        while (best := self._best(arm, tried, lines)) is not None and len(tried) < self.tries:
            if len(tried) == 2 and arm.other:
                tried.append({**best, **arm.other})
                continue
            if not _at_edge(best, tried):
                break
            rate = best["learning-rate"]
            beyond = rate * high / low if rate == max(_rates(tried)) else rate * low / high
            tried.append({**best, "learning-rate": float(f"{beyond:.3g}")})
        return tried

    def setting(self, arm: Arm, lines: Sequence[Line]) -> Config | None:
        """The setting that the search has chosen; None before it is over."""
        arm = self.experiment.arm(arm.like) if arm.like else arm
        return self._best(arm, self.searches(arm, lines), lines)

    def at_edge(self, arm: Arm, lines: Sequence[Line]) -> bool:
        """Whether the chosen learning rate is the lowest or the highest that was tried."""
        arm = self.experiment.arm(arm.like) if arm.like else arm
        chosen = self.setting(arm, lines)
        return chosen is not None and _at_edge(chosen, self.searches(arm, lines))

    def found_setting(self, arm: Arm, lines: Sequence[Line]) -> Config:
        """The setting that the search has chosen.

        Raises:
            SystemExit: the search is not over.
        """
        setting = self.setting(arm, lines)
        if setting is None:
            raise SystemExit(f"the search for {arm.name!r} is not over: run {self.experiment.name} first")
        return setting

    def search_jobs(self, arm: Arm, setting: Config) -> list[Job]:
        """One setting on every search seed."""
        dial = self.experiment.search_dial if self.experiment.search_dial in self.design.places else ""
        dial = dial or next(iter(self.design.places))
        seeds = self.search_seeds or self.design.search_seeds
        return [self.job(arm, dial, seed, "validation", setting) for seed in seeds]

    def test_jobs(self, lines: Sequence[Line]) -> Iterator[Job]:
        """The runs to report, seed by seed, for arms whose search is over."""
        for seed in self.seeds:
            for dial in self.chosen_dials:
                for arm in self.chosen_arms:
                    setting = self.setting(arm, lines)
                    if setting is not None:
                        yield self.job(arm, dial, seed, "test", setting)

    def next_jobs(self, lines: Sequence[Line]) -> list[Job]:
        """Runs that can begin now, in order; empty when all is done."""
        there = {(line["digest"], line["seed"]) for line in lines}
        searches = [
            job for arm in self.chosen_arms if not arm.like for setting in self.searches(arm, lines)
            for job in self.search_jobs(arm, setting)
        ]  # fmt: skip
        found = {job.key: job for job in [*searches, *self.test_jobs(lines)] if job.key not in there}
        return list(found.values())

    def _best(self, arm: Arm, tried: Sequence[Config], lines: Sequence[Line]) -> Config | None:
        """The setting with the smallest validation loss, the first of equals; None until all have been run."""
        losses = [self._searched(arm, setting, lines) for setting in tried]
        known = [loss for loss in losses if loss is not None]
        return tried[known.index(min(known))] if len(known) == len(tried) else None

    def _searched(self, arm: Arm, setting: Config, lines: Sequence[Line]) -> float | None:
        """Mean validation loss of a setting; None until all of its runs are there. One that broke down is infinite."""
        jobs = {job.key for job in self.search_jobs(arm, setting)}
        own = [line for line in lines if (line["digest"], line["seed"]) in jobs]
        if {(line["digest"], line["seed"]) for line in own} != jobs:
            return None
        return fmean(_loss(line) for line in own)


def _rates(tried: Sequence[Config]) -> list[float]:
    return [setting["learning-rate"] for setting in tried]


def _at_edge(setting: Config, tried: Sequence[Config]) -> bool:
    """Whether its rate has no other rate on one of its sides."""
    return not min(_rates(tried)) < setting["learning-rate"] < max(_rates(tried))


def _loss(line: Mapping[str, Any]) -> float:
    found = line["metrics"].get("loss")
    return float("inf") if found is None else float(found)
