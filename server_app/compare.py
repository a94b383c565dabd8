"""``fedalloy compare``: strategies over the same clients, data, base model, local work and seeds; a folder of results.

    OUT/runs/<strategy>-seed0-<digest>/   every run as any other, kept: a finished one is not run again
    OUT/results.csv                       client x seed x strategy x round
    OUT/table.md, OUT/report.html         what they say

The digest names the run's configuration, so a changed setting is another run. The controls of
:mod:`strategies.controls`, ``local`` and ``fedavg`` are always among the strategies.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from adapters.durable import write_durably
from server_app.cluster import LocalCluster, Settings
from server_app.comparison import Comparison, Row, as_markdown, comparison_of
from server_app.comparison_report import ReportError, as_html
from server_app.demo import terminate_as_interrupt
from server_app.in_process import InProcessGrid
from server_app.ledger import Ledger
from server_app.run_directory import RunDirectory
from server_app.superlink import ClusterError, SuperLink
from strategies import CONTROLS, STRATEGIES
from strategies.options import require_choice

Engine = Callable[[Mapping[str, Any], int, Path, Callable[[], None]], None]
"""``(run-config, clients, runs folder, call after every answer)``: carries out one run, or raises."""
REFERENCES = ("local", "fedavg")
LEVELS = ("tensor", "message", "wire")


@dataclass(frozen=True)
class Job:
    """One run of a comparison; ``place`` is where it is carried out, which decides what of its bytes is measured."""

    strategy: str
    seed: int
    config: Mapping[str, Any]
    place: str = "process"

    @property
    def name(self) -> str:
        """The run's folder: strategy, seed, and a digest of everything that the run is told."""
        text = json.dumps([self.place, dict(self.config)], sort_keys=True)
        return f"{self.strategy}-seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def compare(
    scenario: str,
    strategies: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    console: Console,
    *,
    clients: int = 4,
    rounds: int = 4,
    options: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    place: str = "process",
) -> tuple[Comparison, dict[str, str]]:
    """Run what has not been run, and write the folder; the comparison, and why runs failed by their names.

    Options of one strategy (``fedmerge.models``) go to that one only: another one's runs do not change with them.
    ``place`` is ``"process"``, or ``"cluster"``: a SuperLink and SuperNodes, started for this and stopped after.

    Raises:
        OptionError: a strategy is unknown.
    """
    chosen = list(dict.fromkeys([*REFERENCES, *strategies, *(control.name for control in CONTROLS)]))
    for name in chosen:
        require_choice("--strategies", name, STRATEGIES)
    jobs = list(jobs_of(chosen, seeds, scenario, clients, rounds, options or {}, place))
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    finished = all(is_finished(runs / job.name) for job in jobs)
    with (
        _quiet(),
        _started(place if not finished and engine is None else "process", clients, runs, console) as started,
        _progress(console, len(jobs)) as (progress, overall),
    ):
        for job in jobs:
            kept = is_finished(runs / job.name)
            if not kept:
                failed |= _run(job, clients, runs, engine or started, progress, rounds)
            progress.advance(overall)
            if not console.is_terminal:
                word = "kept" if kept else f"failed ({failed[job.name]})" if job.name in failed else "finished"
                console.print(f"  {job.strategy}, seed {job.seed}: {word}", highlight=False, soft_wrap=True)
    rows = [row for job in jobs if is_finished(runs / job.name) for row in rows_of(job, runs / job.name)]
    found = comparison_of(rows, [name for name in chosen if any(row.strategy == name for row in rows)], REFERENCES)
    title = f"{scenario}: {clients} clients, {rounds} rounds, seeds {', '.join(map(str, seeds))}"
    write_durably(out / "results.csv", as_csv(rows).encode())
    write_durably(out / "table.md", as_markdown(found, title).encode())
    records = {job.name: (job, RunDirectory(runs / job.name).rounds()) for job in jobs if is_finished(runs / job.name)}
    try:
        write_durably(out / "report.html", as_html(found, rows, title, _weights(records)).encode())
    except ReportError as error:
        console.print(str(error), highlight=False, markup=False)
    return found, failed


def jobs_of(
    strategies: Sequence[str],
    seeds: Sequence[int],
    scenario: str,
    clients: int,
    rounds: int,
    options: Mapping[str, Any],
    place: str = "process",
) -> Iterator[Job]:
    """Every run, seed by seed: a comparison that is interrupted has all strategies of the first seeds."""
    for seed in seeds:
        for strategy in strategies:
            others = tuple(f"{name}." for name in STRATEGIES if name != strategy)
            config: dict[str, Any] = {key: value for key, value in options.items() if not key.startswith(others)}
            config |= {"strategy": strategy, "scenario": scenario, "seed": seed}
            yield Job(strategy, seed, config | {"num-server-rounds": rounds, "min-clients": clients}, place)


