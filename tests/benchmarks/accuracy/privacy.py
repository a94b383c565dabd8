"""Accuracy against epsilon: record-level differential privacy at every client, by strategy.

    python -m tests.benchmarks.accuracy.privacy                                    # digits, five strategies
    python -m tests.benchmarks.accuracy.privacy --scenario text-8 --data DATA --clients 8

Through the real round loop and client code, in one process. Each client's noise is what Opacus says that lets its whole
budget last for just this run (Renyi accountant, delta 1 / (10 n)); held-out scores are told, and nothing protects those
(`dp.metrics = "held-out"`). Prints the clients' mean (worst) accuracy by strategy and epsilon, and the largest epsilon
that a client says was spent.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from opacus.accountants.utils import get_noise_multiplier
from rich.console import Console
from rich.table import Table

from client_app.plan.training import set_up_torch
from client_app.session import Executor
from client_app.settings import read_settings
from tests.in_process import FIRST_NODE, InProcessGrid, run_config_of, run_in_process

STRATEGIES = ("local", "fedavg", "fedprox", "ditto", "fedmerge")


def examples_of(folder: Path, clients: int, config: dict[str, Any]) -> list[int]:
    """Training examples of each client."""
    grid = InProcessGrid(clients, folder, run_config_of(**config))
    found = []
    for index in range(clients):
        context = grid.context(FIRST_NODE + index)
        said = Executor().describe(read_settings(Context(1, 2, context.node_config, RecordDict(), grid.run_config)))
        found.append(sum(int(task.examples["train"]) for task in said.tasks))
    return found


def noise_for(epsilon: float, examples: int, batch: int, steps: int) -> dict[str, Any]:
    """Node-config of a client whose budget lasts for these steps."""
    delta = 1 / (10 * examples)
    noise = get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=delta,
        sample_rate=min(1.0, batch / examples),
        steps=steps,
        accountant="rdp",
    )
    given = {"epsilon": 1.001 * epsilon, "delta": delta, "noise-multiplier": noise, "metrics": "held-out"}
    return {f"dp.{key}": value for key, value in given.items()}


def one(strategy: str, epsilon: float, seed: int, given: argparse.Namespace, cache: Path) -> tuple[float, float, float]:
    """Mean and worst accuracy of a run, and the largest epsilon."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".cache").symlink_to(cache)
        config: dict[str, Any] = {"scenario": given.scenario, "seed": seed, "data_root": str(given.data or "")}
        config |= {"batch_size": given.batch, "local_steps": given.steps, "num_server_rounds": given.rounds}
        sizes = examples_of(Path(folder), given.clients, config)
        # ditto trains two adapters in each round, and every one of their steps is spent
        steps = given.rounds * given.steps * (2 if strategy == "ditto" else 1)
        nodes = [noise_for(epsilon, size, given.batch, steps) if epsilon else {} for size in sizes]
        run = run_in_process(
            Path(folder),
            given.clients,
            node_config=nodes.__getitem__,
            strategy=strategy,
            run_name="run",
            learning_rate=given.rate,
            **config,
        )
        summary = json.loads((run.path / "summary.json").read_text())
        spent = max((said["epsilon"] for said in summary.get("privacy", {}).values()), default=0.0)
        return summary["mean_accuracy"], summary["worst_accuracy"], spent


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Accuracy against epsilon.")
    parser.add_argument("--scenario", default="digits")
    parser.add_argument("--data", type=Path, help="folder of a scenario's real data")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.0, 16.0, 8.0, 2.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.01)
    given = parser.parse_args()
    set_up_torch()
    console = Console(width=120)
    table = Table(title=f"{given.scenario}, {given.clients} clients, {given.rounds} rounds of {given.steps} steps")
    for column in ("strategy", *("none" if not e else f"{e:g}" for e in given.epsilons), "largest spent"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as cache:
        for strategy in given.strategies:
            row, largest = [strategy], 0.0
            for epsilon in given.epsilons:
                found = [one(strategy, epsilon, seed, given, Path(cache)) for seed in given.seeds]
                mean, worst = (sum(numbers) / len(found) for numbers in ([f[0] for f in found], [f[1] for f in found]))
                largest = max(largest, *(f[2] for f in found))
                row.append(f"{mean:.3f} ({worst:.3f})")
            table.add_row(*row, f"{largest:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
