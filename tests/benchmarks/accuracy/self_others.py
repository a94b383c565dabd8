"""Every personal model on its own client's data ("self"), and on the other clients' ("others").

    python -m tests.benchmarks.accuracy.self_others cifar100-20 --data DIR --strategies local,fedavg,potara --clients 20
    python -m tests.benchmarks.accuracy.self_others mixed-arch --data DIR --strategies local,fedavg,fedmosaic --blocks 2
    ... --seeds 100 --split validation   # for choosing settings
    python -m tests.benchmarks.accuracy.self_others --of OUT [--strategies ...]   # runs of "compare ... --out OUT"

Only a benchmark may do this, because it holds everybody's data: no plan can. Strategies run through the real round loop
and client code in one process; then each client's saved personal model, loaded by PEFT onto a fresh base model, is
tried on every client's examples. A model is tried on the tasks that it has, and the mean is taken over tasks, then
clients. If architectures differ, strategies that merge within one architecture run once in each half of the federation.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from rich.console import Console
from rich.table import Table
from torch import Tensor

from client_app.data.dataset import ClientData, Dataset
from client_app.model.forward.padding import Read, logits_in
from client_app.model.forward.target_logits import TargetLogits
from client_app.model.forward.target_losses import AtTargets, TargetLosses
from client_app.plan.evaluation import evaluate
from client_app.plan.training import set_up_torch
from client_app.session import base_and_data
from client_app.settings import read_settings
from server_app.run.run_directory import RunDirectory
from server_app.tools.align import Aligned, align_models
from server_app.tools.commands.arguments import parse_run_config
from server_app.tools.compare.statistics import difference, paired
from server_app.tools.handover.export import is_in_parts
from tests.in_process import run_in_process

ACROSS = ("local", "local-twice", "fedmosaic")
"""Strategies that clients of different architectures can share."""
WHICH = ("own", "others")
TWO_ARCHITECTURES = ("digits-mixed", "mixed-arch")


@dataclass
class SavedModel:
    """A personal model as a user would load it, with the methods that ``client_app.plan.evaluation`` needs."""

    module: Any
    micro_batch: int = 0
    preference_beta: float = 0.1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch, which is already on the right device."""
        return dict(batch)

    def logits(
        self, inputs: Mapping[str, Tensor], task: str = "", read: Read = logits_in, *, per_token: bool = False
    ) -> Tensor:
        """The part of the model's output that ``read`` takes, by default its logits."""
        return read(self.module(**inputs, **({"task": task} if task else {})), inputs)

    def at_targets(self, inputs: Mapping[str, Tensor], labels: Tensor, task: str = "") -> AtTargets:
        """Losses of the targets in ``labels``."""
        return TargetLosses(TargetLogits(self.module))(lambda: self.logits(inputs, task), labels)


class PartsError(Exception):
    """A personal model in several parts."""


@dataclass
class Scores:
    """Scores by client: on its own data, and on average on the others' data; None if no data fit its model."""

    own: dict[str, float]
    others: dict[str, float | None]
    seconds: float = 0.0

    def mean(self, which: str) -> float | None:
        """The mean over the clients that have such a score."""
        found = [value for value in getattr(self, which).values() if value is not None]
        return sum(found) / len(found) if found else None


def load_clients(
    state: Path, ids: list[int], of: int, config: Mapping[str, Any]
) -> dict[str, Callable[[], tuple[Any, ClientData]]]:
    """Functions that load each client's base model and data anew, as the client itself does."""
    found = {}
    for index in ids:
        node: Any = {"partition-id": index, "num-partitions": of, "state-dir": str(state), "client.accept-keys": "all"}
        settings = read_settings(Context(1, 1, node_config=node, state=RecordDict(), run_config=dict(config)))
        settings = replace(settings, task_arrival="all")
        found[settings.client_id] = lambda chosen=settings: base_and_data(chosen)
    return found


