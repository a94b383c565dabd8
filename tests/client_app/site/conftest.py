"""A site whose service runs in a thread of the test, and a hostile ClientApp's way to it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.guard.record import Record
from client_app.site.service import SiteTrainer, open_socket
from client_app.site.site_file import read_site
from client_app.trainer import relay
from fedalloy_adapters.wire.flower_records import PLAN_TYPE, REGISTER_TYPE, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.messages.requests import Requests
from server_app.run.options import known_keys
from tests.toys import tiny_models, toy_data


@dataclass
class Running:
    """The service of client ``ada``, and what its relay sees."""

    folder: Path
    trainer: SiteTrainer
    base: Path

    @property
    def record(self) -> Record:
        return self.trainer.record

    def context(self, **run_config: Any) -> Context:
        node = {"client-id": "ada", "site-socket": str(self.trainer.site.socket)}
        given = {key.replace("__", ".").replace("_", "-"): value for key, value in run_config.items()}
        return Context(1, 7, node, RecordDict(), {**known_keys(), "base-model": str(self.base), **given})

    def register(self, run: str, key: str = "", **run_config: Any) -> report_pb2.Registration:
        context = self.context(**run_config)
        content = Requests(run, context.run_config, key).registration()
        reply = relay.register(Message(content, 7, REGISTER_TYPE, ttl=60.0), context)
        return unpack(reply.content, "registration", report_pb2.Registration)[0]

    def plan(
        self, plan: plan_pb2.Plan, key: str = "", tamper: Callable[[RecordDict], None] | None = None, **run_config: Any
    ) -> tuple[report_pb2.Report, dict[str, bytes]]:
        context = self.context(**run_config)
        content = Requests(plan.run_name, context.run_config, key).signed(pack("plan", plan), "plan")
        if tamper is not None:
            tamper(content)
        reply = relay.plan(Message(content, 7, PLAN_TYPE, ttl=60.0), context)
        return unpack(reply.content, "report", report_pb2.Report)


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_bert(tmp_path_factory.mktemp("base") / "bert", toy_data.VOCABULARY)


@pytest.fixture
def start(bert: Path) -> Iterator[Start]:
    """Starts services: ``start(policy="...", dp="...", servers=[...], rows=...)``."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # what Flower's process start sets
    torch.set_num_threads(1)
    running: list[tuple[Any, SiteTrainer, threading.Thread, Path]] = []

    def make(
        policy: str = "",
        dp: str = "",
        servers: str = '["any"]',
        rows: int = 40,
        models: str = '["*/bert"]',
        folder: Path | None = None,
    ) -> Running:
        folder = folder or Path(tempfile.mkdtemp(prefix="fa", dir="/tmp"))
        if not (folder / "data.jsonl").exists():
            toy_data.write_jsonl(folder / "data.jsonl", toy_data.opinions(rows, 0))
        (folder / "site.toml").write_text(
            f'socket = "s"\nruns = ["study-*"]\nservers = {servers}\nbase-models = {models}\n[client]\n'
            f'client-id = "ada"\nstate-dir = "state"\ndata-path = "data.jsonl"\nlabels = "neg,pos"\n'
            f"[policy]\n{policy}\n[dp]\n{dp}\n"
        )
        site = read_site(folder / "site.toml")
        trainer = SiteTrainer(site)
        server = open_socket(trainer, site)
        thread = threading.Thread(target=trainer.work, daemon=True)
        thread.start()
        running.append((server, trainer, thread, folder))
        return Running(folder, trainer, bert)

    yield make
    for server, trainer, thread, folder in running:
        trainer.retire()
        thread.join(60)
        server.stop(None).wait()
        shutil.rmtree(folder, ignore_errors=True)
