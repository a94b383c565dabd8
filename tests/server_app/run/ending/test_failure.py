"""What Flower prints when a ServerApp raises: :mod:`flwr.superlink.runtime.run_serverapp` has these lines."""

from __future__ import annotations

import io
import logging

import pytest
from flwr.common.logger import log

from server_app.run.ending.failure import FAILED, STOPPED, told_in_one_line
from server_app.run.federation import NotEnoughClientsError
from strategies.framework.options import OptionError

OURS = {OptionError("seed = -1,\nexpected 0"): FAILED, NotEnoughClientsError("2 of 3 sites"): STOPPED}


def flower_runs(error: Exception) -> None:
    """As Flower's process does it, to its end."""
    try:
        with told_in_one_line():
            raise error
    except Exception as raised:
        log(logging.ERROR, "%s raised an exception", "ServerApp", exc_info=raised)
    log(logging.ERROR, "Exit Code: 201\nAn unhandled exception occurred in the ServerApp.\n\nFor more information, ...")


@pytest.mark.parametrize("error", OURS)
def test_an_error_of_ours_is_one_line(error: Exception, printed: io.StringIO) -> None:
    flower_runs(error)
    assert printed.getvalue() == OURS[error] + str(error).replace("\n", " ") + "\n"
    log(logging.ERROR, "%s raised an exception", "Another", exc_info=ValueError("x"))
    assert "Another raised an exception" in printed.getvalue()


def test_a_defect_keeps_its_traceback(printed: io.StringIO) -> None:
    flower_runs(KeyError("labels"))
    assert "Traceback (most recent call last)" in printed.getvalue()
    assert "Exit Code: 201" in printed.getvalue()


def test_who_debugs_the_superlink_sees_everything(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_LOG_LEVEL", "debug")
    flower_runs(OptionError("seed = -1"))
    assert "Traceback (most recent call last)" in printed.getvalue()
