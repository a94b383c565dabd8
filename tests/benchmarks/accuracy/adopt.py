"""Clients that never trained: what ``fedalloy adopt`` gives them, against the base model, FedAvg, and local training.

    python -m tests.benchmarks.accuracy.adopt                                       # digits, seeds 0 to 4
    python -m tests.benchmarks.accuracy.adopt --scenario cifar100-20 --data DATA
    python -m tests.benchmarks.accuracy.adopt --scenario instruct-6-same --data DATA    # SmolLM2-135M
    python -m tests.benchmarks.accuracy.adopt --seeds 100 101 --split validation    # for choosing settings
    python -m tests.benchmarks.accuracy.adopt --table                               # of what there is; nothing is run

One client of each group (:data:`DESIGNS`) is absent while the others train. When the run has ended they come, and
adopt: no step of training, forward passes on at most 32 of their training examples. What they are compared with is
measured on the same clients: the base model, the adapter that FedAvg delivers, and their own training of a fresh
adapter, on the examples that the search had in FedAvg's run and on all that the client has; as many steps as a client
of the run trains, at its rate. Through the real round loop and client code, in one process. Bytes are those of all of
Flower's messages to and from a newcomer from its registration on (and what lenders send, divided among the newcomers);
the wire has more. Each finished run is a line of ``--found``, so that the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

from flwr.app import Context, Message, RecordDict
from rich.console import Console
from rich.table import Table

import client_app.session
from client_app.data.dataset import ClientData
from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import Interpreter
from client_app.plan.slots import SlotStore
from client_app.plan.workbench import Workbench
from client_app.session import base_and_data
from client_app.settings import read_settings
from fedalloy_adapters.wire.flower_records import PLAN_TYPE, unpack
from proto.fedalloy.v1 import plan_pb2
from server_app.ledger.store import Ledger
from server_app.run.loop import run
from server_app.tools.compare.statistics import difference, paired
from strategies.framework import steps
from strategies.framework.options import read_options
from strategies.framework.steps import Training
from tests.benchmarks.accuracy.resumable import append, has, prepared, read
from tests.benchmarks.claims.runs import Residents
from tests.in_process import EXACT, FIRST_NODE, InProcessGrid

FOUND = Path(__file__).parents[1] / "found" / "adopt.jsonl"
RUNS: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {"strategy": "fedavg"},
    "ifca": {"strategy": "ifca"},
    "fedmerge": {"strategy": "fedmerge"},
    "local, all lend": {"strategy": "local", "lend": True},
    "ditto, all lend": {"strategy": "ditto", "lend": True},
}
"""By row: run-config, and whether the owners of the clients that trained lend their adapters."""
ALONE = ("base", "fedavg delivered", "local, same examples", "local, all examples")
"""Rows that the newcomers measure without a search, beside FedAvg's run."""
Scores = dict[str, float]


@dataclass(frozen=True)
class Design:
    """Who takes part in a scenario, and how it trains.

    Args:
        groups: the clients of each group, of whom one is left out; with the next seed the next one.
        config: run-config; few rounds and steps where a step is expensive.
        clients: how many there are; 0: those of the groups.
        runs: the rows that this scenario has without ``--runs``.
        parts: on which of its examples a newcomer trains by itself.
    """

    groups: tuple[tuple[int, ...], ...]
    config: Mapping[str, Any]
    clients: int = 0
    runs: tuple[str, ...] = tuple(RUNS)
    parts: tuple[str, ...] = ("same", "all")

    @property
    def size(self) -> int:
        """How many clients there are."""
        return self.clients or sum(map(len, self.groups))

    @property
    def steps(self) -> int:
        """Steps that a client of the run trains."""
        return int(self.config["num-server-rounds"] * self.config["local-steps"])

    def late(self, seed: int) -> list[int]:
        """The clients that come late."""
        return [group[seed % len(group)] for group in self.groups]


