"""Bytes on the wire, and what they buy: FedAlloy's encodings beside a stock app shaped like Flower's LLM templates.

    python -m tests.benchmarks.wire_bytes --quick --json out.json   # 1 seed, few runs; below ten minutes on idle cores
    python -m tests.benchmarks.wire_bytes --json out.json           # all strategies at all encodings, 3 seeds
    python -m tests.benchmarks.wire_bytes --base smollm2 --data DATA --found FILE    # SmolLM2-135M on instruct-6
    python -m tests.benchmarks.wire_bytes --base vit --data DATA --found FILE        # the ViT on cifar100-20

A finished run is a line in ``--found``, so that the command goes on where it stopped; with ``--table`` it only prints
these.

All on one local cluster of stock SuperNodes (TLS, registered keys): the same base model (a Llama over characters with
random weights, LoRA r=16 on all linear layers; or one of ``wire/cases.py``), data, rounds, steps, batch size and seeds.
The stock app (``stock_app/``) sends a float32 state dict, and trains and evaluates by messages of their own, as the
templates of ``flwr new`` do (FlowerTune's example is set not to evaluate at all).

``total`` is what the kernel counted as TCP payload at the SuperLink's sockets to its SuperNodes, both directions, from
before ``flwr run`` until it ended: TLS, gRPC, polls, heartbeats, registration, the app bundle, everything. ``bundle``
is the part of it that is the app's own code, which Flower sends to each client once per run, whatever the number of
rounds and the size of the model. ``tensors`` are the encoded numbers alone. ``loss`` is the clients' mean test loss of
the last model, ``accuracy`` the share of right answers where a task has that (the stock app does not count them);
differences are to the same strategy at fp32 and to the stock app, client by client, with a 95 % interval. The stock app
draws other batches.

The last table says what Llama 3.1 8B with r=16 on all linear layers would send: the numbers of its layers in each
encoding, times the wire bytes per tensor byte that were measured here (between two encodings, where there are two).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from client_app.sockets import Connection, SocketTable, WireError, server_connections
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.wire.codec import Encoding, payload_size
from server_app.ledger.flower_costs import bundle_size
from server_app.tools.cluster import local
from server_app.tools.compare.statistics import Scores, paired
from server_app.tools.demo import terminate_as_interrupt
from tests.benchmarks.accuracy import resumable
from tests.benchmarks.round_overhead import PATIENCE, PATIENT, Case, FailedError, machine, stock
from tests.benchmarks.wire.cases import REAL, RealCase

STRATEGIES = ("fedavg", "potara", "fedmerge", "fedsa-lora")
ENCODINGS = ("fp32", "fp16", "int8", "int4", "int2")
QUICK = (("fedavg", "int4"), ("fedavg", "int2"), ("fedavg", "fp32"), *((name, "int4") for name in STRATEGIES[1:]))
STOCK = "flowertune"
console = Console(width=160)


@dataclass
class Sent:
    """One run: bytes at the sockets and of the bundle, all clients together; losses by client."""

    way: str
    seed: int
    up: int
    down: int
    bundle: int
    tensors: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    accuracies: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All bytes, in both directions."""
        return self.up + self.down

    @property
    def without_bundle(self) -> int:
        """The bytes that grow with rounds and adapters."""
        return self.total - self.bundle


