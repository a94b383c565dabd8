"""Accuracy against epsilon: record-level differential privacy at every client, by strategy.

    python -m tests.benchmarks.accuracy.privacy                                    # digits, seeds 0 1 2
    python -m tests.benchmarks.accuracy.privacy --scenario text-8 --data DATA
    python -m tests.benchmarks.accuracy.privacy --table                            # prints finished runs; nothing is
    run python -m tests.benchmarks.accuracy.privacy --split validation --seeds 100 --epsilons 8 --strategies fedavg \
        --rates 0.003 0.01 0.03                                                    # how the rate was chosen

Through the real round loop and client code, in one process. Opacus computes each client's noise so that its whole
budget lasts for just this run (Renyi accountant, delta 1 / (10 n)); held-out scores are reported, and nothing protects
those (`dp.metrics = "held-out"`). Each finished run is a line of ``--found``, so that the command goes on where it
stopped. The table has the clients' mean (worst) accuracy over seeds by strategy and epsilon, and that of untrained
models. "worst" is the mean over seeds of each run's worst client.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from flwr.app import Context, RecordDict
from opacus.accountants.utils import get_noise_multiplier
from rich.console import Console
from rich.table import Table

import server_app.run.loop  # noqa: F401 - this and the session before what there is is frozen
from client_app.session import Executor
from client_app.settings import read_settings
from tests.benchmarks.accuracy.resumable import append, has, prepared, read
from tests.in_process import FIRST_NODE, InProcessGrid, run_config_of, run_in_process

STRATEGIES = ("local", "fedavg", "fedprox", "ditto", "fedmerge")
UNTRAINED = "untrained"
FOUND = Path(__file__).parents[1] / "found" / "privacy.jsonl"
DESIGNS: Mapping[str, Mapping[str, Any]] = {
    "digits": {"clients": 4, "rounds": 4, "steps": 15, "batch": 32, "rate": 0.01},
    "text-8": {"clients": 4, "rounds": 2, "steps": 6, "batch": 8, "rate": 0.003},
}
"""By scenario: few clients, rounds and steps, so that three seeds take minutes; ``rate`` applies without privacy."""
PRIVATE_RATE = {"digits": 0.01, "text-8": 0.01}
"""Learning rate with privacy, chosen on validation examples with seed 100."""


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


def measure(about: Mapping[str, Any], data: str, cache: Path) -> dict[str, Any]:
    """Accuracies of one run by client, the largest epsilon that a client says was spent, and the noise of each."""
    clients, rounds, steps, batch = (int(about[key]) for key in ("clients", "rounds", "steps", "batch"))
    strategy, rate = about["strategy"], about["rate"]
    if strategy == UNTRAINED:  # a step too small for any number to move
        strategy, rounds, steps, rate = "local", 1, 1, 1e-30
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".cache").symlink_to(cache)
        config: dict[str, Any] = {"scenario": about["scenario"], "seed": about["seed"], "batch_size": batch}
        config |= {"local_steps": steps, "num_server_rounds": rounds, "data_root": data}
        nodes: list[dict[str, Any]] = [{}] * clients
        if about["epsilon"]:
            # ditto trains two adapters in each round, and every one of their steps is spent
            spent = rounds * steps * (2 if strategy == "ditto" else 1)
            sizes = examples_of(Path(folder), clients, config)
            nodes = [noise_for(about["epsilon"], size, batch, spent) for size in sizes]
        run = run_in_process(
            Path(folder),
            clients,
            node_config=nodes.__getitem__,
            strategy=strategy,
            run_name="run",
            learning_rate=rate,
            evaluate_split=about["split"],
            evaluate_every=rounds,
            **config,
        )
        summary = json.loads((run.path / "summary.json").read_text())
    return {
        "scores": {client: found["accuracy"] for client, found in summary["clients"].items()},
        "spent": max((said["epsilon"] for said in summary.get("privacy", {}).values()), default=0.0),
        "noise": [round(node.get("dp.noise-multiplier", 0.0), 3) for node in nodes],
    }


def cell(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean (worst) accuracy over seeds."""
    scores = [run["scores"].values() for run in runs]
    return f"{mean(map(mean, scores)):.3f} ({mean(map(min, scores)):.3f})" if runs else ""


def table(runs: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row for each strategy, one column for each epsilon, rate and number of seeds."""
    shown = Table(title=title, title_justify="left")
    trained = [run for run in runs if run["strategy"] != UNTRAINED]
    columns = sorted({(run["epsilon"], run["rate"]) for run in trained}, key=lambda it: (it[0] != 0, -it[0], it[1]))
    rates = {rate for _, rate in columns}
    shown.add_column("strategy")
    for epsilon, rate in columns:
        name = f"epsilon {epsilon:g}" if epsilon else "no privacy"
        shown.add_column(name + (f", rate {rate:g}" if len(rates) > 1 else ""), justify="right")
    untrained = [run for run in runs if run["strategy"] == UNTRAINED]
    if untrained:
        shown.add_row(UNTRAINED, cell(untrained))
    for strategy in dict.fromkeys(run["strategy"] for run in trained):
        mine = [run for run in trained if run["strategy"] == strategy]
        by_column = [[run for run in mine if (run["epsilon"], run["rate"]) == column] for column in columns]
        shown.add_row(strategy, *map(cell, by_column))
    noise = [
        f"epsilon {epsilon:g}: {min(all_):.2f} to {max(all_):.2f}"
        for epsilon in dict.fromkeys(epsilon for epsilon, _ in columns if epsilon)
        if (all_ := [value for run in trained if run["epsilon"] == epsilon for value in run["noise"]])
    ]
    shown.caption = f"noise multipliers: {'; '.join(noise)}; largest spent {max(run['spent'] for run in runs):.3f}"
    return shown


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="digits", choices=list(DESIGNS))
    parser.add_argument("--data", default="", help="Folder of a scenario's real data.")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.0, 8.0, 2.0], help="0: no privacy.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="In the place of the design's.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--found", type=Path, default=FOUND, help="File of the finished runs.")
    parser.add_argument("--table", action="store_true", help="Run nothing.")
    given = prepared(parser)
    same = {"scenario": given.scenario, "split": given.split} | dict(DESIGNS[given.scenario])
    own = {True: PRIVATE_RATE[given.scenario], False: same["rate"]}
    asked = [{**same, "strategy": UNTRAINED, "epsilon": 0.0, "seed": seed} for seed in given.seeds]
    asked += [
        {**same, "strategy": strategy, "epsilon": epsilon, "seed": seed, "rate": rate}
        for seed in given.seeds
        for epsilon in given.epsilons
        for strategy in given.strategies
        for rate in (given.rates or [own[epsilon > 0]])
    ]
    for about in [] if given.table else asked:
        if has(read(given.found), about):
            continue
        found = measure(about, given.data, given.cache)
        append(given.found, [{**about, **found}])
        print(*(about[key] for key in ("strategy", "epsilon", "rate", "seed")), found["scores"], flush=True)
    runs = [one for one in read(given.found) if any(has([one], about) for about in asked)]
    of = "{clients} clients, {rounds} rounds of {steps} steps, batches of {batch}".format(**same)
    if runs:
        Console(width=120).print(table(runs, f"{given.scenario}, {of}, seeds {given.seeds}, {given.split}"))


if __name__ == "__main__":
    main()
