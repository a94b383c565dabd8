"""One run in this process, through the real round loop and client code; a line of results for each of its clients."""

from __future__ import annotations

import gc
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor

import client_app.session
from client_app.session import Executor
from client_app.settings import Settings
from fedalloy_adapters.wire.flower_records import unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.clients.held_out import LABEL
from server_app.run.loop import run
from server_app.run.run_directory import RunDirectory
from server_app.tools.compare.records import read_run
from server_app.tools.compare.statistics import with_score
from strategies.algorithms.fedmosaic import FedMosaic
from tests.benchmarks.claims.found import Line
from tests.benchmarks.claims.jobs import Job
from tests.in_process import EXACT, FIRST_NODE, InProcessGrid, Tamper

KEPT = ("loss", "accuracy", "exact_match", "score")
"""Metrics that lines have."""


class Residents:
    """Replaces the class of executors, so that each client keeps one, as with a resident trainer."""

    def __init__(self) -> None:
        self.executors: dict[str, Executor] = defaultdict(Executor)

    def __call__(self) -> Residents:
        return self

    def register(self, settings: Settings) -> report_pb2.Registration:
        """See :class:`Executor`."""
        return self.executors[settings.client_id].register(settings)

    def carry_out(
        self, settings: Settings, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]
    ) -> tuple[report_pb2.Report, dict[str, bytes]]:
        """See :class:`Executor`."""
        return self.executors[settings.client_id].carry_out(settings, plan, blobs)


RESIDENTS = Residents()
"""The executor of this process for a client, so that the base model is loaded once for each client."""


class Work:
    """Counts what clients compute, from their reports: the same for every strategy."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.steps: dict[int, int] = defaultdict(int)
        self.looks: dict[int, int] = defaultdict(int)

    def __call__(self, node: int, message: Message, reply: Message | None) -> Message | None:
        if reply is None or reply.has_error() or message.metadata.message_type != "train.plan":
            return reply
        plan, _ = unpack(message.content, "plan", plan_pb2.Plan)
        report, _ = unpack(reply.content, "report", report_pb2.Report)
        for result in report.results:
            self.steps[node] += result.train.steps + result.distill.train.steps
            if plan.round <= self.rounds:  # the delivery's are for the record
                passes = (result.evaluate, result.sketch, result.attribute, result.density, result.gram)
                self.looks[node] += sum(int(found.examples) for found in passes) + result.fisher.samples
        return reply


def oracle(groups: Mapping[str, str]) -> Any:
    """A ``_relevance`` that knows which clients are alike: a client's weight is spread equally over its own group."""

    def weights(self: FedMosaic, names: list[str], similarities: Tensor, peers: Tensor) -> Tensor:
        alike = torch.tensor([[float(a != b and groups[a] == groups[b]) for b in names] for a in names])
        others = 1.0 - torch.eye(len(names))
        rows = torch.where(alike.any(dim=1, keepdim=True), alike, others).double()
        return rows / rows.sum(dim=1, keepdim=True)

    return weights


def carry_out(job: Job, folder: Path, data: Path | None, model: str) -> list[Line]:
    """Run a job in a folder of its own below ``folder``; returns its lines.

    Args:
        job: what is run.
        folder: of runs and clients; base models are kept in ``folder/.cache``.
        data: folder of the scenarios on real data.
        model: another base model, by hub id or folder; empty: the scenario's.

    Raises:
        RunError: it could not end well.
    """
    parts = job.arm.apart or (tuple(range(len(job.place.clients))),)
    lines: list[Line] = []
    for number, members in enumerate(parts):
        lines += _part(job, folder, data, model, f"{job.folder}-{number}", [job.place.clients[i] for i in members])
    names = {f"client-{number}": index for index, number in enumerate(job.place.clients)}
    return [{**line, "clients": len(lines)} for line in sorted(lines, key=lambda line: names[line["client"]])]


def config_of(job: Job, data: Path | None, model: str, members: Sequence[int]) -> dict[str, Any]:
    """A run's config, but for its name and folder; the arguments are those of :func:`carry_out`."""
    config: dict[str, Any] = EXACT | {"min-clients": len(members)} | dict(job.config)  # EXACT is not in a run's digest
    config |= {"scenario": job.place.scenario, "seed": job.seed}
    config |= {"data-root": str(data)} if data is not None else {}
    return config | ({"base-model": model} if model else {})


def run_of(
    job: Job, folder: Path, config: Mapping[str, Any], members: Sequence[int], tamper: Tamper | None = None
) -> RunDirectory:
    """One run of these clients, in this process.

    Raises:
        RunError: it could not end well.
    """

    def node(index: int) -> dict[str, Any]:
        return {"partition-id": members[index], "num-partitions": job.place.of}

    with _patched(job):
        grid = InProcessGrid(len(members), folder, dict(config), node, tamper)
        return run(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config)))


def _part(job: Job, folder: Path, data: Path | None, model: str, name: str, members: Sequence[int]) -> list[Line]:
    config = config_of(job, data, model, members) | {"run-name": name, "runs-dir": str(folder)}
    work = Work(int(config["num-server-rounds"]))
    began = time.process_time()
    shutil.rmtree(folder / name, ignore_errors=True)  # of a run that was cut off
    run_of(job, folder, config, members, work)
    found = read_run(job.arm.strategy, job.seed, folder / name)
    delivered = next(record for record in found.rounds if record["phase"] == "deliver")["clients"]
    about = {key: getattr(job, key) for key in ("experiment", "base", "dial", "seed", "split", "digest")}
    about |= {"arm": job.arm.name, "scenario": job.place.scenario, "setting": dict(job.setting)}
    lines = []
    for index, number in enumerate(members):
        client = f"client-{number}"
        scored = delivered[client]["metrics"]
        models = {label: _kept(metrics) for label, metrics in scored.items() if label != LABEL}
        sums = {
            way: sum(row.bytes.get(f"{way}_message") or 0 for row in found.rows if row.client == client)
            for way in ("up", "down")
        }
        own = {"client": client, "metrics": models.pop("personal"), "models": models, "bytes": sums}
        own |= {"train_steps": work.steps[FIRST_NODE + index], "looks": work.looks[FIRST_NODE + index]}
        lines.append({**about, **own, "run_cpu_seconds": round(time.process_time() - began, 1)})
    shutil.rmtree(folder / name, ignore_errors=True)
    return lines


def _kept(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without numbers that JSON lacks, such as a loss that is not finite."""
    found = with_score(metrics)
    return {key: round(float(found[key]), 6) for key in KEPT if key in found and math.isfinite(found[key])}


@contextmanager
def _patched(job: Job) -> Iterator[None]:
    names = [f"client-{number}" for number in job.place.clients]
    logging.getLogger("flwr").setLevel(logging.ERROR)
    gc.collect()
    with mock.patch.object(client_app.session, "Executor", RESIDENTS):
        if not job.arm.oracle:
            yield
            return
        with mock.patch.object(FedMosaic, "_relevance", oracle(dict(zip(names, job.place.groups, strict=True)))):
            yield
