"""The ClientApp at a site whose owner runs the trainer as a service: it passes on requests and answers.

It has no data, no settings and no slots. It adds the counters of the Fleet connection, which the owner's service cannot
see.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from logging import ERROR, INFO
from pathlib import Path

import grpc
from flwr.app import Context, Message
from flwr.common.logger import log

from client_app.guard.disclosure import told
from client_app.sockets import read_fleet_wire
from client_app.trainer.calls import (
    NO_LIMIT,
    JobFailedError,
    LostError,
    Outcome,
    ProgressLog,
    TrainerError,
    ask,
    listens,
    requests_of,
    write_scalars,
)
from fedalloy_adapters.wire.flower_records import bytes_in, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2, trainer_pb2
from proto.fedalloy.v1.trainer_pb2_grpc import TrainerServiceStub

VERSION = 1
"""Version of the protocol between a relay and a site's own service: proto/README.md, section 11.1."""
GREETING_SECONDS = 10.0
RETURN_SECONDS = 60.0
"""How long a supervisor may take to start a service again after it has ended."""
LOOK_SECONDS = 0.2


class SiteError(RuntimeError):
    """The site's service is not reachable, speaks another version, refuses, or failed."""


def register(message: Message, context: Context) -> Message:
    """Ask the site's service who it is."""
    wire = read_fleet_wire()
    job = trainer_pb2.SiteJob(register=bytes_in(message.content, "request"))
    registration = _handed_on(message, context, job, {}, "the registration").registration
    if registration is None:
        raise SiteError("the site's service answered with something other than a registration")
    registration.wire.CopyFrom(wire)
    return Message(pack("registration", registration), reply_to=message)


def plan(message: Message, context: Context) -> Message:
    """Hand a plan on."""
    wire = read_fleet_wire()
    job = trainer_pb2.SiteJob(plan=bytes_in(message.content, "plan"))
    request, blobs = unpack(message.content, "plan", plan_pb2.Plan)
    outcome = _handed_on(message, context, job, blobs, "the plan")
    if outcome.report is None:
        raise SiteError("the site's service answered with something other than a report")
    outcome.report.wire.CopyFrom(wire)
    return Message(pack("report", outcome.report, outcome.uploads, beside=request.reads_beside), reply_to=message)


def counters(message: Message, context: Context) -> Message:
    """The counters, which are read in this process."""
    client = str(context.node_config.get("client-id", f"node-{context.node_id}"))
    reading = report_pb2.Counters(version=1, client_id=client, wire=read_fleet_wire())
    return Message(pack("counters", reading), reply_to=message)


def _handed_on(
    message: Message, context: Context, asked: trainer_pb2.SiteJob, blobs: Mapping[str, bytes], name: str
) -> Outcome:
    """The service's answer; if it ends during the job, the job is handed on once more.

    Raises:
        SiteError: the service refuses, or there is no service.
    """
    asked.version = VERSION
    asked.signature = bytes_in(message.content, "signature")
    job = trainer_pb2.Job(run_id=context.run_id, node_id=context.node_id, site=asked)
    write_scalars(job.run_config, context.run_config)
    path = Path(str(context.node_config["site-socket"]))
    ends = time.monotonic() + message.metadata.ttl
    lost = 0
    while True:
        _wait_for(path, min(ends, time.monotonic() + RETURN_SECONDS))
        with grpc.insecure_channel(f"unix:{path}", options=NO_LIMIT) as channel:
            stub = TrainerServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                _require_version(stub)
                left = max(ends - time.monotonic(), 0.1)
                return ask(stub, requests_of(job, blobs), left, name, ProgressLog())
            except JobFailedError as error:
                log(ERROR, "the site's service: %s", told(error))
                raise SiteError(told(error)) from None
            except TrainerError as error:
                raise SiteError(str(error)) from None
            except LostError as error:
                lost += 1
                if lost == 2:
                    raise SiteError(f"the site's service ended during {name}, twice ({error})") from None
                log(INFO, "the site's service ended during %s; once more", name)


def _wait_for(path: Path, ends: float) -> None:
    while not listens(path):
        if time.monotonic() > ends:
            raise SiteError(f"nobody listens at {path} (site-socket); expected `fedalloy site serve` there")
        time.sleep(LOOK_SECONDS)


def _require_version(stub: TrainerServiceStub) -> None:
    try:
        greeting = stub.Greet(trainer_pb2.GreetRequest(), timeout=GREETING_SECONDS)
    except grpc.RpcError as error:
        raise LostError(False, f"{error.code().name}: {error.details()}") from None
    if greeting.version != VERSION:
        raise SiteError(
            f"the site's service speaks version {greeting.version}, the run's app {VERSION}; one of them must be "
            "updated"
        )