def scores_of(run: Path, clients: Mapping[str, Callable[[], tuple[Any, ClientData]]], split: str) -> Scores:
    """Try every personal model of a run on every client's data.

    Raises:
        PartsError: a client's model is more than one adapter, which PEFT cannot load.
        SystemExit: a model is not what its client measured during the run.
    """
    from peft import PeftModel

    reported = json.loads((run / "summary.json").read_text())["clients"]
    data = {name: load()[1] for name, load in clients.items()}
    scores = Scores({}, {})
    for name in sorted(path.name for path in (run / "clients").iterdir()):
        folder = run / "clients" / name / "adapter"
        if is_in_parts(folder):
            raise PartsError(f"{folder} is no single adapter; its strategy cannot be measured here")
        module = clients[name]()[0].model
        PeftModel.from_pretrained(module, str(folder))  # which puts the adapter into the module itself
        model = SavedModel(module.eval())
        found = {
            other: score(model, data[name], theirs, split) for other, theirs in data.items() if fits(data[name], theirs)
        }
        scores.own[name] = value = found.pop(name)
        said = reported[name].get("accuracy")
        if said is not None and not data[name].tasks and abs(said - value) > 0.02:
            raise SystemExit(f"{name}: the run reported {said:.4f}, its saved model has {value:.4f}")
        scores.others[name] = sum(found.values()) / len(found) if found else None
    return scores


def fits(mine: ClientData, theirs: ClientData) -> bool:
    """Whether a client's model has any of another's tasks; models for one task fit all clients."""
    return not mine.tasks or bool(mine.tasks.keys() & theirs.tasks.keys())


def score(model: Any, mine: ClientData, theirs: ClientData, split: str) -> float:
    """Mean accuracy (exact match for written texts) over the tasks of this client that the model has."""
    found = []
    for name, task in theirs.each_task.items():
        if mine.tasks and name not in mine.tasks:
            continue
        data: Dataset = task.splits[split]
        metrics = evaluate(model, replace(data, task=name) if mine.tasks else data, task)
        found.append(metrics.get("accuracy", metrics.get("exact_match", 0.0)))
    return sum(found) / len(found)


def measure(strategy: str, seed: int, arguments: argparse.Namespace, folder: Path) -> Scores:
    """One strategy with one seed."""
    count = arguments.clients
    config: dict[str, Any] = {
        "scenario": arguments.scenario,
        "seed": seed,
        "num-server-rounds": arguments.rounds,
        "evaluate-split": arguments.split,
        **parse_run_config(arguments.set),
    }
    if arguments.data:
        config["data-root"] = str(arguments.data.resolve())
    parts = [list(range(count))]
    if arguments.scenario in TWO_ARCHITECTURES:
        if strategy not in ACROSS:
            parts = [list(range(count // 2)), list(range(count // 2, count))]
        elif strategy == "fedmosaic" and arguments.blocks:
            what = Aligned(arguments.scenario, data_root=config.get("data-root", ""))
            rank, quiet = int(config.get("lora-r", 8)), Console(quiet=True)
            path = align_models(what, arguments.blocks, rank, 0, 0.5, False, folder, quiet)
            config |= {"lora-blocks": arguments.blocks, "lora-alignment": path.stem}
    prefixes = (f"{strategy}.", f"{strategy}__")
    own = {k: v for k, v in config.items() if "." not in k or k.startswith(prefixes)}
    started, whole = time.process_time(), Scores({}, {})
    everybody = load_clients(folder, list(range(count)), count, config)
    for number, ids in enumerate(parts):
        directory = run_in_process(
            folder,
            len(ids),
            node_config=lambda index, ids=ids: {"partition-id": ids[index], "num-partitions": count},
            run_name=f"{strategy}-{seed}-{number}",
            strategy=strategy,
            **{key.replace(".", "__").replace("-", "_"): value for key, value in own.items()},
        )
        seconds = time.process_time() - started
        found = scores_of(directory.path, everybody, arguments.split)
        whole.own |= found.own
        whole.others |= found.others
        whole.seconds += seconds
        started = time.process_time()
    return whole


def measure_saved(run: Path, config: Mapping[str, Any], folder: Path) -> Scores:
    """A run that ``fedalloy compare`` has kept."""
    count, started = config["min-clients"], time.process_time()
    everybody = load_clients(folder, list(range(count)), count, config)
    found = scores_of(run, everybody, config.get("evaluate-split", "test"))
    found.seconds = time.process_time() - started
    return found


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="?")
    parser.add_argument("--of", type=Path, help="Instead of running: the folder of a comparison.")
    parser.add_argument("--data", type=Path, help="Folder of scenarios on real data.")
    parser.add_argument("--strategies", help="By default local,fedavg, or with --of all that have run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=2, help="Co-LoRA's, for fedmosaic across architectures.")
    parser.add_argument("--set", default="", help="More run-config, as for flwr run.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--json", type=Path)
    found = parser.parse_args(given)
    if (found.scenario is None) == (found.of is None):
        parser.error("expected a scenario, or --of and the folder of a comparison")
    return found


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[Path], Scores]]]:
    """Strategy, seed, and a function that measures them in a folder of its own, for everything requested."""
    chosen = arguments.strategies.split(",") if arguments.strategies else None
    if arguments.of:
        for run in sorted(path.parent for path in arguments.of.glob("runs/*/summary.json")):
            config = RunDirectory(run).config()
            if chosen is None or config["strategy"] in chosen:
                yield config["strategy"], config["seed"], partial(measure_saved, run, config)
        return
    for strategy in chosen or ("local", "fedavg"):
        for seed in arguments.seeds:
            yield strategy, seed, partial(measure, strategy, seed, arguments)


