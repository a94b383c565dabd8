"""What Flower logs of an app that raises: one line, or none where it has been written."""

from __future__ import annotations

import io
import logging

import pytest
from flwr.common.logger import log

from fedalloy_adapters.log_lines import log_in_one_line


def flower_logs(error: Exception) -> None:
    """As :mod:`flwr.supernode.runtime.run_clientapp` does."""
    log(logging.ERROR, "%s raised an exception", "ClientApp", exc_info=error)
    log(logging.ERROR, "Exit Code: 800\nAn unhandled exception occurred in a task process.")


@pytest.mark.parametrize("line", ["", "in words"])
def test_an_error_is_the_line_that_it_is_given(line: str, printed: io.StringIO) -> None:
    error = ValueError("x")
    log_in_one_line(error, line)
    flower_logs(error)
    assert printed.getvalue() == (f"{line}\n" if line else "")
    log(logging.ERROR, "%s raised an exception", "ClientApp", exc_info=ValueError("x"))
    assert "ClientApp raised an exception\nValueError: x" in printed.getvalue()


def test_of_many_errors_that_nobody_logs_one_is_kept(printed: io.StringIO) -> None:
    before = len(logging.getLogger("flwr").filters)
    for number in range(5):
        log_in_one_line(ValueError(str(number)), "")
    assert len(logging.getLogger("flwr").filters) <= before + 1
    log(logging.ERROR, "Exit Code: 201")
    assert printed.getvalue() == "Exit Code: 201\n"


def test_who_debugs_flower_sees_everything(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    error = ValueError("x")
    log_in_one_line(error, "")
    flower_logs(error)
    assert "ClientApp raised an exception\nValueError: x" in printed.getvalue()
    assert "Exit Code: 800" in printed.getvalue()
