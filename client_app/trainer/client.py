"""The ClientApp's side of the resident trainer: find it or start it, hand it one job, take its answer.

Nothing here imports torch. The ClientApp that holds the residence's lock may start a trainer, and passes the lock's
descriptor on to it. So there is never a second trainer, however many ClientApps race or are killed. If a trainer ends
during a job, it is replaced and the job is repeated once: slots change all together or not at all, and a repeated round
starts from the slots before it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from logging import INFO
from pathlib import Path

import grpc
from flwr.app import Context, RecordDict
from flwr.common.logger import log

from client_app.settings import default_state_dir
from client_app.trainer.address import Owner, Residence, code_digest, inode_of
from client_app.trainer.calls import (
    NO_LIMIT,
    JobFailedError,
    Listener,
    LostError,
    Outcome,
    ProgressLog,
    TrainerError,
    ask,
    listens,
    read_scalars,
    requests_of,
    write_scalars,
)
from fedalloy_adapters.files.atomic_files import open_private, private_folder
from proto.fedalloy.v1 import plan_pb2, report_pb2, trainer_pb2
from proto.fedalloy.v1.trainer_pb2_grpc import TrainerServiceStub

LOOK_SECONDS = 0.02
GREETING_SECONDS = 10.0
MAX_LOG_BYTES = 2**20
__all__ = ["JobFailedError", "TrainerClient", "context_of", "log_path"]


class TrainerClient:
    """One ClientApp's way to the trainer of an owner.

    Args:
        owner: whose trainer.
        timeout: seconds for everything that this object does.
        listen: gets the activity and its progress; the default writes to Flower's log now and then.
    """

    def __init__(self, owner: Owner, timeout: float, listen: Listener | None = None) -> None:
        self.residence = Residence.of(owner)
        self.listen = listen or ProgressLog()
        self.deadline = time.monotonic() + timeout

    def register(self, context: Context, idle_seconds: float) -> report_pb2.Registration:
        """See :meth:`client_app.session.Executor.register`.

        Raises:
            TrainerError: there is no trainer, or it ended twice, or too late.
            JobFailedError: it could not do it.
        """
        job = _job(context, idle_seconds)
        job.register.SetInParent()
        registration = self._run(job, {}).registration
        assert registration is not None
        return registration

    def carry_out(
        self, context: Context, idle_seconds: float, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]
    ) -> tuple[report_pb2.Report, Mapping[str, bytes]]:
        """See :meth:`client_app.session.Executor.carry_out`; errors as for :meth:`register`."""
        job = _job(context, idle_seconds)
        job.plan.CopyFrom(plan)
        outcome = self._run(job, blobs)
        assert outcome.report is not None
        return outcome.report, outcome.uploads

    def _run(self, job: trainer_pb2.Job, blobs: Mapping[str, bytes]) -> Outcome:
        lost = 0
        while True:
            with self.connect() as (stub, pid):
                try:
                    return self._ask(stub, job, blobs)
                except LostError as error:
                    lost += error.accepted
                    if lost == 2:
                        raise TrainerError(
                            f"the trainer (process {pid}) ended while it carried out {_name(job)}, and so did the one "
                            f"before it; out of memory? See {log_path()} ({error})"
                        ) from None
                    if error.accepted:
                        log(INFO, "the trainer (process %d) ended during %s; once more", pid, _name(job))

    def _ask(self, stub: TrainerServiceStub, job: trainer_pb2.Job, blobs: Mapping[str, bytes]) -> Outcome:
        requests = requests_of(job, blobs)
        return ask(stub, requests, self._left(), _name(job), self.listen, log_path())

    @contextmanager
    def connect(self) -> Iterator[tuple[TrainerServiceStub, int]]:
        """A trainer that runs this code, and its process id; starts it if needed, and retires an older one.

        Raises:
            TrainerError: it did not start, or not in time.
        """
        child: subprocess.Popen[bytes] | None = None
        asked_to_retire = 0
        while True:
            if listens(self.residence.socket):
                with grpc.insecure_channel(f"unix:{self.residence.socket}", options=NO_LIMIT) as channel:
                    stub = TrainerServiceStub(channel)  # type: ignore[no-untyped-call]
                    greeting = self._greet(stub)
                    if greeting is not None and greeting.code_digest == code_digest() and not greeting.retiring:
                        yield stub, greeting.pid
                        return
                    if greeting is not None and not greeting.retiring and greeting.pid != asked_to_retire:
                        log(INFO, "the trainer (process %d) runs other code and retires", greeting.pid)
                        with suppress(grpc.RpcError):
                            stub.Retire(trainer_pb2.RetireRequest(), timeout=self._left(GREETING_SECONDS))
                        asked_to_retire = greeting.pid
            elif child is None or child.poll() is not None:
                if child is not None and child.pid == asked_to_retire:
                    raise TrainerError("the files of the app changed while this process was running; try again")
                if child is not None:
                    raise TrainerError(f"the trainer ended as it started (status {child.returncode}); {_last_words()}")
                child = self._start_alone()
            self._left()
            time.sleep(LOOK_SECONDS)

    def _greet(self, stub: TrainerServiceStub) -> trainer_pb2.GreetResponse | None:
        try:
            greeting: trainer_pb2.GreetResponse = stub.Greet(
                trainer_pb2.GreetRequest(), timeout=self._left(GREETING_SECONDS)
            )
            return greeting
        except grpc.RpcError:
            return None  # it has just ended, or it hangs: the lock decides whether another may start

    def _start_alone(self) -> subprocess.Popen[bytes] | None:
        """Start a trainer, unless one lives or is being started."""
        descriptor = os.open(self.residence.lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        else:
            if inode_of(self.residence.lock) != os.fstat(descriptor).st_ino:
                return None  # removed in between; somebody may hold the lock of a new file
            return _start(self.residence.owner, descriptor)
        finally:
            os.close(descriptor)

    def _left(self, at_most: float = float("inf")) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TrainerError(f"the trainer was not ready in time; {_last_words()}")
        return min(left, at_most)


def log_path() -> Path:
    """The file for the trainer's output."""
    return default_state_dir() / "trainer.log"


