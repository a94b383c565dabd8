"""How a run that failed is told: an error of ours is one line, in its own words.

Flower (1.39) logs whatever a ServerApp raises with its traceback, and then the process's exit code with a link; ``flwr
run --stream`` shows both. The words of our errors say what a user can do, so where one of ours is raised, a filter on
Flower's logger in the ServerApp's process makes one line of these. The error is raised all the same: that is how the
SuperLink knows that the run failed. Any other error keeps its traceback: it is a defect, and who reports it needs that.
With ``FLWR_LOG_LEVEL=DEBUG`` at the SuperLink everything is as Flower writes it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fedalloy_adapters.words import one_line

OURS = ("client_app.", "fedalloy_adapters.", "server_app.", "strategies.")
"""Packages whose errors are in words for people."""
FAILED = "the run failed: "
STOPPED = "the run stopped: "
"""For want of clients; what was done is saved, and the run can go on."""
MAX_WORDS = 4000


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """What is raised here and is ours, Flower logs in one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(OURS) and os.environ.get("FLWR_LOG_LEVEL", "").upper() != "DEBUG":
            logging.getLogger("flwr").addFilter(_OneLine(error))
        raise


class _OneLine(logging.Filter):
    """Of the records about one error that is raised, the first becomes one line; the rest are left out."""

    def __init__(self, error: Exception) -> None:
        # Here, because commands that only pass on what others log import this module, and that one imports torch.
        from server_app.run.federation import NotEnoughClientsError

        super().__init__()
        self._error = error
        word = STOPPED if isinstance(error, NotEnoughClientsError) else FAILED
        self._line = word + one_line(error, MAX_WORDS)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is self._error:
            record.msg, record.args = self._line, ()
            record.exc_info = record.exc_text = record.stack_info = None
            return True
        return not record.getMessage().startswith("Exit Code: ")
