"""Memory of the server over the number of clients: ``python -m tests.benchmarks.server_memory [STRATEGY ...]``.

The real round loop over clients that answer without a model, one process for each point of the curve (peak memory
never falls). Uploads are made when they are fetched and forgotten afterwards, so that what is measured is the server
and not the network: one round, in which every client is sent an adapter of P numbers and sends one back. What a
strategy must hold: local nothing; fedavg one adapter and, until the round settles, one upload per client; fedmerge
besides what each client was sent.

Seen for fedavg with an adapter of 1.0 MiB, MiB above the start: 8 clients 51, 32 139, 128 452, 200 650; no answer lost.
That is 3.1 adapters per client: the upload, the blob that it was read from, and a copy inside the average.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import Message

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.codec import encode
from fedalloy_adapters.flower_records import PLAN_TYPE, pack, unpack
from fedalloy_adapters.parts import layout_of_part
from proto.fedalloy.v1 import plan_pb2, report_pb2
from tests.faults.nodes import NodeGrid, run_nodes, statuses
from tests.strategies.conftest import FakeNode, layout_of

COUNTS = (8, 32, 128, 200)
LAYOUT = layout_of(rank=8, modules=tuple(f"m{i}" for i in range(16)), d_in=1024, d_out=1024)


class Lean(NodeGrid):
    """Keeps of a message only what its answer depends on, and makes the answer when it is fetched."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            if message.metadata.message_type != PLAN_TYPE:
                names.extend(super().push_messages([message]))
                continue
            self.count += 1
            name = f"message-{self.count}"
            plan, _ = unpack(message.content, "plan", plan_pb2.Plan)
            asked = Message(pack("plan", plan), dst_node_id=message.metadata.dst_node_id, message_type=PLAN_TYPE)
            asked.metadata.__dict__["_message_id"] = name
            self.waiting[name] = [asked]
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for name in message_ids:
            for message in self.waiting.pop(name, []):
                yield self.made(message) if message.metadata.message_type == PLAN_TYPE else message

    def made(self, message: Message) -> Message:
        if not message.content.config_records.get("fedalloy", {}).get("plan"):
            return message
        plan, _ = unpack(message.content, "plan", plan_pb2.Plan)
        report = report_pb2.Report(version=1, run_name=plan.run_name, client_id=plan.client_id, round=plan.round)
        uploads = {}
        for step in plan.steps:
            kind = step.WhichOneof("kind") or ""
            result = report.results.add()
            getattr(result, kind).SetInParent()
            if kind == "evaluate":
                result.evaluate.label, result.evaluate.split = step.evaluate.label, step.evaluate.split
                result.evaluate.metrics["loss"] = 1.0
            elif kind == "send":
                result.send.slot = step.send.slot
                part = layout_of_part(LAYOUT, step.send.part)
                generator = torch.Generator().manual_seed(message.metadata.dst_node_id)
                drawn = Adapter(part, 1e-3 * torch.randn(part.size, generator=generator))
                uploads[step.send.slot] = encode(drawn, include_layout=False).blob
        return Message(pack("report", report, uploads), reply_to=message)


def measure(strategy: str, count: int) -> dict[str, float]:
    """One run in this process: peak memory, and that before the first client."""
    torch.set_num_threads(1)
    grid = Lean({number: FakeNode(f"client-{number:03d}", LAYOUT) for number in range(1, count + 1)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        config = {"strategy": strategy, "num_server_rounds": 1, "min_clients": count, "round_timeout": 600.0}
        directory = run_nodes(Path(folder), grid, startup_timeout=600.0, fedmerge__init="jitter", **config)
        (answered,) = statuses(directory)
    assert list(answered.values()) == ["ok"] * count, "an answer was lost"
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    strategies = sys.argv[1:] or ["local", "fedavg", "fedmerge"]
    mib = LAYOUT.size * 4 / 2**20
    print(f"adapter of {LAYOUT.size} numbers, {mib:.1f} MiB; MiB above the process before the first client")
    print(f"{'strategy':12}" + "".join(f"{count:>10}" for count in COUNTS) + "   adapters per client")
    for strategy in strategies:
        grown = []
        for count in COUNTS:
            command = [sys.executable, "-m", "tests.benchmarks.server_memory", "--point", strategy, str(count)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            grown.append(found["peak"] - found["before"])
        slope = (grown[-1] - grown[0]) / (COUNTS[-1] - COUNTS[0]) / mib
        print(f"{strategy:12}" + "".join(f"{value:10.0f}" for value in grown) + f"   {slope:.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