def context_of(job: trainer_pb2.Job) -> Context:
    """Flower's context as the ClientApp got it."""
    return Context(
        run_id=job.run_id,
        node_id=job.node_id,
        node_config=read_scalars(job.node_config),
        state=RecordDict(),
        run_config=read_scalars(job.run_config),
    )


def _job(context: Context, idle_seconds: float) -> trainer_pb2.Job:
    job = trainer_pb2.Job(run_id=context.run_id, node_id=context.node_id, idle_seconds=idle_seconds)
    write_scalars(job.node_config, context.node_config)
    write_scalars(job.run_config, context.run_config)
    return job


def _name(job: trainer_pb2.Job) -> str:
    if job.WhichOneof("kind") == "register":
        return "the registration"
    return f"the plan of client {job.plan.client_id!r} for round {job.plan.round} of run {job.plan.run_name!r}"


def _start(owner: Owner, lock: int) -> subprocess.Popen[bytes]:
    """Start a trainer in its own session, so that it does not end with Flower's processes; it inherits the lock."""
    output = log_path()
    try:
        private_folder(output.parent)
        if output.exists() and output.stat().st_size > MAX_LOG_BYTES:
            output.replace(output.with_suffix(".log.1"))
        file = open(open_private(output, os.O_WRONLY | os.O_APPEND), "ab")  # noqa: SIM115
    except OSError as error:
        raise TrainerError(
            f"the trainer's log {output} cannot be written ({error.strerror}); set FLWR_HOME to a folder of this "
            "SuperNode's own"
        ) from None
    # -P and PYTHONPATH: the same modules as here, whatever is in the working directory.
    command = [sys.executable, "-P", "-m", "client_app.trainer.server", "--owner", str(owner), "--lock", str(lock)]
    with file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            pass_fds=(lock,),
            start_new_session=True,
        )


def _last_words() -> str:
    try:
        lines = log_path().read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return f"see {log_path()}" + (f", which ends: {lines[-1]}" if lines else "")
