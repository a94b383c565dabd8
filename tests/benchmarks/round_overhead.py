"""Seconds per round beyond training: stock Flower, FedAlloy without and with the resident trainer, side by side.

    python -m tests.benchmarks.round_overhead                          # 2 and 4 clients
    python -m tests.benchmarks.round_overhead --quick --json out.json  # 2 clients, fewer rounds, below ten minutes

All four on one local cluster of stock SuperNodes (TLS, registered keys) that is started for each number of clients: the
same base model, LoRA layers, data, steps and batch size.

    stock     stock_app/: fp32 state dict, train and evaluate as two messages, ``FedAvg.start``; imports and loads the
              model for every message
    empty     the same app with one message that does nothing: what Flower itself costs
    process   FedAlloy with ``trainer.resident = false``
    resident  FedAlloy as it comes

A round's overhead is its wall time at the server minus the training of its slowest client; evaluation counts as
overhead in all of them. The first round of each is left out (caches, bundle, and the trainer's start) and shown apart.
The base model is the digits scenario's (58,570 parameters): what a large one costs to load comes on top for ``stock``
and ``process`` in every round, and is not measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from client_app.scenarios import load_scenario
from server_app.cluster import CONNECTION, LocalCluster, Settings
from server_app.run_directory import RunDirectory

STOCK_APP = Path(__file__).with_name("stock_app")
STEPS, BATCH, RATE, RANK, ALPHA = 30, 16, 5e-3, 8, 16.0
WAYS = ("stock", "empty", "process", "resident")
console = Console(width=140)


@dataclass
class Times:
    """Rounds of one way: wall seconds, and seconds that the slowest client trained."""

    seconds: list[float]
    training: list[float]
    accuracy: float | None = None
    answering: dict[str, float] = field(default_factory=dict)

    @property
    def overhead(self) -> list[float]:
        """Per round, the first included."""
        return [wall - trained for wall, trained in zip(self.seconds, self.training, strict=True)]

    @property
    def median(self) -> float:
        """Of all rounds but the first."""
        return statistics.median(self.overhead[1:])


def prepare(folder: Path, clients: int, cache: Path) -> None:
    """What the stock app reads: the digits scenario's base model and data, in ordinary files."""
    folder.mkdir(parents=True)
    for partition in range(clients):
        base, data = load_scenario("digits", partition, clients, 0, cache)
        arrays = {}
        for split in ("train", "test"):
            arrays[f"{split}_inputs"] = data.splits[split].inputs["pixel_values"].numpy()
            arrays[f"{split}_labels"] = data.splits[split].labels.numpy()
        np.savez(folder / f"{partition}.npz", **arrays)
    facts = {"rank": RANK, "alpha": ALPHA, "targets": list(base.targets), "heads": list(base.heads)}
    (folder / "facts.json").write_text(json.dumps(facts))
    base.model.save_pretrained(folder / "base")  # type: ignore[operator]


def stock(cluster: LocalCluster, folder: Path, clients: int, rounds: int, empty: bool) -> Times:
    """Rounds of the stock app."""
    result = folder / f"times-{'empty' if empty else 'stock'}.json"
    config = {"folder": str(folder), "result": str(result), "rounds": rounds, "clients": clients, "empty": empty}
    config |= {"steps": STEPS, "batch-size": BATCH, "learning-rate": RATE}
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    shown = cluster.flwr("run", str(STOCK_APP), CONNECTION, "--stream", "--run-config", text)
    if not result.exists():
        raise RuntimeError(f"the stock app did not finish:\n{shown}")
    found = json.loads(result.read_text())
    return Times(found["seconds"], found["training"], found["accuracy"][-1] if found["accuracy"] else None)


