"""A round over many thin nodes and a real SuperLink, beside stock Flower's grid with the same bytes.

    python -m tests.benchmarks.thin_nodes [--nodes 100 ...] [--bytes 65536 ...] [--strategy fedavg] [--json FILE]

A ``flower-superlink`` with its database, and nodes that speak its Fleet API (:mod:`tests.benchmarks.thin.node`) but
have no model: they answer at once. ``flwr run`` of this app, with two rounds; then ``grid.send_and_receive`` of
messages of the same size, also two rounds, with the same nodes (``thin/stock_app``). The second round counts: in the
first the bundle is built and the nodes register. Columns:

    register, train, deliver   seconds of this app's phases; ``train`` is the second round
    per client                 milliseconds of ``train`` per node; ``stock`` the same of stock Flower
    over stock                 the first over the second
    CPU                        processor milliseconds per client and message of ServerApp and SuperLink, all phases
    MiB                        peak resident memory of both

Nodes look for messages every three seconds, as stock SuperNodes do; so a round cannot take less than up to that.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server_app.run.run_directory import RunDirectory
from tests.benchmarks.thin.cluster import ThinCluster

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
    stock_seconds_per_client: float
    over_stock: float
    serverapp_cpu: float
    superlink_cpu: float
    serverapp_mib: int
    superlink_mib: int
    bytes_up: int
    bytes_down: int
    troubles: dict[str, int]


def measure(nodes: int, size: int, strategy: str, poll: float) -> Row:
    """One case, from an empty database on."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with ThinCluster(folder / "cluster", nodes, size, poll) as cluster:
            config: dict[str, Any] = {
                "strategy": strategy, "num-server-rounds": 2, "min-clients": nodes, "runs-dir": str(folder / "runs"),
                "run-name": "thin", "startup-timeout": 1200.0, "round-timeout": 1200.0,
            }  # fmt: skip
            outcome = cluster.run(config, cluster.look)
            if not outcome.completed:
                raise RuntimeError(f"the run is {outcome.status}:\n{outcome.log.read_text()[-3000:]}")
            cpu = {name: cluster.cpu_seconds(name) for name in ("serverapp", "superlink")}
            peaks = dict(cluster.peaks)
            stock = stock_seconds(cluster, folder, nodes, size)
            done = cluster.stop_nodes()
        records = RunDirectory(folder / "runs" / "thin").rounds()
    phases = {record["phase"]: record for record in records}  # the last of each
    answered = sum(client["status"] == "ok" for client in phases["train"]["clients"].values())
    messages = 5 * nodes  # register, two rounds, deliver, counters
    troubles: dict[str, int] = {}
    for process in done:
        for name, count in [*process["failures"].items(), *process["done"].items()]:
            if name not in ("answers", "stored", "bytes up", "bytes down"):
                troubles[name] = troubles.get(name, 0) + count
    per_client, stock_per_client = phases["train"]["seconds"] / nodes, stock / nodes
    return Row(
        nodes, size, answered, phases["register"]["seconds"], phases["train"]["seconds"], phases["deliver"]["seconds"],
        per_client, stock_per_client, per_client / stock_per_client,
        cpu["serverapp"] / messages, cpu["superlink"] / messages, peaks["serverapp"], peaks["superlink"],
        sum(process["done"]["bytes up"] for process in done), sum(process["done"]["bytes down"] for process in done),
        troubles,
    )  # fmt: skip


def stock_seconds(cluster: ThinCluster, folder: Path, nodes: int, size: int) -> float:
    """Seconds of the second round of stock Flower's grid."""
    result = folder / "stock.json"
    config = {"result": str(result), "rounds": 2, "nodes": nodes, "bytes": size}
    outcome = cluster.run(config, app=STOCK)
    if not outcome.completed:
        raise RuntimeError(f"the stock run is {outcome.status}:\n{outcome.log.read_text()[-3000:]}")
    found = json.loads(result.read_text())
    if found["answered"][-1] != nodes:
        raise RuntimeError(f"stock Flower has {found['answered']} answers, expected {nodes}")
    return float(found["seconds"][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--bytes", type=int, nargs="+", default=[2**16])
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--poll", type=float, default=3.0, help="seconds between a node's looks for messages")
    parser.add_argument("--json", type=Path, help="where the last row goes, with all rows in it")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    print(f"{'nodes':>6}{'KiB':>6}{'answered':>9}{'register':>9}{'train':>7}{'deliver':>8}{'ms/client':>10}{'stock':>7}"
          f"{'over':>6}{'CPU app':>8}{'link':>6}{'MiB app':>8}{'link':>6}")  # fmt: skip
    rows = []
    for nodes in chosen.nodes:
        for size in chosen.bytes:
            row = measure(nodes, size, chosen.strategy, chosen.poll)
            rows.append(row)
            print(
                f"{row.nodes:6}{row.bytes // 1024:6}{row.answered:9}{row.register:9.1f}{row.train:7.1f}"
                f"{row.deliver:8.1f}{1000 * row.seconds_per_client:10.1f}{1000 * row.stock_seconds_per_client:7.1f}"
                f"{row.over_stock:6.2f}{1000 * row.serverapp_cpu:8.1f}{1000 * row.superlink_cpu:6.1f}"
                f"{row.serverapp_mib:8}{row.superlink_mib:6}"
                f"  {row.troubles or ''}",
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps(asdict(rows[-1]) | {"rows": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    main()
