"""FedMosaic on bundled data: clients of one architecture, and of two.

    python -m tests.benchmarks.accuracy.fedmosaic_digits   # seeds 0 1 2, test split: the README's tables
    python -m tests.benchmarks.accuracy.fedmosaic_digits --seeds 100 101 --split validation   # for choosing settings

Through the real round loop and client code, in one process. ``digits``: four clients with one base model.
``digits-mixed``: four or eight clients, two architectures. There the other strategies run once in each half of the
federation, as they must. Prints mean (worst) client accuracy, and the bytes of encoded numbers that a client gets and
sends in a round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from client_app.plan.training import set_up_torch
from server_app.tools.align import Aligned, align_models
from tests.in_process import run_in_process


@dataclass
class Result:
    """Accuracy of every client, and bytes of encoded numbers per client and round, down and up."""

    accuracy: list[float]
    down: float
    up: float


class Bench:
    """Runs strategies with one set of arguments."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = folder, arguments
        self.count = 0

    def run(self, strategy: str, seed: int, scenario: str, clients: Sequence[int], of: int, **config: Any) -> Result:
        """One run with the clients of these partition ids, out of ``of``."""
        self.count += 1
        rounds = self.arguments.rounds
        directory = run_in_process(
            self.folder,
            len(clients),
            node_config=lambda index: {"partition-id": clients[index], "num-partitions": of},
            run_name=f"run-{self.count}",
            strategy=strategy,
            scenario=scenario,
            seed=seed,
            num_server_rounds=rounds,
            evaluate_split=self.arguments.split,
            **config,
        )
        summary = json.loads((directory.path / "summary.json").read_text())
        shares = [summary["bytes"][way]["tensor"] / (len(clients) * rounds) for way in ("down", "up")]
        return Result([client["accuracy"] for _, client in sorted(summary["clients"].items())], *shares)

    def halves(self, strategy: str, seed: int, **config: Any) -> Result:
        """A strategy that merges only within an architecture: one run in each half."""
        count = self.arguments.clients
        halves = (range(count // 2), range(count // 2, count))  # by architecture
        first, second = (self.run(strategy, seed, "digits-mixed", half, count, **config) for half in halves)
        return Result(first.accuracy + second.accuracy, (first.down + second.down) / 2, (first.up + second.up) / 2)

    def one_architecture(self, seed: int) -> dict[str, Result]:
        """``digits``."""
        strategies = ("local", "fedavg", "fedmosaic")
        return {name: self.run(name, seed, "digits", range(4), 4) for name in strategies}

    def two_architectures(self, seed: int) -> dict[str, Result]:
        """``digits-mixed``."""
        rank, blocks = self.arguments.rank, self.arguments.blocks
        state, quiet = self.folder, Console(quiet=True)
        alignment = align_models(Aligned("digits-mixed"), blocks, rank, 0, 0.5, False, state, quiet).stem
        plain: dict[str, Any] = {"lora_r": rank, "lora_alpha": 2.0 * rank}
        shared = plain | {"lora_blocks": blocks, "lora_alignment": alignment}
        everybody = range(self.arguments.clients)
        found = {"local": self.run("local", seed, "digits-mixed", everybody, len(everybody), **plain)}
        for name in self.arguments.within:
            found[f"{name}, each architecture alone"] = self.halves(name, seed, **plain)
        versions: dict[str, dict[str, Any]] = {
            "fedmosaic": shared,
            "fedmosaic, P and Q only": shared | {"fedmosaic__share_conventional_lora": False},
        }
        if self.arguments.unaligned:
            versions["fedmosaic, not aligned"] = shared | {"lora_alignment": ""}
        for title, config in versions.items():
            found[title] = self.run("fedmosaic", seed, "digits-mixed", everybody, len(everybody), **config)
        return found


def table(title: str, results: dict[int, dict[str, Result]], console: Console) -> None:
    """One row per strategy."""
    found = Table(title=title)
    for column in ("", *(f"seed {seed}" for seed in results), "mean", "down", "up"):
        found.add_column(column, justify="left" if not column else "right")
    for name in next(iter(results.values())):
        rows = [results[seed][name] for seed in results]
        means = [sum(row.accuracy) / len(row.accuracy) for row in rows]
        cells = [f"{mean:.3f} ({min(row.accuracy):.3f})" for mean, row in zip(means, rows, strict=True)]
        found.add_row(name, *cells, f"{sum(means) / len(means):.3f}", f"{rows[0].down:,.0f}", f"{rows[0].up:,.0f}")
    console.print(found)


def main() -> None:
    """Measure and print; with ``--json`` write the numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8, choices=[4, 8], help="Of digits-mixed.")
    parser.add_argument("--rank", type=int, default=8, help="Of digits-mixed.")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--within", nargs="*", default=["fedavg", "fedmerge", "fedmosaic"], help="In each half alone.")
    parser.add_argument("--unaligned", action="store_true", help="Also with A and B drawn for each architecture.")
    parser.add_argument("--scenarios", nargs="+", default=["digits", "digits-mixed"])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    console = Console(width=140)
    numbers: dict[str, Any] = {}
    for scenario in arguments.scenarios:
        results: dict[int, dict[str, Result]] = {}
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / ".cache").symlink_to(arguments.cache)
                bench = Bench(folder, arguments)
                results[seed] = bench.one_architecture(seed) if scenario == "digits" else bench.two_architectures(seed)
            numbers[scenario] = {
                seed: {name: vars(result) for name, result in found.items()} for seed, found in results.items()
            }
            if arguments.json:
                arguments.json.write_text(json.dumps(numbers, indent=2))
        table(f"{scenario}, {arguments.rounds} rounds, {arguments.split} split: mean (worst)", results, console)


if __name__ == "__main__":
    main()
