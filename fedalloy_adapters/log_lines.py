"""One line of Flower's log for an error that a ServerApp or ClientApp raises.

Flower (1.39) logs whatever an app raises with its traceback, and then the process's exit code with a link. The words of
our errors say what somebody can do, so where one of ours is raised, a filter on Flower's logger in the app's process
makes one line of these, or none where the line has been written. The error is raised all the same: that is how Flower
knows that it failed. With ``FLWR_LOG_LEVEL=DEBUG`` everything is as Flower writes it.
"""

from __future__ import annotations

import logging
import os


def log_in_one_line(error: Exception, line: str) -> None:
    """Have Flower log this error, which is about to be raised, as ``line``; empty: not at all."""
    if os.environ.get("FLWR_LOG_LEVEL", "").upper() == "DEBUG":
        return
    logger = logging.getLogger("flwr")
    for other in [found for found in logger.filters if isinstance(found, _OneLine)]:
        logger.removeFilter(other)  # it holds an error, and clients in one process may have many
    logger.addFilter(_OneLine(error, line))


class _OneLine(logging.Filter):
    """Of the records about one error, the first becomes the line; those of the process's exit are left out."""

    def __init__(self, error: Exception, line: str) -> None:
        super().__init__()
        self._error = error
        self._line = line
        self._seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is self._error:
            record.msg, record.args = self._line, ()
            record.exc_info = record.exc_text = record.stack_info = None
            self._seen = True
            return bool(self._line)
        return not self._seen or not record.getMessage().startswith("Exit Code: ")
