"""Sends one job over a trainer's socket and reads the answer. It knows no settings and imports no torch."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from logging import INFO
from pathlib import Path
from typing import Any

import grpc
from flwr.common.logger import log

from client_app.guard.disclosure import UNTOLD
from proto.fedalloy.v1 import report_pb2, trainer_pb2
from proto.fedalloy.v1.trainer_pb2_grpc import TrainerServiceStub

NO_LIMIT = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
"""gRPC's own limit is 4 MiB; plans and reports may be larger, and blobs travel in pieces anyway."""
CHUNK_BYTES = 2**21
SAY_SECONDS = 15.0


class TrainerError(RuntimeError):
    """The trainer cannot be reached or started, or it ended while it carried out a plan, twice."""


class JobFailedError(RuntimeError):
    """A job ended with an error in the trainer; the message is for this machine, ``told`` the part that may leave.

    ``told_class`` is the class of the trainer's error.

    Args:
        failure: the trainer's.
        where: the place of the traceback, for people on this machine.
    """

    def __init__(self, failure: trainer_pb2.Failure, where: object = "") -> None:
        said = f"{failure.error}: {failure.words}" if failure.words else failure.message
        super().__init__(f"{said} (log: {where})" if where else said)
        self.told_class = failure.error
        self.told = failure.message.removeprefix(failure.error).removeprefix(": ").removeprefix(f" {UNTOLD}")


class LostError(RuntimeError):
    """The trainer ended, or turned the job away; ``accepted`` if it had begun."""

    def __init__(self, accepted: bool, reason: str) -> None:
        super().__init__(reason)
        self.accepted = accepted


Listener = Callable[[str, trainer_pb2.Progress], None]


class ProgressLog:
    """Progress in Flower's log, which is the SuperNode's output."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, job: str, progress: trainer_pb2.Progress) -> None:
        """Log a line every few seconds."""
        if time.monotonic() - self.said > SAY_SECONDS:
            self.said = time.monotonic()
            log(INFO, "%s: %s %d/%d", job, progress.activity, progress.done, progress.total)


@dataclass(frozen=True)
class Outcome:
    """A job's result: a registration, or a report with its uploads."""

    registration: report_pb2.Registration | None
    report: report_pb2.Report | None
    uploads: Mapping[str, bytes]


def ask(
    stub: TrainerServiceStub,
    requests: Iterable[trainer_pb2.RunRequest],
    timeout: float,
    name: str,
    listen: Listener,
    where: object = "",
) -> Outcome:
    """Hand over a job and take its answer.

    Args:
        stub: the trainer's stub.
        requests: the job and its blobs.
        timeout: seconds.
        name: the job's name for messages.
        listen: gets the progress.
        where: the place of the trainer's log.

    Raises:
        JobFailedError: it could not be done.
        LostError: the trainer ended.
        TrainerError: it took longer than ``timeout``.
    """
    accepted = False
    pieces: dict[str, list[bytes]] = {}
    try:
        for answer in stub.Run(iter(requests), timeout=timeout):
            accepted = True
            part = answer.WhichOneof("part")
            if part == "chunk":
                pieces.setdefault(answer.chunk.slot, []).append(answer.chunk.data)
            elif part == "registration":
                return Outcome(answer.registration, None, {})
            elif part == "report":
                return Outcome(None, answer.report, {slot: b"".join(found) for slot, found in pieces.items()})
            elif part == "failure":
                raise JobFailedError(answer.failure, where)
            elif part == "progress":
                listen(name, answer.progress)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TrainerError(f"{name} took longer than the message's lifetime and was given up") from None
        raise LostError(accepted, f"{error.code().name}: {error.details()}") from None
    raise LostError(accepted, "the trainer ended the call without an outcome")


def requests_of(job: trainer_pb2.Job, blobs: Mapping[str, bytes]) -> Iterator[trainer_pb2.RunRequest]:
    """A job and its blobs in the form in which they are sent."""
    yield trainer_pb2.RunRequest(job=job)
    for chunk in in_pieces(blobs):
        yield trainer_pb2.RunRequest(chunk=chunk)


def in_pieces(blobs: Mapping[str, bytes]) -> Iterator[trainer_pb2.Chunk]:
    """Blobs in pieces that gRPC accepts."""
    for slot, blob in blobs.items():
        for start in range(0, max(len(blob), 1), CHUNK_BYTES):
            yield trainer_pb2.Chunk(slot=slot, data=blob[start : start + CHUNK_BYTES])


def write_scalars(target: Any, config: Mapping[str, Any]) -> None:
    """Put a config into a map of ``Scalar``."""
    for key, value in config.items():
        scalar = target[key]
        if isinstance(value, bool):
            scalar.truth = value
        elif isinstance(value, int):
            scalar.integer = value
        elif isinstance(value, float):
            scalar.number = value
        else:
            scalar.text = str(value)


def read_scalars(scalars: Mapping[str, trainer_pb2.Scalar]) -> dict[str, Any]:
    """The inverse of :func:`write_scalars`."""
    return {key: getattr(scalar, scalar.WhichOneof("value") or "text") for key, scalar in scalars.items()}


def listens(path: Path) -> bool:
    """Whether a process accepts connections there; it does not wait as long as gRPC would."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
