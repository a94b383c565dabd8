from __future__ import annotations

import pytest

from server_app.tools.bundle.screen import Screen

START = "\x1b[92mINFO\x1b[0m :     FedAlloy run x in /runs/x\n"
STOPPED = "\x1b[93mWARNING\x1b[0m :  stopped: 1 of at least 2 clients registered\n"
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
    "server_app.run.federation.NotEnoughClientsError: 1 of at least 2 clients registered": "",
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
    stopped = STOPPED if not CASES[raised] else ""
    before = START + stopped
    said, failed = shown(before + FAILURE.format(raised=raised), piece)
    assert failed
    assert said == before + (f"error: {CASES[raised]}\n" if CASES[raised] else "")


def test_a_run_that_ends_well_is_as_it_is() -> None:
    log = START + "\x1b[92mINFO\x1b[0m :     finished: mean accuracy 0.5, worst 0.4\nno line break at the end"
    assert shown(log, 5) == (log, False)


def test_words_that_are_no_traceback_are_kept() -> None:
    log = START + "ERROR :     ServerApp raised an exception\nof some other form\n"
    assert shown(log, 1000) == (log, True)
