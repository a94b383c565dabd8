"""The Flower ClientApp: who am I, carry out this plan, what do my counters say.

Flower starts a fresh process for every message, so nothing heavy is imported before it is needed: the counters are
read first (they contain this message's download), and a request for counters alone never imports torch.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from google.protobuf.message import DecodeError

from adapters.durable import write_durably
from adapters.records import pack, unpack
from client_app.settings import Settings, read_settings
from client_app.wire import read_fleet_wire
from proto.fedalloy.v1 import plan_pb2, report_pb2

if TYPE_CHECKING:
    from client_app.data import ClientData
    from client_app.model import PersonalModel

app = ClientApp()


@app.query("register")
def register(message: Message, context: Context) -> Message:
    """Say who this client is, what its adapters look like, and how many examples it has."""
    wire = read_fleet_wire()
    settings = read_settings(context)
    remembered = settings.state_dir / ".cache" / f"registration-{_identity(settings)}.pb"
    registration = report_pb2.Registration()
    try:
        registration.ParseFromString(remembered.read_bytes())
    except (OSError, DecodeError):
        registration = _registration(settings)
        write_durably(remembered, registration.SerializeToString())
    registration.wire.CopyFrom(wire)
    return Message(pack("registration", registration), reply_to=message)


@app.train("plan")
def plan(message: Message, context: Context) -> Message:
    """Carry out a plan; all changes to slots become visible together, or none."""
    wire = read_fleet_wire()
    settings = read_settings(context)
    request, blobs = unpack(message.content, "plan", plan_pb2.Plan)
    model, data = _load(settings)

    from client_app.interpreter import Interpreter
    from client_app.slots import SlotStore

    directory = settings.run_directory(request.run_name)
    store = SlotStore(directory, model.base.name, lambda: model.heads)
    with store.transaction(request.round) as slots:
        report, uploads = Interpreter(settings.client_id, model, data, slots).run(request, blobs)
    report.wire.CopyFrom(wire)
    return Message(pack("report", report, uploads), reply_to=message)


@app.query("counters")
def counters(message: Message, context: Context) -> Message:
    """Only read the counters: the last reply of a run is contained in them."""
    reading = report_pb2.Counters(version=1, client_id=read_settings(context).client_id, wire=read_fleet_wire())
    return Message(pack("counters", reading), reply_to=message)


def _registration(settings: Settings) -> report_pb2.Registration:
    model, data = _load(settings)
    examples = {name: len(split) for name, split in data.splits.items()}
    return report_pb2.Registration(
        version=1,
        client_id=settings.client_id,
        base_model=model.base.name,
        layout=model.layout.to_proto(),
        tasks=[report_pb2.Task(name=data.task, kind=data.kind, examples=examples)],
        device=str(model.device),
    )


def _identity(settings: Settings) -> str:
    """What a registration depends on: this client's settings, this version of the app, and the libraries.

    A client that registers again, for the next run, need not load its model to say the same thing; that would cost it
    seconds of imports.
    """
    versions = [version(name) for name in ("torch", "transformers", "peft", "scikit-learn")]
    app_folder = Path(__file__).resolve().parent.parent  # Flower unpacks every version of the app elsewhere
    sources = sorted((str(path), path.stat().st_mtime_ns) for path in app_folder.glob("client_app/**/*.py"))
    return hashlib.sha256(repr((settings, versions, sources)).encode()).hexdigest()[:32]


def _load(settings: Settings) -> tuple[PersonalModel, ClientData]:
    from client_app.model import PersonalModel
    from client_app.scenarios import load_scenario
    from client_app.training import set_up_torch

    device = set_up_torch()
    base, data = load_scenario(
        settings.scenario, settings.partition_id, settings.num_partitions, settings.seed, settings.state_dir / ".cache"
    )
    model = PersonalModel(base, settings.rank, settings.alpha, settings.dropout)
    model.module.to(device)
    return model, data
