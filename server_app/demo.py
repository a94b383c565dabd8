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

from server_app.cluster import ClusterError, LocalCluster, RunOutcome, Settings
from server_app.run_directory import RunDirectory

ROUNDS = 4
"""Every message costs each client a fresh process and seconds of imports: four rounds of three strategies stay well
below five minutes on two cores."""
SCENARIO_CONFIG: Mapping[str, Any] = {"scenario": "digits"}
"""Run-config of the demo beyond the defaults; how it was chosen: tests/benchmarks/digits_headroom.py."""


@dataclass(frozen=True)
class DemoResult:
    """One strategy's run: its folder, its ``summary.json`` where it finished, and why not where it did not."""

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
) -> list[DemoResult]:
    """Bring an ephemeral cluster up, run every strategy on it, print the table, stop everything.

    Raises:
        ClusterError: the cluster could not be started.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything has been stopped, run directories are left as they are.
    """
    results: list[DemoResult] = []
    names = tuple(f"client-{index}" for index in range(clients))
    with _terminate_as_interrupt(), tempfile.TemporaryDirectory(prefix="fedalloy-demo-") as folder:
        settings = Settings(names, runs_dir.resolve())
        console.print(f"Starting a SuperLink and {clients} SuperNodes (TLS, one registered key each)...")
        with LocalCluster(Path(folder) / "cluster", settings, lambda text: console.print(f"  {text}")) as cluster:
            for strategy in strategies:
                name = free_name(runs_dir, f"demo-{strategy}")
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
    console.print(table(results))
    for result in results:
        if result.summary is None:
            console.print(f"{result.strategy}: {result.reason}", style="red", highlight=False)
    console.print(f"Runs: {', '.join(str(result.run) for result in results)}", highlight=False, soft_wrap=True)
    return results


def _run(
    cluster: LocalCluster, strategy: str, run: Path, config: Mapping[str, Any], rounds: int, console: Console
) -> DemoResult:
    watcher = _Watcher(run, strategy, rounds, console)
    with watcher:
        outcome = cluster.run(config, watcher.look)
    summary = read_summary(run)
    if outcome.completed and summary is not None:
        return DemoResult(strategy, run, summary)
    return DemoResult(strategy, run, None, _why(run, outcome))


class _Watcher:
    """Progress of one run, from the records it appends: a bar in a terminal, plain lines elsewhere."""

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


def _why(run: Path, outcome: RunOutcome) -> str:
    stopped = [record["reason"] for record in RunDirectory(run).rounds() if record["phase"] == "stopped"]
    if stopped:
        return str(stopped[-1])
    said = [line for line in outcome.log.read_text(errors="replace").splitlines() if "Error" in line]
    return f"the run ended as {outcome.status}" + (f": {said[-1].strip()}" if said else "")


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
            _number(result.summary["mean_accuracy"], 3),
            _number(result.summary["worst_accuracy"], 3),
            *(_megabytes(counted[direction].get("wire")) for direction in ("up", "down")),
            _number(result.summary["seconds"]["total"], 0),
        )
    return found


def free_name(runs_dir: Path, name: str) -> str:
    """``name``, or ``name-2``, ``name-3``... where that run exists."""
    candidate, count = name, 1
    while (runs_dir / candidate).exists():
        count += 1
        candidate = f"{name}-{count}"
    return candidate


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:.2f}"


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that everything is stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["ClusterError", "DemoResult", "demo", "free_name", "read_summary", "table"]
