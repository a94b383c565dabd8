"""``fedalloy demo``: several strategies on one local cluster, through stock ``flwr run``, and one table."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.local import LocalCluster, Settings
from server_app.tools.cluster.superlink import ClusterError, SuperLink
from server_app.tools.copy_runs import collect

ROUNDS = 4
"""Every message costs each client a fresh process and Flower's pauses: four rounds of three strategies stay well below
five minutes on two cores."""
SCENARIO_CONFIG: Mapping[str, Any] = {"scenario": "digits"}
"""Run-config of the demo beyond the defaults; how it was chosen: tests/benchmarks/accuracy/digits_headroom.py."""


@dataclass(frozen=True)
class DemoResult:
    """One strategy's run: its folder, and its ``summary.json`` or the reason why it did not finish."""

    strategy: str
    run: Path
    summary: Mapping[str, Any] | None
    reason: str = ""


def demo(
    strategies: Sequence[str],
    clients: int,
    rounds: int,
    seed: int,
    runs_dir: Path,
    console: Console,
    options: Mapping[str, Any] | None = None,
    connection: str = "",
    collect_to: Path | None = None,
) -> list[DemoResult]:
    """Run every strategy on a cluster and print the table.

    ``connection`` names a SuperLink that already runs, and ``runs_dir`` is the folder as its ServerApps see it; by
    default a cluster is started for this and stopped afterwards. Finished runs are copied to ``collect_to``.

    Raises:
        ClusterError: the cluster could not be started or reached.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything started has been stopped, and run directories stay as they are.
    """
    results: list[DemoResult] = []
    with (
        terminate_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="fedalloy-demo-") as folder,
        _cluster(clients, runs_dir, Path(folder), console, connection) as cluster,
    ):
        for strategy in strategies:
            name = free_name(runs_dir, f"demo-{strategy}", *([collect_to] if collect_to else []))
            config = {
                **SCENARIO_CONFIG,
                "strategy": strategy,
                "run-name": name,
                "runs-dir": str(runs_dir.resolve()),
                "num-server-rounds": rounds,
                "min-clients": clients,
                "seed": seed,
                **(options or {}),
            }
            results.append(_run(cluster, strategy, runs_dir / name, config, rounds, console))
            if collect_to is not None:
                collect(runs_dir / name, collect_to)
    console.print(table(results))
    for result in results:
        if result.summary is None:
            console.print(f"{result.strategy}: {result.reason}", style="red", highlight=False)
    shown = [runs_dir / result.run.name if collect_to is None else Path("runs") / result.run.name for result in results]
    console.print(f"Runs: {', '.join(map(str, shown))}", highlight=False, soft_wrap=True)
    return results


@contextmanager
def _cluster(clients: int, runs_dir: Path, folder: Path, console: Console, connection: str) -> Iterator[SuperLink]:
    """The SuperLink that runs behind ``connection``, or a cluster of its own."""
    if connection:
        yield SuperLink(connection, folder / "logs")
        return
    names = tuple(f"client-{index}" for index in range(clients))
    console.print(f"Starting a SuperLink and {clients} SuperNodes (TLS, one registered key each)...")
    settings = Settings(names, runs_dir.resolve())
    with LocalCluster(folder / "cluster", settings, lambda text: console.print(f"  {text}")) as cluster:
        yield cluster


def _run(
    cluster: SuperLink, strategy: str, run: Path, config: Mapping[str, Any], rounds: int, console: Console
) -> DemoResult:
    watcher = _Watcher(run, strategy, rounds, console)
    with watcher:
        outcome = cluster.run(config, watcher.look)
    summary = read_summary(run)
    if outcome.completed and summary is not None:
        return DemoResult(strategy, run, summary)
    return DemoResult(strategy, run, None, outcome.why(run))


class _Watcher:
    """Progress of one run, from the records that it appends: a bar in a terminal, plain lines elsewhere."""

    def __init__(self, run: Path, strategy: str, rounds: int, console: Console) -> None:
        self.run = RunDirectory(run)
        self.strategy = strategy
        self.console = console
        self.seen = 0
        self.total = rounds + 3  # registration, rounds, delivery, last counters
        self.started = time.monotonic()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[name]:<10}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=self.total, name=strategy)

    def __enter__(self) -> _Watcher:
        self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.progress.stop()

    def look(self) -> None:
        records = self.run.rounds()
        for record in records[self.seen :]:
            said = _describe(record)
            self.progress.update(self.task, completed=self.seen + 1, description=said)
            if not self.console.is_terminal:
                self.console.print(f"  {self.strategy}: {said} ({time.monotonic() - self.started:.0f} s)")
            self.seen += 1


def _describe(record: Mapping[str, Any]) -> str:
    phase, clients = record["phase"], record["clients"]
    good = sum(client["status"] == "ok" for client in clients.values())
    words = {"register": "clients registered", "deliver": "models delivered", "counters": "last counters read"}
    text = words.get(phase, f"round {record['round']}" if phase == "train" else str(phase))
    scores = [
        metrics["accuracy"]
        for client in clients.values()
        for label, metrics in client.get("metrics", {}).items()
        if label == "personal" and "accuracy" in metrics
    ]
    score = f", accuracy {sum(scores) / len(scores):.3f}" if scores else ""
    return f"{text}: {good}/{len(clients)}{score}" if clients else text


def read_summary(run: Path) -> dict[str, Any] | None:
    """A finished run's ``summary.json``, or None."""
    try:
        found: dict[str, Any] = json.loads((run / "summary.json").read_text())
        return found
    except (OSError, json.JSONDecodeError):
        return None


def table(results: Sequence[DemoResult]) -> Table:
    """Strategy x mean and worst client accuracy, wire megabytes up and down, seconds."""
    found = Table(title="FedAlloy demo", title_justify="left")
    found.add_column("strategy")
    for column in ("mean acc.", "worst acc.", "wire MB up", "wire MB down", "seconds"):
        found.add_column(column, justify="right")
    for result in results:
        if result.summary is None:
            found.add_row(result.strategy, "failed", "", "", "", "")
            continue
        counted = result.summary["bytes"]
        found.add_row(
            result.strategy,
            _number(result.summary.get("mean_accuracy"), 3),
            _number(result.summary.get("worst_accuracy"), 3),
            *(_megabytes(counted[direction].get("wire")) for direction in ("up", "down")),
            _number(result.summary["seconds"]["total"], 0),
        )
    return found


def free_name(runs_dir: Path, name: str, *more: Path) -> str:
    """``name``, or ``name-2``, ``name-3``... if that run exists, there or in one of ``more`` folders."""
    candidate, count = name, 1
    while any((folder / candidate).exists() for folder in (runs_dir, *more)):
        count += 1
        candidate = f"{name}-{count}"
    return candidate


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:.2f}"


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside the block, SIGTERM acts like Ctrl-C, so that everything is stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["ClusterError", "DemoResult", "demo", "free_name", "read_summary", "table"]
