"""Memory of the server over the number of clients.

    python -m tests.benchmarks.server_memory [STRATEGY ...] [--quick] [--bank-mb MB] [--json FILE]

The real round loop over clients that answer without a model (:mod:`tests.benchmarks.thin.answers`), one process for
each point of the curve: peak memory never falls. Answers are made when they are fetched and forgotten afterwards, so
that the server is measured and not the network. Two rounds, in which every client is sent an adapter of 1 MiB and sends
one back (and a sketch of 0.4 MiB if the strategy asks for it), and the delivery. The bank is on disk
(``bank-memory-mb = 0``) unless ``--bank-mb`` says otherwise.

Before there was a bank: 3.2 adapters a client for fedavg, 6.6 for fedmerge.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import Message

from fedalloy_adapters.wire.flower_records import PLAN_TYPE, REGISTER_TYPE, pack, unpack
from proto.fedalloy.v1 import plan_pb2
from tests.benchmarks.thin.answers import ThinClient, layout_of_bytes, reference_of_bytes
from tests.faults.nodes import NodeGrid, run_nodes, statuses
from tests.in_process import EXACT
from tests.strategies.conftest import FakeNode

COUNTS = (8, 32, 128, 200, 1000)
QUICK = (8, 200)
STRATEGIES = ("fedavg", "local", "fedmerge", "potara", "fedmosaic")
SIZE = 2**20
LAYOUT, REFERENCE = layout_of_bytes(SIZE), reference_of_bytes(SIZE)


class Lean(NodeGrid):
    """Keeps only the part of a message on which its answer depends, and makes the answer when it is fetched."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            kind = message.metadata.message_type
            if kind not in (PLAN_TYPE, REGISTER_TYPE):
                names.extend(super().push_messages([message]))
                continue
            self.count += 1
            name = f"message-{self.count}"
            asked = message
            if kind == PLAN_TYPE:
                plan, _ = unpack(message.content, "plan", plan_pb2.Plan)
                asked = Message(pack("plan", plan), dst_node_id=message.metadata.dst_node_id, message_type=kind)
            asked.metadata.__dict__["_message_id"] = name
            self.waiting[name] = [asked]
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for name in message_ids:
            for message in self.waiting.pop(name, []):
                if message.metadata.message_type not in (PLAN_TYPE, REGISTER_TYPE):
                    yield message
                    continue
                client = ThinClient(f"client-{message.metadata.dst_node_id:04d}", LAYOUT, REFERENCE)
                yield Message(client.answer(message), reply_to=message)


def measure(strategy: str, count: int, bank_mb: float) -> dict[str, float]:
    """One run in this process: MiB of peak memory, and of that before the first client."""
    torch.set_num_threads(1)
    nodes = {number: FakeNode(f"client-{number:04d}", LAYOUT) for number in range(1, count + 1)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        directory = run_nodes(
            Path(folder), Lean(nodes), strategy=strategy, num_server_rounds=2, min_clients=count, round_timeout=3000.0,
            startup_timeout=3000.0, bank_memory_mb=bank_mb, **EXACT,
        )  # fmt: skip
        for answered in statuses(directory):
            assert list(answered.values()) == ["ok"] * count, f"an answer was lost: {answered}"
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--quick", action="store_true", help="8 and 200 clients only")
    parser.add_argument("--bank-mb", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help='where {"growth_mib": {strategy: from 8 clients to 200}} goes')
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.point:
        print(json.dumps(measure(chosen.strategies[0], chosen.point, chosen.bank_mb)))
        return
    counts = QUICK if chosen.quick else COUNTS
    print(f"adapter of {SIZE // 2**20} MiB; MiB above the process before the first client")
    print(f"{'strategy':12}" + "".join(f"{count:>8}" for count in counts))
    growth = {}
    for strategy in chosen.strategies:
        grown = {}
        for count in counts:
            command = [sys.executable, "-m", "tests.benchmarks.server_memory", strategy]
            command += ["--point", str(count), "--bank-mb", str(chosen.bank_mb)]
            done = subprocess.run(command, capture_output=True, check=False, text=True)
            if done.returncode:
                raise RuntimeError(f"{strategy} with {count} clients: {done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            grown[count] = found["peak"] - found["before"]
        growth[strategy] = round(grown[200] - grown[8], 1)
        print(f"{strategy:12}" + "".join(f"{value:8.0f}" for value in grown.values()), flush=True)
    print(json.dumps({"growth_mib": growth}))
    if chosen.json:
        chosen.json.write_text(json.dumps({"growth_mib": growth, "bank_memory_mb": chosen.bank_mb}))


if __name__ == "__main__":
    main()