_SMOL: Mapping[str, Any] = {
    **{"num-server-rounds": 2, "local-steps": 4, "batch-size": 8, "learning-rate": 1e-3, "model-dtype": "bfloat16"},
    **{"evaluate-every": 2, "evaluate-examples": 16, "adopt-evaluations": 10},
}
_SMOL_RUNS = ("fedavg", "fedmerge", "local, all lend")
DESIGNS: Mapping[str, Design] = {
    "digits": Design(
        tuple(tuple(range(group, 12, 4)) for group in range(4)),
        {"num-server-rounds": 5, "local-steps": 30, "batch-size": 16, "learning-rate": 5e-3},
    ),
    # shards of a Dirichlet distribution have no groups: of each half one is left out
    "cifar100-20": Design(
        (tuple(range(4)), tuple(range(4, 8))),
        {"num-server-rounds": 6, "local-steps": 8, "batch-size": 16, "learning-rate": 5e-3, "evaluate-every": 6},
    ),
    "cifar100-groups": Design(
        tuple(tuple(range(group, 8, 4)) for group in range(4)),
        {"num-server-rounds": 6, "local-steps": 8, "batch-size": 16, "learning-rate": 5e-3, "evaluate-every": 6},
    ),
    "instruct-6-same": Design(((0, 1, 2), (3, 4, 5)), _SMOL, runs=_SMOL_RUNS, parts=("same",)),
    "instruct-6-family": Design(((0, 1, 2), (3, 4, 5)), _SMOL, runs=_SMOL_RUNS, parts=("same",)),
    # client 3 has a task of its own
    "instruct-12": Design(((0, 1, 2), (4, 5), (6, 7), (8, 9), (10, 11)), _SMOL, 12, _SMOL_RUNS, ("same",)),
}


@dataclass
class Asked:
    """The plan with the search that a newcomer got, and the adapters that came with it."""

    plan: plan_pb2.Plan
    blobs: Mapping[str, bytes]

    @property
    def search(self) -> int:
        """The number of the search step."""
        (found,) = [index for index, step in enumerate(self.plan.steps) if step.HasField("search")]
        return found


@dataclass
class Newcomers:
    """A grid of which some nodes come later."""

    grid: InProcessGrid
    late: frozenset[int]
    asked: dict[str, Asked] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any], count: int, late: Iterable[int], *, lend: bool) -> Newcomers:
        """``count`` nodes; ``late`` are the partitions of those that come after the run."""
        own = {"client.lend-adapter": True} if lend else {}
        grid = Partial(count, folder, dict(config), lambda index: {} if index in late else own)
        found = cls(grid, frozenset(late))
        grid.tamper = found._watch
        return found

    def _watch(self, node: int, message: Message, reply: Message | None) -> Message | None:
        if node - FIRST_NODE in self.late and message.metadata.message_type == PLAN_TYPE:
            plan, blobs = unpack(message.content, "plan", plan_pb2.Plan)
            if any(step.HasField("search") for step in plan.steps):
                self.asked[plan.client_id] = Asked(plan, blobs)
        return reply


class Partial(InProcessGrid):
    """A grid of which not every node is online."""

    absent: frozenset[int] = frozenset()

    def get_node_ids(self) -> Iterable[int]:
        """Those that are online."""
        return [node for node in super().get_node_ids() if node - FIRST_NODE not in self.absent]


