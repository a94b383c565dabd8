"""Four experiments about the claims of four methods; resumable, with their searches, controls, tables and pictures.

    python -m tests.benchmarks.claims potara --data DATA                  # runs what is missing, prints the table
    python -m tests.benchmarks.claims potara --data DATA --base minilm --jobs 2 --minutes 30
    python -m tests.benchmarks.claims potara --table                      # prints finished runs; nothing is run
    python -m tests.benchmarks.claims potara --base minilm --picture docs/figures
    python -m tests.benchmarks.claims potara --data DATA --design smollm2 --base FOLDER    # a larger model

A finished run is a line for each of its clients in ``found/claims/<experiment>.jsonl``, on disk before the next one
begins; the same command goes on where it stopped. Runs go through the real round loop and client code in one process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from rich.console import Console

from server_app.tools.commands.arguments import parse_run_config
from tests.benchmarks.accuracy import resumable
from tests.benchmarks.claims import found
from tests.benchmarks.claims.experiments import EXPERIMENTS
from tests.benchmarks.claims.jobs import Job, Wanted
from tests.benchmarks.claims.pictures import picture
from tests.benchmarks.claims.tables import page
from tests.benchmarks.claims.workers import begin, work


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, help="Folder of the scenarios on real data.")
    parser.add_argument("--base", default="", help="A design's name, or hub id or folder of another base model.")
    parser.add_argument("--design", default="", help="Whose clients and steps another base model gets.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[], help="Instead of the design's.")
    parser.add_argument("--tries", type=int, default=Wanted.tries, help="Settings that an arm tries, at most.")
    parser.add_argument("--dials", nargs="+", default=[])
    parser.add_argument("--arms", nargs="+", default=[])
    parser.add_argument("--set", default="", help="More run-config, as for flwr run: another experiment.")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="No run begins after as many.")
    parser.add_argument("--found", type=Path, default=found.FOLDER, help="Folder of the finished runs.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--table", action="store_true", help="Run nothing.")
    parser.add_argument("--picture", type=Path, help="Write claims-<experiment>-<base>.svg there; run nothing.")
    return parser.parse_args(given)


def wanted(given: argparse.Namespace) -> Wanted:
    """What the command line asks for."""
    experiment = EXPERIMENTS[given.experiment]
    known = given.base in experiment.bases
    base = given.base if known else given.design or next(iter(experiment.bases))
    model = "" if known else given.base
    if min(given.search_seeds, default=100) < 100:
        raise SystemExit(f"--search-seeds = {given.search_seeds}: settings are chosen on seeds from 100 on")
    if base not in experiment.bases:
        raise SystemExit(f"--design = {base!r}, expected one of: {', '.join(experiment.bases)}")
    if model and not experiment.bases[base].own_model:
        raise SystemExit(f"--base = {model!r}: the scenarios of {base!r} have their own, expected one of: "
                         f"{', '.join(experiment.bases)}")  # fmt: skip
    return Wanted(
        experiment, base, model, tuple(given.seeds), tuple(given.search_seeds), tuple(given.dials), tuple(given.arms),
        tuple(sorted(parse_run_config(given.set).items())), given.tries,
    )  # fmt: skip


def run_missing(asked: Wanted, given: argparse.Namespace) -> int:
    """Run what is missing, ``--jobs`` at a time; every run's lines are on disk before the next one begins.

    Returns how many runs failed: each is reported, does not stop the others, and is tried again the next time.
    """
    path, until = given.found / f"{asked.experiment.name}.jsonl", time.monotonic() + 60 * given.minutes
    if asked.design.needs_data and given.data is None:
        raise SystemExit(f"the scenarios of {asked.base!r} read their data from a folder: expected --data FOLDER")
    given.cache.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for job, lines in _results(asked, given, path, Path(name), until):
            if isinstance(lines, Exception):
                failed += 1
                print(f"FAILED {job.split} {job.name} {dict(job.setting)}: {type(lines).__name__}: {lines}", flush=True)
                continue
            if job.key in found.done(found.read(path)):  # another process was as quick
                continue
            resumable.append(path, lines)
            losses = " ".join(f"{line['metrics'].get('loss', float('nan')):.3f}" for line in lines)
            print(f"{job.split} {job.name} {dict(job.setting)}: {losses} ({lines[0]['run_cpu_seconds']} s)", flush=True)
    return failed


def _results(
    asked: Wanted, given: argparse.Namespace, path: Path, folder: Path, until: float
) -> Iterator[tuple[Job, list[found.Line] | Exception]]:
    fresh = multiprocessing.get_context("spawn")  # torch has threads, which a fork would lose
    data = given.data.resolve() if given.data else None
    with ProcessPoolExecutor(given.jobs, fresh, begin, (folder, given.cache.resolve())) as pool:
        busy: dict[Future[list[found.Line]], Job] = {}
        begun: set[tuple[str, int]] = set()
        while True:
            waiting = [job for job in asked.next_jobs(found.read(path)) if job.key not in begun]
            while waiting and len(busy) < given.jobs and time.monotonic() < until:
                job = waiting.pop(0)
                begun.add(job.key)
                busy[pool.submit(work, job, folder, data, asked.model)] = job
            if not busy:
                return
            for ended in wait(busy, return_when=FIRST_COMPLETED).done:
                error = ended.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield busy.pop(ended), ended.result() if error is None else error


def main(arguments: list[str] | None = None) -> int:
    """See the module's docstring; returns 1 if a run failed."""
    given = parse(arguments)
    asked = wanted(given)
    failed = 0 if given.table or given.picture is not None else run_missing(asked, given)
    lines = found.read(given.found / f"{asked.experiment.name}.jsonl")
    if given.picture is not None:
        path = given.picture / f"claims-{asked.experiment.name}-{asked.base_name}.svg"
        path.write_text(picture(asked, lines))
    Console(width=10_000, highlight=False, markup=False, soft_wrap=True).print(page(asked, lines))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