class Meter(threading.Thread):
    """Adds up the kernel's counters of the SuperLink's Fleet connections, also of those that close meanwhile."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._ended = threading.Event()
        self._ready = threading.Event()
        self._before: dict[tuple[str, int, int], Connection] = {}
        self._last: dict[tuple[str, int, int], Connection] = {}

    def run(self) -> None:
        """Look five times a second; bytes that a closing connection has sent since the last look are lost."""
        with SocketTable() as table:
            self._before = self._look(table)
            self._ready.set()
            while not self._ended.wait(0.2):
                with suppress(WireError):
                    self._last |= self._look(table)
            self._last |= self._look(table)

    def _look(self, table: SocketTable) -> dict[tuple[str, int, int], Connection]:
        found = server_connections(table, self._port)
        return {(one.remote_address, one.remote_port, one.cookie): one for one in found}

    def begin(self) -> None:
        """Start, and return when the counters have been read."""
        self.start()
        if not self._ready.wait(30):
            raise WireError(f"the counters of port {self._port} cannot be read")

    def end(self) -> tuple[int, int]:
        """Bytes up and down since :meth:`begin`; retransmissions count, too."""
        self._ended.set()
        self.join()
        up = sum(one.bytes_received for one in self._last.values())
        down = sum(one.bytes_sent for one in self._last.values())
        old = [one for key, one in self._before.items() if key in self._last]
        return up - sum(one.bytes_received for one in old), down - sum(one.bytes_sent for one in old)


@contextmanager
def cluster_of(root: Path, case: Case) -> Iterator[tuple[local.LocalCluster, Path]]:
    """A cluster whose clients have data for both apps, and the folder of these."""
    node_config = case.prepare(root / "given")
    settings = local.Settings(tuple(node_config), root / "runs", startup_timeout=PATIENCE, node_config=node_config)
    with local.LocalCluster(root / "cluster", settings) as cluster:
        yield cluster, root / "given"


def bundles(cluster: local.LocalCluster, name: str) -> int:
    """Bytes of an app's bundles at all SuperNodes."""
    return sum(bundle_size(folder) for folder in (cluster.directory / "homes").glob(f"supernode-*/apps/*.{name}.*"))


def flowertune(cluster: local.LocalCluster, folder: Path, case: Case, rounds: int, seed: int) -> Sent:
    """The stock app, with this seed's examples."""
    case.draw(folder, seed)
    meter = Meter(cluster.fleet_port)
    meter.begin()
    times = stock(cluster, folder, case, rounds, empty=False, seed=seed)
    up, down = meter.end()
    return Sent(STOCK, seed, up, down, bundles(cluster, "stock-lora"), 0, times.losses)


def alloy(cluster: local.LocalCluster, folder: Path, case: Case, rounds: int, way: tuple[str, str], seed: int) -> Sent:
    """FedAlloy with a strategy and an encoding, both ways."""
    strategy, encoding = way
    name = f"{strategy}-{encoding}-{seed}"
    config: dict[str, Any] = {"strategy": strategy, "run-name": name, "num-server-rounds": rounds, "seed": seed}
    config |= {"runs-dir": str(cluster.settings.runs_dir), "min-clients": case.clients, "learning-rate": case.rate}
    config |= {"uplink-encoding": encoding, "downlink-encoding": encoding} | case.config(folder) | PATIENT
    meter = Meter(cluster.fleet_port)
    meter.begin()
    outcome = cluster.run(config)
    up, down = meter.end()
    if not outcome.completed:
        raise FailedError(f"{name} ended as {outcome.status}:\n{outcome.log.read_text()}")
    summary = json.loads((cluster.settings.runs_dir / name / "summary.json").read_text())
    tensors = sum(summary["bytes"][direction]["tensor"] for direction in ("up", "down"))
    losses = {client: metrics["loss"] for client, metrics in summary["clients"].items()}
    right = {client: metrics["accuracy"] for client, metrics in summary["clients"].items() if "accuracy" in metrics}
    if len(losses) < case.clients:
        raise FailedError(f"{name}: {len(losses)} of {case.clients} clients were delivered their model")
    return Sent(f"{strategy} {encoding}", seed, up, down, bundles(cluster, "fedalloy"), tensors, losses, right)


def measure(
    case: Case, ways: list[tuple[str, str]], rounds: int, seeds: int, kept: Callable[[Sent], None], found: list[Sent]
) -> None:
    """All runs that are not among ``found``, one after the other; ``kept`` gets each."""
    there = {(sent.seed, sent.way) for sent in found}
    asked = [(seed, way) for seed in range(seeds) for way in [None, *ways]]
    missing = [(seed, way) for seed, way in asked if (seed, " ".join(way) if way else STOCK) not in there]
    if not missing:
        return
    with (
        terminate_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="fedalloy-bytes-") as text,
        cluster_of(Path(text), case) as (cluster, folder),
    ):
        for seed, way in missing:
            if way is None:
                sent = flowertune(cluster, folder, case, rounds, seed)
            else:
                sent = alloy(cluster, folder, case, rounds, way, seed)
            told(sent)
            kept(sent)


