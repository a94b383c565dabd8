"""The ClientApp if the run brings the code that works on the data: it registers, runs plans, and reads counters.

Flower starts a fresh process for every message, so this one stays thin: it reads the counters (first, when they contain
just this message's download) and leaves the work to the client's resident trainer. Without one (``trainer.resident =
false``, Flower's simulation engine, a debugger) the same executor does the same work in this process.
"""

from __future__ import annotations

from logging import DEBUG
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.common.logger import log

from client_app.guard.disclosure import private_errors
from client_app.settings import read_settings
from client_app.sockets import read_fleet_wire
from client_app.trainer.address import find_owner, read_trainer_settings
from fedalloy_adapters.wire.flower_records import pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2

if TYPE_CHECKING:
    from client_app.trainer.client import TrainerClient


@private_errors
def register(message: Message, context: Context) -> Message:
    """Say who this client is, what its adapters look like, and how many examples it has."""
    wire = read_fleet_wire()
    settings = read_settings(context)
    trainer = _trainer(message, context)
    if trainer is not None:
        registration = trainer.register(context, read_trainer_settings(context).idle_seconds)
    else:
        from client_app.session import Executor

        registration = Executor().register(settings)
    registration.wire.CopyFrom(wire)
    return Message(pack("registration", registration), reply_to=message)


@private_errors
def plan(message: Message, context: Context) -> Message:
    """Carry out a plan; all changes to slots become visible together, or none."""
    wire = read_fleet_wire()
    settings = read_settings(context)
    request, blobs = unpack(message.content, "plan", plan_pb2.Plan)
    trainer = _trainer(message, context)
    if trainer is not None:
        idle_seconds = read_trainer_settings(context).idle_seconds
        report, uploads = trainer.carry_out(context, idle_seconds, request, blobs)
    else:
        from client_app.session import Executor

        report, uploads = Executor().carry_out(settings, request, blobs)
    report.wire.CopyFrom(wire)
    return Message(pack("report", report, uploads, beside=request.reads_beside), reply_to=message)


@private_errors
def counters(message: Message, context: Context) -> Message:
    """Only read the counters: the last reply of a run is contained in them."""
    reading = report_pb2.Counters(version=1, client_id=read_settings(context).client_id, wire=read_fleet_wire())
    return Message(pack("counters", reading), reply_to=message)


def _trainer(message: Message, context: Context) -> TrainerClient | None:
    """The way to this client's resident trainer; None if this process should do the work."""
    if not read_trainer_settings(context).resident:
        return None
    owner = find_owner()
    if owner is None:
        log(DEBUG, "no SuperNode above this process: working in it, without a resident trainer")
        return None
    from client_app.trainer.client import TrainerClient

    return TrainerClient(owner, message.metadata.ttl)
