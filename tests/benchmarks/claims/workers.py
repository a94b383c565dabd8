"""The work of a pool's processes, in a module of its own because a fresh process cannot import ``__main__``."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from tests.benchmarks.claims.found import Line
from tests.benchmarks.claims.jobs import Job


def begin(folder: Path, cache: Path) -> None:
    """A worker's start: one thread, a folder of its own, and the cache of base models that all share."""
    import torch

    torch.set_num_threads(1)
    own = _own(folder)
    own.mkdir()
    (own / ".cache").symlink_to(cache)


def work(job: Job, folder: Path, data: Path | None, model: str) -> list[Line]:
    """One run; see :func:`tests.benchmarks.claims.runs.carry_out`."""
    from tests.benchmarks.claims.runs import carry_out  # imports torch and transformers: not for a table

    return carry_out(job, _own(folder), data, model)


def _own(folder: Path) -> Path:
    return folder / f"worker-{multiprocessing.current_process().pid}"
