"""Follow a run on a console: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live

from server_app.run.ending.summary import headline as scores
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from server_app.tools.live.state import FINISHED, STOPPED, RunState, read_state
from server_app.tools.live.table import as_table, headline, line_of

LOOK_SECONDS = 1.0


class Follower:
    """Shows the progress of one run; :meth:`look` may be called at any time."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path = path
        self.console = console
        self.state: RunState | None = None
        self._said = 0
        self._last = float("-inf")
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Follower:
        self.resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """Release the terminal."""
        if self._live is not None:
            self._live.stop()

    def resume(self) -> None:
        """Take the terminal again."""
        if self._live is not None:
            self._live.start()

    def look(self, *, now: bool = False) -> RunState | None:
        """Show what is new; returns the run's state, or None if its folder does not exist (yet)."""
        if not now and time.monotonic() - self._last < LOOK_SECONDS:
            return self.state
        self._last = time.monotonic()
        try:
            self.state = read_state(self.path, details=self._live is not None)
        except RunDirectoryError:
            return None
        records = self.state.records
        for record in records[self._said :]:
            self.console.print(line_of(record, self.state.rounds), highlight=False, markup=False, soft_wrap=True)
        self._said = len(records)
        if self._live is not None:
            self._live.update(as_table(self.state), refresh=True)
        return self.state


def verdict(state: RunState) -> tuple[bool, str]:
    """Whether a run that has ended succeeded, and a message about it."""
    if state.state == FINISHED:
        return True, f"finished: {scores(state.summary)}"
    if state.state == STOPPED:
        return False, f"stopped: {state.why}"
    return False, f"{headline(state)}; no process is carrying it out. {RunDirectory(state.path).how_to_resume}"


def watch(
    path: Path, console: Console, wait: Callable[[], None] = lambda: time.sleep(LOOK_SECONDS)
) -> tuple[bool, str]:
    """Follow a run until it ends; returns its :func:`verdict`.

    Raises:
        RunDirectoryError: there is no run.
    """
    read_state(path, details=False)
    with Follower(path, console) as follower:
        while True:
            state = follower.look(now=True)
            if state is not None and state.ended:
                return verdict(state)
            wait()