def measured(arguments: argparse.Namespace) -> dict[str, dict[int, Scores]]:
    """Everything requested, by strategy and seed; from saved runs only the models that PEFT can load."""
    found: dict[str, dict[int, Scores]] = {}
    for strategy, seed, measure_in in jobs(arguments):
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / ".cache").symlink_to(arguments.cache)
            try:
                scores = measure_in(Path(name))
            except PartsError as error:
                if not arguments.of:
                    raise
                print(error)
                continue
        found.setdefault(strategy, {})[seed] = scores
        say(strategy, seed, scores)
    return found


def say(strategy: str, seed: int, scores: Scores) -> None:
    """Progress."""
    own, others = (shown(scores.mean(which)) for which in ("own", "others"))
    print(f"{strategy}, seed {seed}: self {own}, others {others}, {scores.seconds:.0f} CPU s", flush=True)


def shown(value: float | None) -> str:
    """Three decimals."""
    return "-" if value is None else f"{value:.3f}"


def table_of(found: Mapping[str, Mapping[int, Scores]], title: str) -> Table:
    """Self and others by seed, their means, and how "self" differs from ``local`` and ``local-twice`` if they ran."""
    table, seeds = Table(title=title), sorted({seed for runs in found.values() for seed in runs})
    own = {
        name: {(seed, client): value for seed, scores in runs.items() for client, value in scores.own.items()}
        for name, runs in found.items()
    }
    references = [name for name in ACROSS[:2] if name in found]
    heads = (*(f"seed {seed}" for seed in seeds), "self", "others", *(f"self against {name}" for name in references))
    for column in ("strategy", *heads):
        table.add_column(column, justify="right")
    for strategy, runs in found.items():
        rows = {which: [runs[seed].mean(which) if seed in runs else None for seed in seeds] for which in WHICH}
        means = [None if None in values else sum(values) / len(values) for values in rows.values()]
        cells = [f"{shown(own)} / {shown(other)}" for own, other in zip(*rows.values(), strict=True)]
        gains = [paired(own[strategy], own[name]) if name != strategy else None for name in references]
        table.add_row(
            strategy, *cells, *map(shown, means), *("" if gain is None else difference(gain) for gain in gains)
        )
    return table


def main() -> None:
    """Measure and print; with ``--json`` write the numbers to a file."""
    arguments = parse()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    found = measured(arguments)
    title = str(arguments.of) if arguments.of else f"{arguments.scenario}, {arguments.split}"
    Console(width=140).print(table_of(found, title))
    if arguments.json:
        numbers = {name: {seed: vars(scores) for seed, scores in runs.items()} for name, runs in found.items()}
        arguments.json.write_text(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
