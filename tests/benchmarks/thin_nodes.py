"""A round over many thin nodes and a real SuperLink, beside stock Flower's grid with the same bytes.

    python -m tests.benchmarks.thin_nodes [--nodes 100 ...] [--bytes 65536 ...] [--strategy fedavg] [--json FILE]

A ``flower-superlink`` with its database, and nodes that speak its Fleet API (:mod:`tests.benchmarks.thin.node`) but
have no model: they answer at once. ``flwr run`` of this app, with two rounds; then ``grid.send_and_receive`` of
messages of the same size, also two rounds, with the same nodes (``thin/stock_app``). The second round counts: in the
first the bundle is built and the nodes register. Columns:

    register, train, deliver   seconds of this app's phases; ``train`` is the second round
    per client                 milliseconds of ``train`` per answer; ``stock`` the same of stock Flower
    over stock                 the first over the second
    CPU                        processor milliseconds per answer of ServerApp and SuperLink in ``train``, and over stock
    MiB                        peak resident memory of both

Stock Flower's messages have the adapter as one array, the fewest objects that it can be sent in; with ``--tensors``
there is also a run with an array for each tensor, as in an ``ArrayRecord`` of a state dict.

Of many nodes a few may lose an answer (a locked database): rounds of either count from 99 in 100 answers on, and
seconds are per answer. ``--only-stock`` leaves this app's run out.

Nodes look for messages every three seconds, as stock SuperNodes do; so a round may take up to that long in any case. On
a machine that does other work at the same time, compare processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server_app.run.run_directory import RunDirectory
from server_app.tools.demo import terminate_as_interrupt
from tests.benchmarks.thin.answers import layout_of_bytes
from tests.benchmarks.thin.cluster import ThinCluster
from tests.in_process import EXACT

SERVER = ("serverapp", "superlink")
STOCK = Path(__file__).parent / "thin" / "stock_app"


@dataclass(frozen=True)
class Row:
    """One case; seconds, and shares of them."""

    nodes: int
    bytes: int
    answered: int
    register: float
    train: float
    deliver: float
    seconds_per_client: float
    stock_seconds_per_client: float | None
    """Per answer. None if stock Flower's run failed, as is everything that is compared with it."""
    over_stock: float | None
    over_stock_tensors: float | None
    cpu: dict[str, float]
    """Processor seconds per answer in ``train``, by process."""
    stock_cpu: dict[str, float]
    over_stock_cpu: float | None
    """Processor seconds of SuperLink and ServerApp together."""
    serverapp_mib: int
    superlink_mib: int
    bytes_up: int
    bytes_down: int
    troubles: dict[str, int]


def enough(nodes: int) -> int:
    """Answers with which a round of so many nodes counts."""
    return nodes - nodes // 100


def measure(nodes: int, size: int, strategy: str, poll: float, with_tensors: bool) -> Row:
    """One case, from an empty database on."""
    with terminate_as_interrupt(), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with ThinCluster(folder / "cluster", nodes, size, poll) as cluster:
            config: dict[str, Any] = {
                **EXACT,  # the bytes of Flower's own grid
                "strategy": strategy, "num-server-rounds": 2, "min-clients": enough(nodes),
                "runs-dir": str(folder / "runs"), "run-name": "thin", "startup-timeout": 900.0, "round-timeout": 900.0,
            }  # fmt: skip
            rounds = folder / "runs" / "thin" / "rounds.jsonl"
            outcome = cluster.run(config, lambda: cluster.mark(rounds))
            if not outcome.completed:
                raise RuntimeError(f"the run is {outcome.status}:\n{outcome.log.read_text()[-3000:]}")
            records = RunDirectory(folder / "runs" / "thin").rounds()
            second = max(n for n, record in enumerate(records) if record["phase"] == "train")
            used = cluster.between(second - 1, second)
            peaks = dict(cluster.peaks)
            seconds_of = {record["phase"]: record["seconds"] for record in records}
            print(
                f"{nodes} nodes, {size} bytes: {seconds_of}; CPU seconds in train {used}", file=sys.stderr, flush=True
            )
            stock, stock_used = stock_round(cluster, folder / "stock.json", nodes, size, 1)
            tensors = 2 * len(layout_of_bytes(size).modules)
            apart = stock_round(cluster, folder / "apart.json", nodes, size, tensors)[0] if with_tensors else None
            done = cluster.stop_nodes()
    phases = {record["phase"]: record for record in records}  # the last of each
    answered = sum(client["status"] == "ok" for client in phases["train"]["clients"].values())
    troubles: dict[str, int] = {}
    for process in done:
        for name, count in [*process["failures"].items(), *process["done"].items()]:
            if name not in ("answers", "stored", "bytes up", "bytes down"):
                troubles[name] = troubles.get(name, 0) + count
    seconds = phases["train"]["seconds"]
    per_answer = seconds / answered
    return Row(
        nodes, size, answered, phases["register"]["seconds"], seconds, phases["deliver"]["seconds"],
        per_answer, stock, per_answer / stock if stock else None,
        per_answer / apart if apart else None,
        {name: used[name] / answered for name in used}, stock_used,
        sum(used[name] for name in SERVER) / answered / sum(stock_used[name] for name in SERVER) if stock else None,
        peaks["serverapp"], peaks["superlink"],
        sum(process["done"]["bytes up"] for process in done), sum(process["done"]["bytes down"] for process in done),
        troubles,
    )  # fmt: skip


