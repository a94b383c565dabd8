"""Reports why a run failed: an error of ours becomes one line, its own message.

Flower (1.39) logs whatever a ServerApp raises with its traceback, and then the process's exit code with a link; ``flwr
run --stream`` shows both. The messages of our errors say what a user can do. So if one of ours is raised, a filter on
Flower's logger in the ServerApp's process turns these records into one line. The error is raised all the same, because
it tells the SuperLink that the run failed. Any other error keeps its traceback: it is a defect, and a report of it
needs the traceback. With ``FLWR_LOG_LEVEL=DEBUG`` at the SuperLink, everything is as Flower writes it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fedalloy_adapters.words import one_line

OURS = ("client_app.", "fedalloy_adapters.", "server_app.", "strategies.")
"""Packages whose error messages are for users."""
FAILED = "the run failed: "
STOPPED = "the run stopped: "
"""There were too few clients; everything done is saved, and the run can go on."""
MAX_WORDS = 4000


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Inside the block, Flower logs an error of ours in one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(OURS) and os.environ.get("FLWR_LOG_LEVEL", "").upper() != "DEBUG":
            logging.getLogger("flwr").addFilter(_OneLine(error))
        raise


class _OneLine(logging.Filter):
    """Turns the first record about a raised error into one line, and leaves out the others."""

    def __init__(self, error: Exception) -> None:
        # Imported here, because it imports torch, and commands that only pass on logs import this module, too.
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
