"""SIGKILL anywhere: the resumed run ends as one that was never stopped, to the bit, for every strategy."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from collections.abc import Iterator

import pytest

from server_app.run.run_directory import RunDirectory
from strategies import STRATEGIES
from tests.faults.killing import FAMILIES, LONG, MAIN, Killer, assert_same, assert_valid

SEED = 20
CHOSEN = STRATEGIES if LONG else MAIN


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    started = Killer(tmp_path_factory.mktemp("runs"))
    yield started
    started.close()


def killed(status: int, by: int = signal.SIGKILL) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == by


def kills_of(strategy: str) -> int:
    """How often; at every second one, the resumed run is killed as well."""
    return (20 if strategy in MAIN else 5) if LONG else 1


@pytest.mark.parametrize("strategy", CHOSEN)
def test_killed_at_random_moments_and_resumed(strategy: str, killer: Killer) -> None:
    """Server and clients at once, in whatever either was doing: the worst case of a machine that goes down."""
    chance = random.Random(f"{SEED}:{strategy}")
    moments = killer.finish(f"baseline-{strategy}", strategy=strategy)  # nobody stops this one
    for number in range(kills_of(strategy)):
        name = f"killed-{strategy}-{number}"
        moment = chance.randint(1, moments)
        status, _ = killer.start(name, kill_at=moment, strategy=strategy)
        assert killed(status), (moment, killer.log())
        if number % 2:
            killer.start(name, resume=(killer.runs / name / "config.toml").exists(),
                         kill_at=chance.randint(1, 60), strategy=strategy)  # fmt: skip
        if not (killer.runs / name / "summary.json").exists():
            killer.finish(name, strategy=strategy)
        assert_same(killer.runs / name, killer.runs / f"baseline-{strategy}")
        shutil.rmtree(killer.runs / name)


@pytest.mark.parametrize("strategy", STRATEGIES if LONG else FAMILIES[:2])
def test_stopped_after_every_round(strategy: str, killer: Killer) -> None:
    """What a strategy keeps between rounds, in numbers and in what it draws, is all in its checkpoints."""
    config = {"strategy": strategy, "num_server_rounds": 3}
    if not (killer.runs / f"baseline-{strategy}" / "summary.json").exists():
        killer.finish(f"baseline-{strategy}", **config)
    name = f"stopped-{strategy}"
    for round_ in (1, 2):
        status, _ = killer.start(name, resume=round_ > 1, kill_after_round=round_, **config)
        assert killed(status), killer.log()
        assert_valid(killer.runs / name, round_)
    killer.finish(name, **config)
    assert_same(killer.runs / name, killer.runs / f"baseline-{strategy}")


@pytest.mark.parametrize("strategy", STRATEGIES if LONG else MAIN[-2:-1])
def test_a_client_killed_anywhere_is_asked_again_and_the_run_needs_no_resume(strategy: str, killer: Killer) -> None:
    """SIGKILL of the process that carries out a plan: the server goes on, and the numbers are those of no kill."""
    config = {"strategy": strategy, "round_timeout": 60.0}
    if not (killer.runs / f"baseline-{strategy}" / "summary.json").exists():
        killer.finish(f"baseline-{strategy}", strategy=strategy)
    chance = random.Random(f"{SEED}:client:{strategy}")
    for number in range(5 if LONG else 1):
        name = f"client-{strategy}-{number}"
        status, _ = killer.start(name, client_kill_at=chance.randint(1, 100), **config)
        assert status == 0, killer.log()
        records = [found for found in RunDirectory(killer.runs / name).rounds() if "clients" in found]
        attempts = [client.get("attempts", 1) for record in records for client in record["clients"].values()]
        assert sorted(attempts)[-2:] == [1, 2]
        assert_same(killer.runs / name, killer.runs / f"baseline-{strategy}")


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ("full", "No space left"),
        ("torn", "File too large|cannot write the ledger"),
        ("exit", "SystemExit"),
        ("terminate", None),
    ],
)
def test_a_full_disk_and_sigterm_leave_a_run_that_goes_on(how: str, ends: str | None, killer: Killer) -> None:
    """From a random moment on nothing, or of each file only the beginning can be written; SIGTERM during a write."""
    if not (killer.runs / "baseline-fedavg" / "summary.json").exists():
        killer.finish("baseline-fedavg", strategy="fedavg")
    chance = random.Random(f"{SEED}:{how}")
    for number in range(20 if LONG else 1):
        name = f"{how}-{number}"
        status, _ = killer.start(name, kill_at=chance.randint(10, 250), how=how, strategy="fedavg")
        if ends:
            assert os.waitstatus_to_exitcode(status) == 1
            assert re.search(ends, killer.log())
        else:
            assert killed(status, signal.SIGTERM)
        assert_valid(killer.runs / name)
        killer.finish(name, strategy="fedavg")
        assert_same(killer.runs / name, killer.runs / "baseline-fedavg")


@pytest.mark.parametrize("seconds", [86400.0, -86400.0] if LONG else [-86400.0])
def test_a_clock_that_jumps_changes_no_number(seconds: float, killer: Killer) -> None:
    if not (killer.runs / "baseline-fedavg" / "summary.json").exists():
        killer.finish("baseline-fedavg", strategy="fedavg")
    name = f"clock{seconds:.0f}"
    status, _ = killer.start(name, clock=seconds, strategy="fedavg")
    assert status == 0, killer.log()
    assert_same(killer.runs / name, killer.runs / "baseline-fedavg")


def test_a_torn_checkpoint_is_passed_over_and_clients_still_hold_the_slots_before_it(killer: Killer) -> None:
    """Not what a kill leaves, but a disk: the last checkpoint is damaged, clients are a round further."""
    for strategy in ("fedavg", "local", "fedmosaic") if LONG else ("fedmosaic",):
        if not (killer.runs / f"baseline-{strategy}" / "summary.json").exists():
            killer.finish(f"baseline-{strategy}", strategy=strategy)
        name = f"torn-{strategy}"
        killer.finish(name, strategy=strategy)
        run = killer.runs / name
        (run / "summary.json").unlink()
        torn = run / "checkpoints" / "round-0003" / "state.safetensors"
        torn.write_bytes(torn.read_bytes()[:-1])
        found = RunDirectory(run).newest_checkpoint()
        assert found is not None
        assert found.round == 2
        killer.finish(name, strategy=strategy)
        assert_same(run, killer.runs / f"baseline-{strategy}")