def measure(
    about: Mapping[str, Any], data: str, cache: Path, tries: Iterable[tuple[int, float]]
) -> Iterator[dict[str, Any]]:
    """Rows of one run: what its newcomers adopted and, beside ``fedavg``, what they have alone."""
    chosen, design = dict(RUNS[about["run"]]), DESIGNS[about["scenario"]]
    late, lend = design.late(about["seed"]), bool(chosen.pop("lend", False))
    config: dict[str, Any] = EXACT | {"scenario": about["scenario"], "seed": about["seed"], "data-root": data}
    config |= design.config
    config |= {"ifca.clusters": len(design.groups)} if about["run"] == "ifca" else {}
    config |= {"num-server-rounds": about["rounds"], "evaluate-split": about["split"], "run-name": "run"} | chosen
    config["min-clients"] = design.size - len(late)
    with tempfile.TemporaryDirectory() as name, mock.patch.object(client_app.session, "Executor", Residents()):
        folder = Path(name)
        (folder / ".cache").symlink_to(cache)
        config["runs-dir"] = name
        newcomers = Newcomers.of(folder, config, design.size, late, lend=lend)
        newcomers.grid.absent = newcomers.late  # type: ignore[attr-defined]
        directory = run(newcomers.grid, _context(config))
        newcomers.grid.absent = frozenset()  # type: ignore[attr-defined]
        run(newcomers.grid, _context(config | {"resume": str(directory.path), "adopt": "new"}))
        summary = json.loads((directory.path / "summary.json").read_text())
        names = sorted(newcomers.asked)
        scores = {name: summary["clients"][name]["accuracy"] for name in names}
        tried = [summary["adopted"][name]["evaluations"] for name in names]
        yield {
            "row": f"adopt: {about['run']}",
            "scores": scores,
            "tried": tried,
            "adopted": [summary["adopted"][name] for name in names],
            **bytes_of(directory.path, names, about["rounds"]),
        }
        if about["run"] == "fedavg":
            alone: dict[str, Scores] = {}
            for index in late:
                for row, who, score in alone_of(newcomers, index, config, folder / "alone", list(tries)):
                    alone.setdefault(row, {})[who] = score
            yield from ({"row": row, "scores": found} for row, found in alone.items())


def alone_of(
    newcomers: Newcomers, index: int, config: Mapping[str, Any], folder: Path, tries: list[tuple[int, float]]
) -> Iterator[tuple[str, str, float]]:
    """Row, client and accuracy of what one newcomer has without a search."""
    context = newcomers.grid.context(FIRST_NODE + index)
    settings = read_settings(Context(1, 1, context.node_config, RecordDict(), dict(config)))
    base, data = base_and_data(settings)
    asked, who = newcomers.asked[settings.client_id], settings.client_id
    model = PersonalModel(base, settings.rank, settings.alpha, settings.dropout)
    training = read_options(Training, {key: value for key, value in config.items() if "." not in key})
    store = SlotStore(folder / who, base.name, lambda: model.heads)
    with store.transaction(1) as slots:
        bench = Workbench(asked.plan, model, data, slots)
        bench.index = asked.search
        few = bench.drawn("train", asked.plan.steps[asked.search].search.samples)
        own = steps.mixture("own")
        fresh, shown = steps.initialise("own", asked.plan.seed, keep_existing=False), steps.evaluate(training, own)
        delivered = steps.evaluate(training, steps.mixture("source-0"))

        def accuracy(data: ClientData, chosen: list[plan_pb2.Step], blobs: Mapping[str, bytes]) -> float:
            plan = plan_pb2.Plan(version=1, run_name="alone", client_id=who, round=1, seed=asked.plan.seed)
            plan.steps.extend(chosen)
            report, _ = Interpreter(who, model, data, slots).run(plan, blobs)
            return float(report.results[-1].evaluate.metrics["accuracy"])

        yield "base", who, accuracy(data, [fresh, shown], {})
        yield "fedavg delivered", who, accuracy(data, [delivered], asked.blobs)
        drawn = {"same": replace(data, splits={**data.splits, "train": few}), "all": data}
        for row in DESIGNS[settings.scenario].parts:
            for count, rate in tries:
                trained = steps.train(training, own, ["own"], steps=count, learning_rate=rate)
                title = f"local, {row} examples" + (f", {count} steps at {rate:g}" if len(tries) > 1 else "")
                yield title, who, accuracy(drawn[row], [fresh, trained, shown], {})


