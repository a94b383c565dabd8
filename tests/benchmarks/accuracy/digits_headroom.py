"""Is there anything to gain on ``digits``, and is it more than averaging any two runs would give?

    python -m tests.benchmarks.accuracy.digits_headroom   # seeds 0 1 2, test split: the README's table
    python -m tests.benchmarks.accuracy.digits_headroom --seeds 100 101 --split validation   # for choosing settings

For every seed, with the demo's clients and settings, through the real round loop and client code (one process,
no network): every strategy, and the control that any claim of merging has to beat: each client's *own* adapter averaged
with a second local run of the same client that only drew its batches in another order (exact average of the deltas).
Prints mean and worst client accuracy per seed, and whether the conditions hold.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import Interpreter
from client_app.plan.slots import SlotStore
from client_app.plan.training import set_up_torch
from client_app.scenarios import load_scenario
from proto.fedalloy.v1 import plan_pb2
from server_app.tools.demo import SCENARIO_CONFIG
from strategies import STRATEGIES
from strategies.framework import steps
from strategies.framework.options import read_options
from strategies.framework.steps import Training
from tests.in_process import run_in_process

Scores = dict[str, list[float]]


def strategy_scores(folder: Path, name: str, config: dict[str, Any]) -> list[float]:
    """Accuracy of every client's personal model at the end of a run."""
    directory = run_in_process(folder, config["clients"], **_plain(config), strategy=name, run_name=f"{name}")
    summary = json.loads((directory.path / "summary.json").read_text())
    return [client["accuracy"] for _, client in sorted(summary["clients"].items())]


def two_local_runs(folder: Path, config: dict[str, Any]) -> list[float]:
    """The control: 50/50 average, in delta space, of two local runs that differ in the order of batches only."""
    training = read_options(Training, {key.replace("_", "-"): value for key, value in _plain(config).items()})
    seed, rounds = config["seed"], config["num_server_rounds"]
    scores = []
    for index in range(config["clients"]):
        base, data = load_scenario("digits", index, config["clients"], seed, folder / ".cache")
        model = PersonalModel(base, config.get("lora_r", 8), config.get("lora_alpha", 16.0))
        store = SlotStore(folder / "control" / str(index), base.name, lambda model=model: model.heads)  # type: ignore[misc]
        with store.transaction(1) as slots:
            interpreter = Interpreter("client", model, data, slots)
            for run in ("first", "second"):
                plan = [steps.initialise(run, seed)]
                plan += [steps.train(training, steps.mixture(run), [run]) for _ in range(rounds)]
                interpreter.run(_plan(plan, seed if run == "first" else seed + 1_000_003), {})
            both = steps.mixture("first", "second", coefficients=[0.5, 0.5])
            report, _ = interpreter.run(_plan([steps.evaluate(training, both)], seed), {})
        scores.append(report.results[0].evaluate.metrics["accuracy"])
    return scores


def _plan(chosen: list[plan_pb2.Step], seed: int) -> plan_pb2.Plan:
    return plan_pb2.Plan(version=1, run_name="control", client_id="client", round=1, seed=seed, steps=chosen)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "clients"}


def measure(seed: int, arguments: argparse.Namespace) -> Scores:
    """All scores of one seed."""
    config: dict[str, Any] = {key.replace("-", "_").replace(".", "__"): v for key, v in SCENARIO_CONFIG.items()}
    config |= {
        "clients": arguments.clients,
        "seed": seed,
        "num_server_rounds": arguments.rounds,
        "evaluate_split": arguments.split,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".cache").symlink_to(arguments.cache)
        found = {strategy: strategy_scores(folder, strategy, config) for strategy in arguments.strategies}
        return found | {"control: two local runs": two_local_runs(folder, config)}


def main() -> None:
    """Measure, print, and with ``--json`` write the numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--strategies", nargs="+", default=["local", "fedavg", "fedmerge"], choices=STRATEGIES)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    results = {seed: measure(seed, arguments) for seed in arguments.seeds}

    table = Table(
        title=f"digits, {arguments.clients} clients, {arguments.rounds} rounds, {arguments.split} split: mean (worst)"
    )
    table.add_column("")
    for seed in arguments.seeds:
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("mean", justify="right")
    means: dict[str, float] = {}
    for name in results[arguments.seeds[0]]:
        rows = [results[seed][name] for seed in arguments.seeds]
        means[name] = sum(sum(row) / len(row) for row in rows) / len(rows)
        table.add_row(name, *(f"{sum(row) / len(row):.3f} ({min(row):.3f})" for row in rows), f"{means[name]:.3f}")
    Console(width=100).print(table)
    best = max(arguments.strategies, key=lambda name: means[name])
    print(f"best: {best}")
    for name in [*(other for other in ("local", "fedavg") if other in means), "control: two local runs"]:
        print(f"  {100 * (means[best] - means[name]):+.1f} points over {name}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