def alloy(cluster: LocalCluster, clients: int, rounds: int, resident: bool) -> Times:
    """Rounds of FedAlloy; also what of a round passed in the client's handler, and how long a bare question takes."""
    name = "resident" if resident else "process"
    config: dict[str, Any] = {"strategy": "fedavg", "run-name": name, "num-server-rounds": rounds}
    config |= {"runs-dir": str(cluster.settings.runs_dir), "min-clients": clients, "local-steps": STEPS}
    config |= {"batch-size": BATCH, "learning-rate": RATE, "lora-r": RANK, "lora-alpha": ALPHA}
    outcome = cluster.run(config | {"trainer.resident": resident})
    if not outcome.completed:
        raise RuntimeError(f"FedAlloy ended as {outcome.status}:\n{outcome.log.read_text()}")
    records = RunDirectory(cluster.settings.runs_dir / name).rounds()
    trained = [record for record in records if record["phase"] == "train"]
    answers = [answer for record in trained[1:] for answer in record["clients"].values()]
    summary = json.loads((cluster.settings.runs_dir / name / "summary.json").read_text())
    return Times(
        [record["seconds"] for record in trained],
        [max(answer["train_seconds"] for answer in record["clients"].values()) for record in trained],
        summary["mean_accuracy"],
        {
            "register": next(record["seconds"] for record in records if record["phase"] == "register"),
            "plan without training": statistics.median(a["client_seconds"] - a["train_seconds"] for a in answers),
            "bare question": next(record["seconds"] for record in records if record["phase"] == "counters"),
        },
    )


def measure(clients: int, rounds: int) -> dict[str, Times]:
    """All ways with one number of clients."""
    found: dict[str, Times] = {}
    with tempfile.TemporaryDirectory(prefix="fedalloy-overhead-") as text:
        root = Path(text)
        prepare(root / "stock", clients, root / "cache")
        settings = Settings(tuple(f"client-{index}" for index in range(clients)), root / "runs")
        with LocalCluster(root / "cluster", settings) as cluster:
            for way in WAYS:
                started = time.monotonic()
                if way in ("stock", "empty"):
                    found[way] = stock(cluster, root / "stock", clients, rounds, empty=way == "empty")
                else:
                    found[way] = alloy(cluster, clients, rounds, resident=way == "resident")
                overhead = found[way].median
                console.print(f"{clients} clients, {way}: {overhead:.2f} s ({time.monotonic() - started:.0f} s in all)")
    return found


def table(results: dict[int, dict[str, Times]]) -> Table:
    """Clients x way: overhead, its ratio to stock and to the empty round."""
    shown = Table(title="Seconds per round beyond training", title_justify="left")
    for column in ("clients", "way", "median", "rounds", "first", "of stock", "of empty", "trained", "accuracy"):
        shown.add_column(column, justify="left" if column == "way" else "right")
    for clients, ways in results.items():
        for way, times in ways.items():
            shown.add_row(
                str(clients),
                way,
                f"{times.median:.2f}",
                " ".join(f"{value:.1f}" for value in times.overhead[1:]),
                f"{times.overhead[0]:.1f}",
                f"{times.median / ways['stock'].median:.2f}",
                f"{times.median / ways['empty'].median:.2f}",
                f"{statistics.median(times.training):.2f}",
                "" if times.accuracy is None else f"{times.accuracy:.3f}",
            )
    return shown


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "load_average": psutil.getloadavg()[0],
        "versions": {"python": platform.python_version(), "flwr": flwr.__version__, "torch": torch.__version__},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 clients, 4 rounds; below ten minutes")
    parser.add_argument("--clients", type=int, nargs="+", help="numbers of clients, instead of 2 and 4")
    parser.add_argument("--rounds", type=int, help="rounds of each way, the first of which is left out")
    parser.add_argument("--json", type=Path, help="write everything here")
    given = parser.parse_args()
    counts = given.clients or ([2] if given.quick else [2, 4])
    rounds = given.rounds or (4 if given.quick else 6)
    before = machine()
    results = {clients: measure(clients, rounds) for clients in counts}
    console.print(table(results))
    ratios = {clients: ways["resident"].median / ways["stock"].median for clients, ways in results.items()}
    for clients, ways in results.items():
        console.print(f"{clients} clients, resident: {ways['resident'].answering}", highlight=False)
    console.print(f"machine: {before}", highlight=False)
    console.print("1B-shaped base model: not measured, this benchmark has a small one only", highlight=False)
    if given.json:
        report = {
            "resident_over_stock": max(ratios.values()),
            "resident_over_empty": max(w["resident"].median / w["empty"].median for w in results.values()),
            "by_clients": {
                clients: {way: asdict(times) | {"median_overhead": times.median} for way, times in ways.items()}
                for clients, ways in results.items()
            },
            "machine": before,
        }
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
