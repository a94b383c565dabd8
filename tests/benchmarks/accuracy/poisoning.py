"""Hostile clients: their effect on the honest ones, by strategy, with today's defaults and other settings.

    python -m tests.benchmarks.accuracy.poisoning                      # seeds 0 and 1
    python -m tests.benchmarks.accuracy.poisoning --table              # prints finished runs; nothing is run
    python -m tests.benchmarks.accuracy.poisoning --seeds 100 --kinds none flip --rows "fedavg max-update-ratio=2"
    python -m tests.benchmarks.accuracy.poisoning --clients 8 --seeds 0 --kinds none flip   # two of eight

Through the real round loop and client code, in one process, on ``digits``. Client 2 of 4 (or clients 2 and 5 of 8)
answers as it should, except for:

* ``noise``: its uploads are noise of the honest uploads' norm;
* ``flip``: it sends its update times minus ten;
* ``labels``: it trains on wrong labels, 9 for 0 to 0 for 9, and sends the result;
* ``claims``: it registers a million training examples, and flips;
* ``spy``: its sketch is the mean of the others' last ones, and it flips (FedMosaic only).

A row is a strategy with other run-config. Its cells are the honest clients' mean (worst) accuracy, and two
differences of the honest client that lost most: against the same run without the liar, and against ``local``. Each
finished run is a line of ``--found``, so that the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from flwr.app import Message
from rich.console import Console
from rich.table import Table

import client_app.session  # noqa: F401 - these two before what there is is frozen
import server_app.run.loop  # noqa: F401
from client_app.data.dataset import ClientData, Dataset
from client_app.scenarios import digits
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.parts import layout_of_part, layout_of_sketch, layouts_of_plan
from fedalloy_adapters.wire.codec import decode, encode
from fedalloy_adapters.wire.flower_records import pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from tests.benchmarks.accuracy.resumable import append, has, prepared, read
from tests.in_process import FIRST_NODE, run_in_process

HOSTILE = {4: (2,), 8: (2, 5)}
"""The hostile clients, by the number of all."""
KINDS = ("none", "noise", "flip", "labels", "claims", "spy")
ROWS = ("fedavg", "fedavg fedavg.robust=median", "potara", "fedmerge", "fedmosaic")
FOUND = Path(__file__).parents[1] / "found" / "poisoning.jsonl"
HONEST = ("none", "labels")
"""Kinds that send what they have trained."""
Scores = dict[str, float]


class Liar:
    """Changes the hostile nodes' answers; sees what the others send."""

    def __init__(self, kind: str, hostile: Sequence[int] = HOSTILE[4]) -> None:
        self.kind = kind
        self.hostile = {FIRST_NODE + index for index in hostile}
        self.layouts: dict[int, tuple[Layout, Layout | None]] = {}
        self.sketches: dict[int, Adapter] = {}

    def __call__(self, node: int, message: Message, reply: Message | None) -> Message | None:
        if reply is None or reply.has_error():
            return reply
        mine = node in self.hostile
        if message.metadata.message_type == "query.register":
            return self._registered(node, message, reply, mine=mine)
        if message.metadata.message_type != "train.plan" or not (mine or self.kind == "spy"):
            return reply
        plan, sent = unpack(message.content, "plan", plan_pb2.Plan)
        report, blobs = unpack(reply.content, "report", report_pb2.Report)
        known = layouts_of_plan(self.layouts[node][0], plan.steps)
        for slot, layout in self._expected(node, plan).items():
            adapter = decode(blobs[slot], expected=layout)
            is_sketch = any(step.sketch.slot == slot for step in plan.steps if step.HasField("sketch"))
            if not mine:
                self.sketches |= {node: adapter} if is_sketch else {}
                continue
            blobs[slot] = encode(self._lie(adapter, sent.get(slot), known, is_sketch), include_layout=False).blob
        return Message(pack("report", report, blobs), reply_to=message) if mine and self.kind not in HONEST else reply

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

    def _lie(self, adapter: Adapter, sent: bytes | None, known: Mapping[bytes, Layout], is_sketch: bool) -> Adapter:
        layout = adapter.layout
        if is_sketch:
            others = list(self.sketches.values())
            if self.kind != "spy" or not others:
                return adapter
            return Adapter(layout, torch.stack([other.vector for other in others]).mean(dim=0))
        start = torch.zeros_like(adapter.vector)
        if sent is not None:
            whole = decode(sent, layouts=known)
            start = whole.part(layout).vector if whole.layout.contains(layout) else start
        if self.kind == "noise":
            noise = torch.randn(adapter.vector.shape, generator=torch.Generator().manual_seed(0))
            return Adapter(layout, noise * adapter.vector.norm() / noise.norm())
        return Adapter(layout, start - 10 * (adapter.vector - start))