def stock_round(
    cluster: ThinCluster, result: Path, nodes: int, size: int, arrays: int
) -> tuple[float | None, dict[str, float]]:
    """The second round of stock Flower's grid: seconds, and processor seconds by process, both per answer.

    None if its run failed, or fewer than 99 of 100 nodes answered.
    """
    config = {"result": str(result), "rounds": 2, "nodes": nodes, "bytes": size, "arrays": arrays}
    cluster.marks.clear()
    outcome = cluster.run(config, lambda: cluster.mark(result), app=STOCK)
    found = json.loads(result.read_text()) if result.exists() else {"answered": []}
    if not outcome.completed or len(found["answered"]) < 2 or min(found["answered"]) < enough(nodes):
        print(f"the stock run is {outcome.status}, with {found['answered']} answers of {nodes}:\n"
              f"{outcome.log.read_text()[-3000:]}", file=sys.stderr, flush=True)  # fmt: skip
        return None, {}
    answers = found["answered"][-1]
    used = {name: seconds / answers for name, seconds in cluster.between(0, 1).items()}
    print(f"stock: {found}; CPU seconds for each answer in the second round {used}", file=sys.stderr, flush=True)
    return float(found["seconds"][-1]) / answers, used


def measure_stock(nodes: int, size: int, poll: float) -> None:
    """Stock Flower's rounds alone; prints them."""
    with (
        terminate_as_interrupt(),
        tempfile.TemporaryDirectory() as place,
        ThinCluster(Path(place) / "cluster", nodes, size, poll) as cluster,
    ):
        stock_round(cluster, Path(place) / "stock.json", nodes, size, 1)


def shown(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--bytes", type=int, nargs="+", default=[2**16])
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--poll", type=float, default=3.0, help="seconds between a node's looks for messages")
    parser.add_argument("--tensors", action="store_true", help="compare with an array for each tensor, too")
    parser.add_argument("--only-stock", action="store_true", help="no run of this app")
    parser.add_argument("--json", type=Path, help="where the last row goes, with all rows in it")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    print(f"{'nodes':>6}{'KiB':>6}{'answered':>9}{'register':>9}{'train':>7}{'deliver':>8}{'ms/client':>10}{'stock':>7}"
          f"{'over':>6}{'CPU app':>8}{'link':>6}{'over':>6}{'MiB app':>8}{'link':>6}{'tensors':>8}")  # fmt: skip
    rows = []
    for nodes in chosen.nodes:
        for size in chosen.bytes:
            if chosen.only_stock:
                measure_stock(nodes, size, chosen.poll)
                continue
            row = measure(nodes, size, chosen.strategy, chosen.poll, chosen.tensors)
            rows.append(row)
            print(
                f"{row.nodes:6}{row.bytes // 1024:6}{row.answered:9}{row.register:9.1f}{row.train:7.1f}"
                f"{row.deliver:8.1f}{1000 * row.seconds_per_client:10.1f}"
                f"{shown(1000 * (row.stock_seconds_per_client or 0) or None, 1):>7}{shown(row.over_stock):>6}"
                f"{1000 * row.cpu['serverapp']:8.1f}{1000 * row.cpu['superlink']:6.1f}"
                f"{shown(row.over_stock_cpu):>6}{row.serverapp_mib:8}{row.superlink_mib:6}"
                f"{shown(row.over_stock_tensors):>8}"
                f"  {row.troubles or ''}",
                flush=True,
            )
    if chosen.json and rows:
        chosen.json.write_text(json.dumps(asdict(rows[-1]) | {"rows": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    main()
