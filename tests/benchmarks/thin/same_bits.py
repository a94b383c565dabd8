"""Whether two versions of the server compute the same numbers, for every strategy, bit by bit.

    git worktree add OLD COMMIT
    PYTHONPATH=OLD python tests/benchmarks/thin/same_bits.py dump old.safetensors        # whatever version is in OLD
    python -m tests.benchmarks.thin.same_bits dump new.safetensors
    python -m tests.benchmarks.thin.same_bits compare old.safetensors new.safetensors

A whole run of each strategy (three rounds and the delivery) over five nodes without a model: their answers are a
function of what they are sent, so a bit that differs anywhere in a merge also differs in the end. Adapters of 73,728
numbers are more than one block of a merge. It compares everything that a node holds after the delivery.

With ``dump FILE --digits`` clients train a real model, on ``digits`` (two rounds of ten steps), and every client's loss
and accuracy after the delivery are compared, as 64-bit numbers: training carries a bit that differs in a merge on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from strategies import STRATEGIES
from tests.faults.nodes import NodeGrid, run_nodes
from tests.in_process import run_in_process
from tests.strategies.conftest import FakeNode, layout_of

COUNT, ROUNDS = 5, 3
EXTRA: dict[str, dict[str, Any]] = {"fedavg delta": {"strategy": "fedavg", "fedavg.space": "delta"}}
"""Runs beside those of every strategy with its defaults."""


def numbers_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """What every node holds at the end of a run, by node and slot."""
    torch.set_num_threads(1)
    layout = layout_of(rank=8, modules=[f"m{i}" for i in range(72)], d_in=64, d_out=64, head=0)
    nodes = {n: FakeNode(f"client-{n}", layout, examples=10 * n) for n in range(1, COUNT + 1)}
    with tempfile.TemporaryDirectory() as folder:
        given = {key.replace("-", "_"): value for key, value in config.items() if "." not in key}
        given |= {key: value for key, value in config.items() if "." in key}
        run_nodes(
            Path(folder), NodeGrid(nodes), num_server_rounds=ROUNDS, min_clients=COUNT, round_timeout=600.0,
            startup_timeout=600.0, **given,
        )  # fmt: skip
    return {f"{node.name}/{slot}": held.vector for node in nodes.values() for slot, held in node.slots.items()}


def scores_of(config: dict[str, Any], cache: Path) -> dict[str, Tensor]:
    """What every client of ``digits`` has measured of its delivered model."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".cache").symlink_to(cache)
        more = {"num_server_rounds": 2, "local_steps": 10, "learning_rate": 5e-3, "run_name": "run", "seed": 0}
        given = {key.replace(".", "__"): value for key, value in config.items()}
        run_in_process(Path(folder), 4, scenario="digits", **more, **given)
        clients = json.loads((Path(folder) / "run" / "summary.json").read_text())["clients"]
    return {
        f"{client}/{metric}": torch.tensor(metrics[metric], dtype=torch.float64)
        for client, metrics in clients.items() for metric in ("loss", "accuracy")
    }  # fmt: skip


def dump(path: Path, names: list[str], digits: bool = False) -> None:
    """Runs one after the other; a strategy that this version does not have is left out."""
    runs = {name: {"strategy": name} for name in sorted(STRATEGIES)} | EXTRA
    found: dict[str, Tensor] = {}
    cache = Path(tempfile.gettempdir()) / "fedalloy-base-cache"
    cache.mkdir(exist_ok=True)
    for name in names or runs:
        try:
            tensors = scores_of(runs[name], cache) if digits else numbers_of(runs[name])
        except Exception as error:  # this version cannot; the other may, and the comparison names what is missing
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        found |= {f"{name}/{key}": tensor.clone() for key, tensor in tensors.items()}
        print(name, len(tensors), flush=True)
        save_file(found, path)  # after each one, because all of them take long and may be stopped


def compare(first: Path, second: Path) -> None:
    """A line for each strategy: how many tensors have the same bits, and how far the others are apart."""
    old, new = load_file(first), load_file(second)
    for name in sorted({key.split("/", 1)[0] for key in {*old, *new}}):
        keys = {key for key in {*old, *new} if key.startswith(f"{name}/")}
        both = sorted(key for key in keys if key in old and key in new and old[key].shape == new[key].shape)
        same = sum(torch.equal(old[key], new[key]) for key in both)
        apart = max((_relative(old[key], new[key]) for key in both), default=float("nan"))
        words = "same bits" if same == len(keys) else f"relative difference up to {apart:.1e}"
        print(f"{name:20}{same:4} of {len(keys):3}  {words}")


def _relative(old: Tensor, new: Tensor) -> float:
    return float((old.double() - new.double()).norm() / old.double().norm().clamp_min(1e-30))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    dumping = commands.add_parser("dump")
    dumping.add_argument("file", type=Path)
    dumping.add_argument("names", nargs="*")
    dumping.add_argument("--digits", action="store_true", help="a real model on real data")
    comparing = commands.add_parser("compare")
    comparing.add_argument("files", type=Path, nargs=2)
    chosen = parser.parse_args()
    if chosen.command == "dump":
        dump(chosen.file, chosen.names, chosen.digits)
    else:
        compare(*chosen.files)


if __name__ == "__main__":
    main()
