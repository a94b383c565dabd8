"""A comparison's progress messages: the number of runs, how each ended, and the expected time left."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from server_app.run.federation import NoClientError
from server_app.tools.compare.processes import NotWorthError
from server_app.tools.demo import read_summary


class Job(Protocol):
    """One run."""

    @property
    def strategy(self) -> str:
        """The strategy's name."""

    @property
    def seed(self) -> int:
        """The run's seed."""

    @property
    def name(self) -> str:
        """The run's folder."""


class HopelessError(RuntimeError):
    """In the first run, every client failed for the same reason, so the other runs would fail, too."""


class Progress:
    """Live progress: in a terminal, a bar for all runs and one for each running one; and a line when a run ends."""

    def __init__(
        self,
        console: Console,
        jobs: Sequence[Job],
        missing: Sequence[Job],
        runs: Path,
        answers: int,
        workers: int = 1,
    ) -> None:
        self.console, self.jobs, self.missing, self.runs, self.answers = console, jobs, missing, runs, answers
        self.failed: dict[str, str] = {}
        self.workers = workers
        self.ends: list[float] = []  # seconds of each run that was carried out
        self.tasks: dict[int, tuple[TaskID, float]] = {}
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        self.bars = Bars(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self.overall = self.bars.add_task("runs", total=len(jobs), completed=len(jobs) - len(missing))

    def __enter__(self) -> Progress:
        self.bars.start()
        seeds = len({job.seed for job in self.jobs})
        kept = len(self.jobs) - len(self.missing)
        said = f"{len(self.jobs)} runs: {len(self.jobs) // max(seeds, 1)} strategies, {seeds} seed{'s' * (seeds > 1)}"
        self.console.print(f"{said}; {kept} are here already" if kept else said, highlight=False)
        for job in self.jobs:
            if job not in self.missing:
                self._say(job, "kept")
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.bars.stop()
        if kind is KeyboardInterrupt:
            self.console.print("stopped; the same command continues with the missing runs", highlight=False)

    def started(self, index: int) -> None:
        """A run begins."""
        job = self.missing[index]
        task = self.bars.add_task(f"{job.strategy}, seed {job.seed}: answers", total=self.answers)
        self.tasks[index] = task, time.monotonic()

    def answered(self, index: int) -> None:
        """One of its clients has answered."""
        self.bars.advance(self.tasks[index][0])

    def ended(self, index: int, why: str) -> None:
        """A run has ended; ``why`` says why it failed, or is empty.

        Raises:
            HopelessError: no other run is worth trying.
        """
        job, (task, started) = self.missing[index], self.tasks.pop(index)
        skipped = why.startswith(f"{NotWorthError.__name__}: ")
        hopeless = why.startswith(f"{NoClientError.__name__}: ")
        why = re.sub(r"^(NoClientError|NotEnoughClientsError|ClusterError|NotWorthError): ", "", why)
        again = why in self.failed.values()
        if why and not skipped:
            self.failed[job.name] = why
        self.bars.remove_task(task)
        self.bars.advance(self.overall)
        self.ends.append(time.monotonic() - started)
        failed = "failed for the same reason" if again else f"failed ({why})"
        said = f"skipped, {why}" if skipped else failed if why else "finished"
        self._say(job, f"{said}, {self.ends[-1]:.0f} s{self._expected()}")
        if hopeless and len(self.ends) == 1 and len(self.missing) == len(self.jobs):
            rest = len(self.jobs) - 1
            self.console.print(f"The other {rest} runs are not tried: they would fail for the same reason.")
            raise HopelessError

    def _expected(self) -> str:
        """The number of runs left, and how long they will take at the present speed."""
        left = len(self.missing) - len(self.ends)
        seconds = left * sum(self.ends) / len(self.ends) / min(self.workers, max(left, 1))
        return (
            f"; {left} left, about {seconds / 60:.0f} min" if left and seconds >= 60 else f"; {left} left" * bool(left)
        )

    def _say(self, job: Job, word: str) -> None:
        mean = (read_summary(self.runs / job.name) or {}).get("mean_accuracy")
        score = "" if mean is None else f", accuracy {mean:.3f}"
        self.console.print(
            f"  {job.strategy}, seed {job.seed}: {word}{score}", highlight=False, markup=False, soft_wrap=True
        )