def bytes_of(path: Path, names: Iterable[str], rounds: int) -> dict[str, float]:
    """Bytes of Flower's messages to and from each newcomer, and what lenders sent for them, a newcomer's share."""
    with Ledger(path / "ledger.sqlite", read_only=True) as ledger:
        rows = ledger.accounts().rows()
    asked = set(names)
    mine = [row for row in rows if row.client in asked]
    sizes = {way: sum(row.message for row in mine if row.direction == way) for way in ("up", "down")}
    later = [row for row in rows if row.client not in asked and row.round > rounds]
    sizes["lent"] = sum(row.tensor for row in later if row.direction == "up")
    return {way: size / len(asked) for way, size in sizes.items()}


def _context(config: Mapping[str, Any]) -> Context:
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))


def table(found: list[dict[str, Any]], title: str) -> Table:
    """One line for each row: the mean (worst) newcomer's accuracy over seeds, differences by client, bytes."""
    by_row: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        by_row.setdefault(one["row"], []).append(one)
    order = [row for row in ALONE if row in by_row] + [row for row in by_row if row not in ALONE]
    scores = {
        row: {(one["seed"], who): value for one in by_row[row] for who, value in one["scores"].items()} for row in order
    }
    shown = Table(title=title, title_justify="left")
    for column in ("newcomer has", "accuracy (worst)", "against fedavg", "against local, same", "kB down / up"):
        shown.add_column(column, justify="left" if column == "newcomer has" else "right")
    for row in order:
        runs = by_row[row]
        worst = mean(min(one["scores"].values()) for one in runs)
        others = [other if other != row and other in scores else "" for other in ALONE[1:3]]
        against = [difference(paired(scores[row], scores[other])) if other else "" for other in others]
        shown.add_row(row, f"{mean(scores[row].values()):.3f} ({worst:.3f})", *against, size_of(runs))
    return shown


def size_of(runs: list[dict[str, Any]]) -> str:
    """Mean kB of messages to and from a newcomer, and its share of what lenders sent."""
    if "down" not in runs[0]:
        return ""
    down, up, lent = (mean(one[way] for one in runs) / 1e3 for way in ("down", "up", "lent"))
    return f"{down:.0f} / {up:.0f}" + (f" (lenders {lent:.0f})" if lent else "")


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="digits", choices=list(DESIGNS))
    parser.add_argument("--data", default="", help="Folder of a scenario's real data.")
    parser.add_argument("--runs", nargs="+", default=[], choices=list(RUNS), help="In the place of the design's.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=0, help="In the place of the design's.")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--steps", nargs="+", type=int, default=[], help="Of newcomers' own training.")
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="Of newcomers' own training.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="No run begins after so many.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--found", type=Path, default=FOUND, help="File of the finished runs.")
    parser.add_argument("--table", action="store_true", help="Run nothing.")
    given = prepared(parser)
    design = DESIGNS[given.scenario]
    rounds, runs = given.rounds or design.config["num-server-rounds"], given.runs or design.runs
    own_rates = given.rates or [design.config["learning-rate"]]
    tries = [(count, rate) for count in given.steps or [design.steps] for rate in own_rates]
    same = {"scenario": given.scenario, "rounds": rounds, "split": given.split}
    asked = [{**same, "run": name, "seed": seed} for seed in given.seeds for name in runs]
    missing = [about for about in asked if not has(read(given.found, scenario="digits"), about)]
    until = time.monotonic() + given.seconds
    for about in [] if given.table else missing:
        if time.monotonic() > until:
            break
        rows = [{**about, **row} for row in measure(about, given.data, given.cache, tries)]
        append(given.found, rows)
        for one in rows:
            print(about["seed"], one["row"], {who: round(score, 3) for who, score in one["scores"].items()}, flush=True)
    found = [one for one in read(given.found, scenario="digits") if any(has([one], about) for about in asked)]
    if found:
        out = f"{len(design.groups)} of {design.size} clients left out, {rounds} rounds"
        Console(width=140).print(table(found, f"{given.scenario}, {out}, seeds {given.seeds}, {given.split}"))


if __name__ == "__main__":
    main()