def is_finished(run: Path) -> bool:
    """Whether a run has its summary, which is written last."""
    return (run / "summary.json").exists()


def in_process(config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]) -> None:
    """The engine without processes: the wire is not measured, all else is as it would be."""
    from server_app.run import run

    def count(node: int, message: Message, reply: Message | None) -> Message | None:
        answered()
        return reply

    config = {**config, "runs-dir": str(runs)}
    grid = InProcessGrid(clients, runs, config, None, count)
    run(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))


def on_cluster(
    cluster: SuperLink, config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]
) -> None:
    """The engine on real Flower processes, with every byte on the wire.

    Raises:
        ClusterError: the run did not end well; its last records are in its folder.
    """
    directory, seen = RunDirectory(runs / str(config["run-name"])), [0]

    def look() -> None:
        answers = sum(len(record["clients"]) for record in directory.rounds())
        for _ in range(answers - seen[0]):
            answered()
        seen[0] = max(seen[0], answers)

    outcome = cluster.run({**config, "runs-dir": str(runs.resolve())}, look)
    if not outcome.completed or not is_finished(directory.path):
        raise ClusterError(f"the run ended as {outcome.status}")


def rows_of(job: Job, run: Path) -> Iterator[Row]:
    """A finished run's rows: its rounds as the clients evaluated what they were sent, and the delivery."""
    counted: dict[tuple[int, str], dict[str, int | None]] = {}
    with Ledger(run / "ledger.sqlite", read_only=True) as ledger:
        for item in ledger.per_client_round():
            found = counted.setdefault((item.round, item.client), {})
            found |= {f"{item.direction}_{level}": getattr(item, level) for level in LEVELS}
    for record in RunDirectory(run).rounds():
        if record["phase"] not in ("train", "deliver"):
            continue
        for client, answer in record["clients"].items():
            yield Row(
                job.strategy,
                job.seed,
                client,
                int(record["round"]),
                record["phase"],
                answer["status"],
                dict(answer.get("metrics", {}).get("personal", {})),
                float(answer.get("seconds", 0.0)),
                float(answer.get("train_seconds", 0.0)),
                counted.get((int(record["round"]), client), {}),
            )


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each client, seed, strategy and round; empty where something was not measured."""
    metrics = sorted({name for row in rows for name in row.metrics})
    counts = [f"{direction}_{level}" for direction in ("up", "down") for level in LEVELS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = ["strategy", "seed", "client", "round", "phase", "status", "seconds", "train_seconds"]
    writer.writerow([*keys, *metrics, *(f"{name}_bytes" for name in counts)])
    for row in rows:
        numbers = [row.metrics.get(name, "") for name in metrics]
        sizes = ["" if row.bytes.get(name) is None else row.bytes[name] for name in counts]
        writer.writerow([*(getattr(row, key) for key in keys), *numbers, *sizes])
    return text.getvalue()


def _run(job: Job, clients: int, runs: Path, engine: Engine, progress: Progress, rounds: int) -> dict[str, str]:
    shutil.rmtree(runs / job.name, ignore_errors=True)  # it was interrupted
    task = progress.add_task(f"{job.strategy}, seed {job.seed}", total=clients * (rounds + 2))
    try:
        engine({**job.config, "run-name": job.name}, clients, runs, lambda: progress.advance(task))
    except Exception as error:  # the others are still worth their time; the table says what is missing
        return {job.name: f"{type(error).__name__}: {error}"}
    finally:
        progress.remove_task(task)
    return {}


def _weights(records: Mapping[str, tuple[Job, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """What was merged in each round, by strategy, of its first seed: rows of numbers by client."""
    found: dict[str, list[dict[str, Any]]] = {}
    for job, rounds in records.values():
        if job.strategy in found:
            continue
        matrices = []
        for record in rounds:
            settled = record.get("settled", {})
            for kind in ("weights", "relations", "relevance"):
                rows = settled.get(kind)
                if isinstance(rows, dict):
                    matrices.append({"round": record["round"], "rows": rows})
        found[job.strategy] = matrices
    return {name: matrices for name, matrices in found.items() if matrices}


@contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Progress, Any]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task("runs", total=total)


@contextmanager
def _started(place: str, clients: int, runs: Path, console: Console) -> Iterator[Engine]:
    if place == "process":
        yield in_process
        return
    names = tuple(f"client-{index}" for index in range(clients))
    console.print(f"Starting a SuperLink and {clients} SuperNodes (TLS, one registered key each)...")
    with (
        terminate_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="fedalloy-compare-") as folder,
        LocalCluster(Path(folder) / "cluster", Settings(names, runs.resolve())) as cluster,
    ):
        yield partial(on_cluster, cluster)


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower's log would tear the progress bars; what clients did is in each run's rounds.jsonl."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
