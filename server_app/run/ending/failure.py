"""Reports why a run failed: an error of ours becomes one line, its own message.

The messages of our errors say what a user can do. Any other error keeps its traceback: it is a defect, and a report of
it needs the traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedalloy_adapters.log_lines import log_in_one_line
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
        if type(error).__module__.startswith(OURS):
            # Imported here, because it imports torch, and commands that only pass on logs import this module, too.
            from server_app.run.federation import NotEnoughClientsError

            word = STOPPED if isinstance(error, NotEnoughClientsError) else FAILED
            log_in_one_line(error, word + one_line(error, MAX_WORDS))
        raise