@contextmanager
def wrong_labels(kind: str, hostile: Sequence[int]) -> Iterator[None]:
    """Reverse the hostile clients' training labels if the kind says so."""
    load = digits.load_client

    def turned(partition_id: int, *args: Any) -> ClientData:
        data = load(partition_id, *args)
        if partition_id in hostile:
            train = data.splits["train"]
            data.splits["train"] = Dataset(train.inputs, digits.CLASSES - 1 - train.labels)
        return data

    with mock.patch.object(digits, "load_client", turned if kind == "labels" else load):
        yield


def measure(cache: Path, about: Mapping[str, Any]) -> Scores:
    """The honest clients' accuracies in one run, by client."""
    strategy, *rest = about["row"].split()
    kind, clients = about["kind"], about["clients"]
    config: dict[str, Any] = {"scenario": "digits", "seed": about["seed"]}
    config |= {"num_server_rounds": about["rounds"], "local_steps": about["local_steps"]}
    for word in rest:
        key, _, value = word.partition("=")
        config[key] = float(value) if value.replace(".", "").isdigit() else value
    with tempfile.TemporaryDirectory() as name, wrong_labels(kind, HOSTILE[clients]):
        (Path(name) / ".cache").symlink_to(cache)
        liar = Liar(kind, HOSTILE[clients])
        directory = run_in_process(Path(name), clients, liar, run_name="run", strategy=strategy, **config)
        summary = json.loads((directory.path / "summary.json").read_text())
    liars = {f"client-{index}" for index in HOSTILE[clients]}
    return {who: found["accuracy"] for who, found in summary["clients"].items() if who not in liars}


def cell(found: Mapping[str, Mapping[int, Scores]], row: str, kind: str, rows: Mapping[str, Any]) -> str:
    """Mean (worst) accuracy, and the largest loss of an honest client, compared with no liar and with ``local``."""
    scores = [score for one in found[kind].values() for score in one.values()]
    lost = []
    for base in (rows[row].get("none", {}), rows["local"].get("none", {})):
        pairs = [(base[seed], one) for seed, one in found[kind].items() if seed in base]
        lost.append(min((one[who] - alone[who] for alone, one in pairs for who in one), default=float("nan")))
    return f"{mean(scores):.3f} ({min(scores):.3f}) {lost[0]:+.3f} {lost[1]:+.3f}"


def table(runs: Sequence[Mapping[str, Any]], rows: Sequence[str], kinds: Sequence[str], title: str) -> Table:
    """One line for each row, one column for each kind."""
    shown = Table(title=title, title_justify="left")
    for column in ("", *kinds):
        shown.add_column(column, justify="left" if not column else "right")
    found: dict[str, dict[str, dict[int, Scores]]] = {row: {} for row in ("local", *rows)}
    for one in runs:
        if one["row"] in found:
            found[one["row"]].setdefault(one["kind"], {})[one["seed"]] = one["scores"]
    for row, by_kind in found.items():
        cells = [cell(by_kind, row, kind, found) if kind in by_kind else "" for kind in kinds]
        shown.add_row(row, *cells)
    return shown


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--clients", type=int, default=4, choices=list(HOSTILE))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--local-steps", type=int, default=30)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help='Such as "fedavg max-update-ratio=2".')
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--found", type=Path, default=FOUND, help="File of the finished runs.")
    parser.add_argument("--table", action="store_true", help="Run nothing.")
    given = prepared(parser)
    asked = [
        (seed, kind, row)
        for seed in given.seeds
        for kind in given.kinds
        for row in (["local", *given.rows] if kind == "none" else given.rows)
        if kind != "spy" or row.startswith("fedmosaic")
    ]
    same = {"clients": given.clients, "rounds": given.rounds, "local_steps": given.local_steps}
    for seed, kind, row in [] if given.table else asked:
        about = {"row": row, "kind": kind, "seed": seed, **same}
        if has(read(given.found, clients=4), about):
            continue
        scores = measure(given.cache, about)
        append(given.found, [{**about, "scores": scores}])
        print(row, kind, seed, {who: round(score, 3) for who, score in scores.items()}, flush=True)
    runs = [one for one in read(given.found, clients=4) if same.items() <= one.items() and one["seed"] in given.seeds]
    title = f"digits, {given.clients} clients, {given.rounds} rounds, seeds {given.seeds}: "
    title += "honest mean (worst), most lost to no liar, to local"
    Console(width=200).print(table(runs, given.rows, given.kinds, title))


if __name__ == "__main__":
    main()
