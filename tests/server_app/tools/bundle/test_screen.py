from __future__ import annotations

import pytest

from server_app.run.ending.failure import FAILED, STOPPED
from server_app.tools.bundle.screen import Screen, reason_in

START = "\x1b[92mINFO\x1b[0m :     FedAlloy run x in /runs/x\n"
FAILURE = """\x1b[91mERROR\x1b[0m :     ServerApp raised an exception
Traceback (most recent call last):
  File "/x/run_serverapp.py", line 260, in run_serverapp
    context = run_(
              ^^^^^
server_app.other.FirstError: what came before

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/x/loop.py", line 85, in run
    raise
{raised}
\x1b[91mERROR\x1b[0m :     Exit Code: 201
An unhandled exception occurred in the ServerApp.

For more information, visit: <https://flower.ai/docs/framework/1.39/en/ref-exit-codes/201.html>
"""
CASES = {
    "server_app.run.federation.NotEnoughClientsError: 1 of 2": "1 of 2",
    "strategies.framework.options.OptionError: seed = -1, expected 0 or more": "seed = -1, expected 0 or more",
    "server_app.x.LongError: found this\nand that": "found this and that",
    "flwr.supercore.exit.AppExitException: gone": "AppExitException: gone",
    "KeyError: 'labels'": "KeyError: 'labels'",
    "AssertionError": "AssertionError",
}


def shown(log: str, piece: int) -> tuple[str, bool]:
    """What is printed of a log that comes in pieces, and whether it failed."""
    said: list[str] = []
    screen = Screen(said.append)
    for start in range(0, len(log), piece):
        screen.feed(log[start : start + piece])
    screen.end()
    return "".join(said), screen.failed


@pytest.mark.parametrize("raised", CASES)
@pytest.mark.parametrize("piece", [7, 10_000])
def test_a_failure_is_one_line_in_our_words(raised: str, piece: int) -> None:
    said, failed = shown(START + FAILURE.format(raised=raised), piece)
    assert failed
    assert said == START + f"error: {CASES[raised]}\n"
    assert reason_in(START + FAILURE.format(raised=raised)) == CASES[raised]


@pytest.mark.parametrize("words", [FAILED, STOPPED])
@pytest.mark.parametrize("stamp", ["", " 2026-11-29 22:40:01,337"])
def test_what_the_run_has_said_itself_is_passed_on_as_it_is(words: str, stamp: str) -> None:
    log = f"{START}\x1b[91mERROR{stamp}\x1b[0m:     {words}seed = -1: expected 0 or more\n"
    assert shown(log, 7) == (log, True)
    assert reason_in(log) == "seed = -1: expected 0 or more"


def test_a_run_that_ends_well_is_as_it_is() -> None:
    log = START + "\x1b[92mINFO\x1b[0m :     finished: mean accuracy 0.5, worst 0.4\nno line break at the end"
    assert shown(log, 5) == (log, False)


def test_words_that_are_no_traceback_are_kept() -> None:
    log = START + "ERROR :     ServerApp raised an exception\nof some other form\n"
    assert shown(log, 1000) == (log, True)
