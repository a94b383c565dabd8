"""SIGKILL anywhere: the resumed run ends as one that was never stopped, to the bit, for every strategy."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator

import pytest

from strategies import STRATEGIES
from tests.faults.killing import LONG, Killer, assert_same

SEED = 20
KILLS = 10 if LONG else 4
"""For each strategy; at every second one, the resumed run is killed as well."""


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    started = Killer(tmp_path_factory.mktemp("runs"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def baselines(killer: Killer) -> dict[str, int]:
    """Runs that nobody stops, by strategy, and how many moments each has."""
    return {name: killer.finish(f"baseline-{name}", strategy=name) for name in STRATEGIES}


def killed(status: int, by: int = signal.SIGKILL) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == by


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_at_random_moments_and_resumed(strategy: str, killer: Killer, baselines: dict[str, int]) -> None:
    """Server and clients at once, in whatever either was doing: the worst case of a machine that goes down."""
    chance = random.Random(f"{SEED}:{strategy}")
    for number in range(KILLS):
        name = f"killed-{strategy}-{number}"
        moment = chance.randint(1, baselines[strategy])
        status, _ = killer.start(name, kill_at=moment, strategy=strategy)
        assert killed(status), (moment, killer.log())
        if number % 2:
            killer.start(name, resume=(killer.runs / name / "config.toml").exists(),
                         kill_at=chance.randint(1, 60), strategy=strategy)  # fmt: skip
        if not (killer.runs / name / "summary.json").exists():
            killer.finish(name, strategy=strategy)
        assert_same(killer.runs / name, killer.runs / f"baseline-{strategy}")
        shutil.rmtree(killer.runs / name)
