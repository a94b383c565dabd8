r"""TAP on clients with several tasks beside FedAvg, FedAvg with fine-tuning at equal compute, and local training.

    python -m tests.benchmarks.accuracy.tap_multimodal   # seeds 0 1 2, test split: the README's table
    python -m tests.benchmarks.accuracy.tap_multimodal --seeds 100 101 --split validation   # for choosing settings
    python -m tests.benchmarks.accuracy.tap_multimodal --scenario multi-modal --data DATA --rounds 4 \
        --steps 8 --distill 8 --rate 5e-3 --rank 8

A client's compute in optimiser steps: with R rounds of S steps and J steps of stage 2, TAP takes 2 R S + 2 J (W, X, V
and the student). FedAvg and local training get as many: their rows "equal compute" have rounds of 2 S steps and 2 J
steps of fine-tuning (local: of training on). Everything goes through the real round loop and client code in one
process. The ledger is checked, too: stage 1 moves exactly FedAvg's tensors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from client_app.plan.training import set_up_torch
from server_app.run.run_directory import RunDirectory
from tests.in_process import run_in_process

METRICS = ("accuracy", "exact_match")
Scores = dict[str, float]


def scores_of(directory: RunDirectory, label: str) -> Scores:
    """Mean over the owners of each task: accuracy, or the share of texts that are exactly right."""
    found: dict[str, list[float]] = {}
    for client in next(record for record in directory.rounds() if record["phase"] == "deliver")["clients"].values():
        for name, value in client["metrics"][label].items():
            task, _, metric = name.partition("/")
            if metric in METRICS:
                found.setdefault(task, []).append(value)
    return {task: sum(values) / len(values) for task, values in sorted(found.items())}


def replacements(directory: RunDirectory) -> list[int]:
    """How many rules fired in each round."""
    return [r["settled"]["replaced"] for r in directory.rounds() if r["phase"] == "train"]


def moved(directory: RunDirectory) -> dict[str, int]:
    """Bytes of tensors up and down."""
    counted = json.loads((directory.path / "summary.json").read_text())["bytes"]
    return {way: counted[way]["tensor"] for way in ("up", "down")}


def measure(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The scores of one seed by model and task, its replacements by round, and its bytes."""
    common: dict[str, Any] = {
        "scenario": arguments.scenario, "seed": seed, "num_server_rounds": arguments.rounds,
        "data_root": str(arguments.data.resolve()) if arguments.data else "",
        "local_steps": arguments.steps, "learning_rate": arguments.rate, "lora_r": arguments.rank,
        "tap__distill_steps": arguments.distill, "evaluate_split": arguments.split,
    }  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".cache").symlink_to(arguments.cache)

        def run(label: str, **config: Any) -> RunDirectory:
            directory: RunDirectory = run_in_process(
                folder, arguments.clients, **(common | {"strategy": "tap", "run_name": label} | config)
            )
            return directory

        never = {"tap__margin": float("inf"), "tap__margins": ""}
        double = {"local_steps": 2 * arguments.steps, "tap__finetune_steps": 2 * arguments.distill}
        tap = run("tap", tap__margin=arguments.margin, tap__margins=arguments.margins)
        plain = run("fedavg", strategy="fedavg")
        assert moved(plain) == moved(tap), (moved(plain), moved(tap))
        twice = run("twice", **never, **double, tap__distill_steps=2 * arguments.distill, tap__kd_weight=0.0)
        found["scores"] = {
            "fedavg": scores_of(plain, "personal"),
            "fedavg + J steps": scores_of(tap, "finetuned"),
            "fedavg + fine-tuning, equal compute": scores_of(twice, "finetuned"),
            "local, equal compute": scores_of(twice, "distilled"),
            "tap, stage 1": scores_of(tap, "stage1"),
            "tap": scores_of(tap, "distilled"),
        }
        if arguments.ablations:
            found["scores"]["local, equal rounds"] = scores_of(run("never", **never), "stage1")
            always = run("always", tap__margin=-float("inf"), tap__margins="")
            found["scores"]["tap, always replacing"] = scores_of(always, "distilled")
            found["scores"]["tap, no distillation"] = scores_of(run("plain", tap__kd_weight=0.0), "distilled")
            probe = run("probe", tap__history="probe")
            found["scores"]["tap, probe"] = scores_of(probe, "distilled")
            found["probe"] = replacements(probe)
        found["replacements"], found["bytes"] = replacements(tap), moved(tap)
    return found


def main() -> None:
    """Measure, print, and with ``--json`` write the numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="digits-multimodal")
    parser.add_argument("--data", type=Path, help="folder of a scenario that reads one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--distill", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--margins", default="text-classification=0.005")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    results: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        results[seed] = measure(seed, arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2))
    print_table(results, arguments)


def print_table(results: dict[int, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Means over seeds by task, and over tasks for each seed."""
    table = Table(
        title=f"{arguments.scenario}, {arguments.clients} clients, {arguments.rounds} rounds, {arguments.split} split"
    )
    first = next(iter(results.values()))["scores"]
    tasks = list(first["tap"])
    for column in ("", *tasks, "mean of tasks", *(f"seed {seed}" for seed in results)):
        table.add_column(column, justify="left" if not column else "right")
    for label in first:
        by_task = [sum(found["scores"][label][task] for found in results.values()) / len(results) for task in tasks]
        by_seed = [sum(found["scores"][label][task] for task in tasks) / len(tasks) for found in results.values()]
        numbers = [*by_task, sum(by_task) / len(by_task), *by_seed]
        table.add_row(label, *(f"{number:.3f}" for number in numbers))
    Console(width=140).print(table)
    for seed, found in results.items():
        print(
            f"seed {seed}: replacements per round {found['replacements']}, tensor bytes as FedAvg's: {found['bytes']}"
        )


if __name__ == "__main__":
    main()
