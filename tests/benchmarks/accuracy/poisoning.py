"""One of four clients is hostile: what it does to the honest ones, by strategy, without and with the default bounds.

    python -m tests.benchmarks.accuracy.poisoning                      # the table of docs/security.md, seed 0
    python -m tests.benchmarks.accuracy.poisoning --seeds 0 1 --strategies fedavg fedmerge potara fedmosaic

Through the real round loop and client code, in one process, on ``digits``. Client 2 of 4 answers as it should, but for:

* ``noise``: its uploads are noise of the honest uploads' norm;
* ``flip``: its update, times minus ten;
* ``claims``: it registers a million training examples, and flips;
* ``spy``: its sketch is the mean of the others' last ones, and it flips.

Prints the honest clients' mean (worst) accuracy, and beside it by how much the worst honest client lies below its own
accuracy in ``local``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from rich.console import Console
from rich.table import Table

from client_app.plan.training import set_up_torch
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.parts import layout_of_part, layout_of_sketch
from fedalloy_adapters.wire.codec import decode, encode
from fedalloy_adapters.wire.flower_records import pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from tests.in_process import FIRST_NODE, run_in_process

HOSTILE = 2
KINDS = ("none", "noise", "flip", "claims", "spy")
OFF = {"max_update_ratio": 0.0, "max_examples_ratio": 0.0}


class Liar:
    """Changes one node's answers; sees what the others send."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.layouts: dict[int, tuple[Layout, Layout | None]] = {}
        self.sketches: dict[int, Adapter] = {}

    def __call__(self, node: int, message: Message, reply: Message | None) -> Message | None:
        if reply is None or reply.has_error():
            return reply
        mine = node == FIRST_NODE + HOSTILE
        if message.metadata.message_type == "query.register":
            return self._registered(node, message, reply, mine=mine)
        if message.metadata.message_type != "train.plan" or not (mine or self.kind == "spy"):
            return reply
        plan, sent = unpack(message.content, "plan", plan_pb2.Plan)
        report, blobs = unpack(reply.content, "report", report_pb2.Report)
        for slot, layout in self._expected(node, plan).items():
            adapter = decode(blobs[slot], expected=layout)
            is_sketch = any(step.sketch.slot == slot for step in plan.steps if step.HasField("sketch"))
            if not mine:
                self.sketches |= {node: adapter} if is_sketch else {}
                continue
            blobs[slot] = encode(self._lie(adapter, sent.get(slot), layout, is_sketch), include_layout=False).blob
        return Message(pack("report", report, blobs), reply_to=message) if mine and self.kind != "none" else reply

    def _registered(self, node: int, message: Message, reply: Message, *, mine: bool) -> Message:
        registration, _ = unpack(reply.content, "registration", report_pb2.Registration)
        reference = Layout.from_proto(registration.reference) if registration.HasField("reference") else None
        self.layouts[node] = Layout.from_proto(registration.layout), reference
        if not mine or self.kind != "claims":
            return reply
        for task in registration.tasks:
            task.examples["train"] = 10**6
        return Message(pack("registration", registration), reply_to=message)

    def _expected(self, node: int, plan: plan_pb2.Plan) -> dict[str, Layout]:
        layout, reference = self.layouts[node]
        found = {step.send.slot: layout_of_part(layout, step.send.part) for step in plan.steps if step.HasField("send")}
        for step in plan.steps:
            if step.HasField("sketch") and reference is not None:
                found[step.sketch.slot] = layout_of_sketch(reference, step.sketch.row_count)
        return found

    def _lie(self, adapter: Adapter, sent: bytes | None, layout: Layout, is_sketch: bool) -> Adapter:
        if is_sketch:
            others = list(self.sketches.values())
            if self.kind != "spy" or not others:
                return adapter
            return Adapter(layout, torch.stack([other.vector for other in others]).mean(dim=0))
        start = torch.zeros_like(adapter.vector)
        if sent is not None:
            whole = decode(sent, layouts={known.digest: known for pair in self.layouts.values() for known in pair[:1]})
            start = whole.part(layout).vector if whole.layout.contains(layout) else start
        if self.kind == "noise":
            noise = torch.randn(adapter.vector.shape, generator=torch.Generator().manual_seed(0))
            return Adapter(layout, noise * adapter.vector.norm() / noise.norm())
        return Adapter(layout, start - 10 * (adapter.vector - start))


def run(folder: Path, name: str, strategy: str, kind: str, seed: int, rounds: int, **config: Any) -> dict[str, float]:
    """The honest clients' accuracies, by client."""
    directory = run_in_process(
        folder,
        4,
        Liar(kind),
        run_name=name,
        strategy=strategy,
        scenario="digits",
        seed=seed,
        num_server_rounds=rounds,
        **config,
    )
    summary = json.loads((directory.path / "summary.json").read_text())
    return {who: found["accuracy"] for who, found in summary["clients"].items() if who != f"client-{HOSTILE}"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--local-steps", type=int, default=30)
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "fedmosaic"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--robust", nargs="*", default=["median", "trimmed", "krum"], help="Of fedavg.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    more = {"local_steps": arguments.local_steps}
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for strategy in arguments.strategies:
        rows += [(f"{strategy}, no bounds", strategy, OFF), (f"{strategy}, default", strategy, {})]
        if strategy == "fedavg":
            rows += [(f"fedavg, robust = {rule}", strategy, {"fedavg__robust": rule}) for rule in arguments.robust]
    table = Table(title=f"digits, {arguments.rounds} rounds: honest mean (worst), worst below local")
    for column in ("", *arguments.kinds):
        table.add_column(column, justify="left" if not column else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".cache").symlink_to(arguments.cache)
        alone = {s: run(folder, f"local-{s}", "local", "none", s, arguments.rounds, **more) for s in arguments.seeds}
        for index, (title, strategy, config) in enumerate(rows):
            cells = []
            for kind in arguments.kinds:
                if kind == "spy" and strategy != "fedmosaic":
                    cells.append("")
                    continue
                found = {
                    s: run(folder, f"{index}-{kind}-{s}", strategy, kind, s, arguments.rounds, **config, **more)
                    for s in arguments.seeds
                }
                scores = [score for one in found.values() for score in one.values()]
                below = max(alone[s][who] - score for s, one in found.items() for who, score in one.items())
                cells.append(f"{sum(scores) / len(scores):.3f} ({min(scores):.3f}) {-below:+.3f}")
                print(title, kind, cells[-1], flush=True)
            table.add_row(title, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