def told(sent: Sent) -> None:
    """One line while the others run."""
    console.print(f"{sent.way}, seed {sent.seed}: {sent.total / 1e6:.2f} MB, loss {mean(sent.losses.values()):.3f}")


def ratios(found: list[Sent], of: str = "total") -> dict[str, float]:
    """Bytes of each way over the stock app's, mean over seeds."""
    base = mean(getattr(sent, of) for sent in found if sent.way == STOCK)
    ways = dict.fromkeys(sent.way for sent in found if sent.way != STOCK)
    return {way: mean(getattr(sent, of) for sent in found if sent.way == way) / base for way in ways}


def scores(found: list[Sent], way: str, of: str) -> Scores:
    """Losses or accuracies by seed and client."""
    return {(s.seed, client): value for s in found if s.way == way for client, value in getattr(s, of).items()}


def score_table(found: list[Sent], of: str = "losses") -> dict[str, dict[str, float]]:
    """The mean loss (or accuracy), and mean differences to the same strategy at fp32 and to the stock app (loss only).

    Differences are over the clients and seeds that both have, with intervals.
    """
    table: dict[str, dict[str, float]] = {}
    for way in dict.fromkeys(sent.way for sent in found):
        mine = scores(found, way, of)
        if not mine:
            continue
        table[way] = {"mean": mean(mine.values())}
        exact = scores(found, f"{way.split()[0]} fp32", of)
        if exact and not way.endswith(" fp32"):
            interval = paired(mine, exact).mean
            table[way] |= {"more": interval.value, "low": interval.low, "high": interval.high}
        stock_app = scores(found, STOCK, of)
        if way != STOCK and mine.keys() & stock_app.keys():
            interval = paired(mine, stock_app).mean
            table[way] |= {"than_stock": interval.value, "stock_low": interval.low, "stock_high": interval.high}
    return table


def llama_8b() -> Layout:
    """LoRA r=16 on all linear layers of Llama 3.1 8B."""
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
    entries, scalings = [], {}
    for layer in range(32):
        for name, (wide, out) in shapes.items():
            module = f"model.layers.{layer}.{name}_proj"
            entries += [Entry(module, Factor.A, (16, wide)), Entry(module, Factor.B, (out, 16))]
            scalings[module] = 2.0
    return Layout(tuple(entries), scalings, "llama-3.1-8b")


def projected(found: list[Sent]) -> dict[str, float]:
    """MB that a client and round of Llama 3.1 8B takes, by ``fedavg``'s encodings and in the stock app.

    Empty if ``fedavg`` was not measured.
    """
    layout = llama_8b()
    plain = payload_size(layout, Encoding.FP32)
    fedavg = sorted((s for s in found if s.way.startswith("fedavg ")), key=lambda sent: sent.tensors)
    if not fedavg:
        return {}
    few, many = fedavg[0], fedavg[-1]
    if few.tensors == many.tensors:  # one encoding: small messages are in it
        per_byte = few.without_bundle / few.tensors
    else:
        per_byte = (many.without_bundle - few.without_bundle) / (many.tensors - few.tensors)
    rows = {f"fedavg {name}": 2 * payload_size(layout, Encoding(name)) * per_byte / 1e6 for name in ENCODINGS}
    # Down to train, up, and down again to evaluate; what its many small arrays cost on top is left out.
    return {STOCK: 3 * plain * per_byte / 1e6} | rows | {"wire bytes per tensor byte": per_byte}


