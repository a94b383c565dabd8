"""Potara on ``digits``: the merge beside both endpoints, half and the line search, for every way to find the weight.

Weights made of Fisher information also at dampings from 1 to 1e-6, all from one Fisher step and the same two adapters.

    python -m tests.benchmarks.accuracy.potara_digits   # seeds 0 1 2, test split
    python -m tests.benchmarks.accuracy.potara_digits --seeds 100 101 102 --split validation   # for choosing settings

(Not for choosing among weight modes: the line search is fitted to the validation split.)

Rounds are divided between the branches as by default (two thirds federated); FedAvg has as many, all federated. All of
it goes through the real round loop and client code in one process. Bytes are the encoded tensors, per client and
direction.
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
from server_app.tools.demo import SCENARIO_CONFIG
from strategies.algorithms.potara_options import SEARCH_POINTS
from strategies.algorithms.potara_weights import MODES
from tests.in_process import run_in_process

ENDPOINTS = ("local", "federated", "half", "searched")
DAMPINGS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""The first label is that of the merged model."""
SWEPT = ("client-fisher", "client-fisher-clipped", "server-scalar")


def delivered(directory: RunDirectory) -> dict[str, float]:
    """Mean accuracy over clients of every model evaluated at the end, by label."""
    clients = next(record for record in directory.rounds() if record["phase"] == "deliver")["clients"].values()
    labels = next(iter(clients))["metrics"]
    return {label: sum(client["metrics"][label]["accuracy"] for client in clients) / len(clients) for label in labels}


def measure(seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores, mean weights and bytes of one seed, by model."""
    common: dict[str, Any] = {key.replace("-", "_").replace(".", "__"): v for key, v in SCENARIO_CONFIG.items()}
    common |= {"seed": seed, "num_server_rounds": arguments.rounds, "evaluate_split": arguments.split}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".cache").symlink_to(arguments.cache)

        def run(label: str, **config: Any) -> tuple[RunDirectory, dict[str, float]]:
            directory = run_in_process(folder, arguments.clients, **common, **config, run_name=label)
            counted = json.loads((directory.path / "summary.json").read_text())["bytes"]
            return directory, {way: counted[way]["tensor"] / arguments.clients for way in ("up", "down")}

        directory, moved = run("fedavg", strategy="fedavg")
        found["fedavg, equal training"] = {"accuracy": delivered(directory)["personal"], **moved}
        for mode in arguments.modes:
            more = [f"{damping:g}" for damping in DAMPINGS[1:]] if mode in SWEPT else []
            swept = {"potara__damping": DAMPINGS[0], "potara__dampings": ",".join(more)}
            searched = {"potara__search_points": SEARCH_POINTS}
            directory, moved = run(mode, strategy="potara", potara__weight=mode, **swept, **searched)
            scores = delivered(directory)
            for label in ENDPOINTS:
                found.setdefault(label, {"accuracy": scores[label]})
            trained = [record for record in directory.rounds() if record["phase"] == "train"][-1]
            clients = list(trained["settled"]["weights"].values())
            weight = sum(client["weight"] for client in clients) / len(clients)
            found[f"potara, {mode}"] = {"accuracy": scores["personal"], "weight": weight, **moved}
            for damping in more:
                weight = sum(client["dampings"][damping] for client in clients) / len(clients)
                row = {"accuracy": scores[f"damping-{damping}"], "weight": weight}
                found[f"potara, {mode}, damping {damping}"] = row
    return found


def main() -> None:
    """Measure, print, and with ``--json`` write the numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    results = {seed: measure(seed, arguments) for seed in arguments.seeds}

    table = Table(
        title=f"digits, {arguments.clients} clients, {arguments.rounds} rounds, {arguments.split} split: mean accuracy"
    )
    for column in ("", *(f"seed {seed}" for seed in arguments.seeds), "mean", "weight", "kB up", "kB down"):
        table.add_column(column, justify="left" if not column else "right")
    for label in results[arguments.seeds[0]]:
        rows = [results[seed][label] for seed in arguments.seeds]

        def mean(key: str, rows: list[dict[str, float]] = rows) -> float | None:
            return sum(row[key] for row in rows) / len(rows) if key in rows[0] else None

        numbers = [mean("accuracy"), mean("weight")]
        moved = [mean("up"), mean("down")]
        table.add_row(
            label,
            *(f"{row['accuracy']:.3f}" for row in rows),
            *("" if number is None else f"{number:.3f}" for number in numbers),
            *("" if number is None else f"{number / 1000:.1f}" for number in moved),
        )
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