def shown(found: list[Sent]) -> Table:
    """The main table."""
    table = Table(title="Both directions, all clients", title_justify="left")
    columns = ("way", "seeds", "MB up", "MB down", "of flowertune", "bundle MB", "without it")
    more, than_stock = "more than fp32 (95 %)", "more than flowertune (95 %)"
    for column in (*columns, "loss", more, than_stock, "accuracy", more):
        table.add_column(column, justify="left" if column == "way" else "right")
    whole, rest = ratios(found), ratios(found, "without_bundle")
    losses, accuracies = score_table(found), score_table(found, "accuracies")
    for way in losses:
        runs = [sent for sent in found if sent.way == way]
        cells = [
            way,
            str(len(runs)),
            f"{mean(sent.up for sent in runs) / 1e6:.2f}",
            f"{mean(sent.down for sent in runs) / 1e6:.2f}",
        ]
        cells += [f"{whole.get(way, 1):.4f}", f"{mean(sent.bundle for sent in runs) / 1e6:.2f}"]
        cells += [f"{rest.get(way, 1):.4f}"]
        loss, accuracy = losses[way], accuracies.get(way, {})
        cells += [f"{loss['mean']:.4f}", _more(loss, "more", "low", "high")]
        cells += [_more(loss, "than_stock", "stock_low", "stock_high")]
        cells += [f"{accuracy['mean']:.4f}" if accuracy else "", _more(accuracy, "more", "low", "high")]
        table.add_row(*cells)
    return table


def _more(said: Mapping[str, float], mean_: str, low: str, high: str) -> str:
    return f"{said[mean_]:+.4f} ({said[low]:+.4f} to {said[high]:+.4f})" if mean_ in said else ""


def report_of(found: list[Sent]) -> dict[str, Any]:
    """What ``--json`` writes of runs."""
    return {
        "bytes_over_flowertune": ratios(found),
        "bytes_over_flowertune_without_bundle": ratios(found, "without_bundle"),
        "loss": score_table(found),
        "accuracy": score_table(found, "accuracies"),
        "llama_3_1_8b_mb_per_client_and_round": projected(found),
        "runs": [asdict(sent) for sent in found],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="llama", choices=["llama", *REAL], help="and the tasks that go with it")
    parser.add_argument("--data", type=Path, help="folder of the scenarios on real data")
    parser.add_argument("--quick", action="store_true", help="1 seed, 5 rounds, int4 of all and two more")
    parser.add_argument("--ways", nargs="+", help="only these, for example 'fedavg int4'")
    parser.add_argument("--seeds", type=int, help="instead of 3 (1 with --quick)")
    parser.add_argument("--rounds", type=int, help="of each run, instead of 8 (5 with --quick)")
    parser.add_argument("--clients", type=int, default=2, help="SuperNodes")
    parser.add_argument("--found", type=Path, help="file of finished runs: they are not run again")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--json", type=Path, help="write everything here")
    given = parser.parse_args()
    if given.base != "llama" and given.data is None and not given.table:
        parser.error(f"--base {given.base} reads its data from a folder: --data")
    ways = list(QUICK) if given.quick else [(strategy, name) for strategy in STRATEGIES for name in ENCODINGS]
    if given.ways:
        ways = [way for way in ways if " ".join(way) in given.ways]
    rounds = given.rounds or (5 if given.quick else 8)
    before = machine()
    about = {"base": given.base, "clients": given.clients, "rounds": rounds}
    found: list[Sent] = []
    for line in resumable.read(given.found) if given.found else []:
        if {key: line.pop(key) for key in about} == about:
            found.append(Sent(**line))

    def keep(sent: Sent) -> None:
        found.append(sent)
        if given.found:
            resumable.append(given.found, [about | asdict(sent)])
        write()

    def write() -> None:
        if given.json:
            given.json.write_text(json.dumps(report_of(found) | about | {"machine": before}, indent=2))

    case = Case("wide", given.clients)
    if given.base != "llama" and given.data is not None:
        case = RealCase(given.base, given.clients, given.data.resolve())
    if not given.table:
        measure(case, ways, rounds, given.seeds or (1 if given.quick else 3), keep, found)
    write()
    console.print(shown(found))
    console.print("Llama 3.1 8B, r=16, MB a client and round:", projected(found), highlight=False)
    console.print(f"machine: {before}", highlight=False)


if __name__ == "__main__":
    main()
