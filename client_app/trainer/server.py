"""The resident trainer: one process per client that holds the base model and the data between messages.

It is started by the first ClientApp that needs it (``client_app.trainer.client``), in a session of its own, and speaks
``fedalloy.v1.TrainerService`` on a Unix-domain socket. The main thread carries out one job after the other; gRPC's
threads only hand jobs over and pass on what comes back. Trainers that share a GPU take turns, job by job. It ends when
it has been idle, when its owner has ended, when it is asked to retire, and after an error that may have broken more
than the plan (CUDA's for example). The next ClientApp that needs it starts a new one. It may be killed at any moment,
because slots change all together or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from client_app.guard.disclosure import MAX_LOGGED, told
from client_app.plan.progress import Cancelled, listening, tick
from client_app.processors import threads_for
from client_app.settings import read_settings
from client_app.trainer.address import Owner, Residence, code_digest, inode_of
from client_app.trainer.calls import NO_LIMIT, in_pieces
from client_app.trainer.client import context_of
from fedalloy_adapters.files.atomic_files import private_mask
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import trainer_pb2
from proto.fedalloy.v1.trainer_pb2_grpc import TrainerServiceServicer, add_TrainerServiceServicer_to_server

if TYPE_CHECKING:
    from client_app.session import Executor

PROGRESS_INTERVAL = 0.5
STARTUP_SECONDS = 60.0
"""How long a trainer waits for its first job."""


@dataclass
class PendingJob:
    """A job in progress: its request, its results, and whether somebody still waits for it."""

    job: trainer_pb2.Job
    blobs: dict[str, bytes]
    answers: queue.SimpleQueue[trainer_pb2.RunResponse | None] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    _activity: str = ""
    _said: float = 0.0

    def cancel(self) -> None:
        """Cancel the job: nobody waits for it any more."""
        self.cancelled.set()
        self.answers.put(None)

    def listen(self, activity: str, done: int, total: int) -> None:
        """Pass progress on: new work at once, progress within it now and then.

        Raises:
            Cancelled: nobody waits any more.
        """
        if self.cancelled.is_set():
            raise Cancelled("cancelled, or past its deadline")
        now = time.monotonic()
        if activity != self._activity or now - self._said >= PROGRESS_INTERVAL:
            self._activity, self._said = activity, now
            progress = trainer_pb2.Progress(activity=activity, done=done, total=total)
            self.answers.put(trainer_pb2.RunResponse(progress=progress))


class Trainer(TrainerServiceServicer):
    """The service, and the loop that does the work.

    Args:
        digest: that of the code that this process runs.
        folder: shared by this user's trainers, so that they take turns on a device; None: no other trainers.
    """

    tells_words = True
    """Whether an error's words go to the ClientApp: not where its code is not the owner's."""

    def __init__(self, digest: bytes, folder: Path | None = None) -> None:
        self.digest = digest
        self._folder = folder
        self._pending: queue.SimpleQueue[PendingJob | None] = queue.SimpleQueue()
        self._admission = threading.Lock()
        self._retiring = False
        self._idle_seconds = STARTUP_SECONDS
        self._executor: Executor | None = None

    def retire(self) -> None:
        """Accept no more jobs; end after those already accepted."""
        with self._admission:
            if not self._retiring:
                self._retiring = True
                self._pending.put(None)

    # gRPC's threads

    def Greet(self, request: trainer_pb2.GreetRequest, context: Any) -> trainer_pb2.GreetResponse:
        """See ``trainer.proto``."""
        return trainer_pb2.GreetResponse(pid=os.getpid(), code_digest=self.digest, retiring=self._retiring)

    def Retire(self, request: trainer_pb2.RetireRequest, context: Any) -> trainer_pb2.RetireResponse:
        """See ``trainer.proto``."""
        self.retire()
        return trainer_pb2.RetireResponse()

    def Run(
        self, request_iterator: Iterable[trainer_pb2.RunRequest], context: Any
    ) -> Iterator[trainer_pb2.RunResponse]:
        """See ``trainer.proto``."""
        pending = self.receive(request_iterator, context)
        with self._admission:
            if self._retiring:
                context.abort(grpc.StatusCode.UNAVAILABLE, "this trainer retires")
            self._pending.put(pending)
        if not context.add_callback(pending.cancel):
            pending.cancel()
        yield trainer_pb2.RunResponse(progress=trainer_pb2.Progress(activity="accepted"))
        while (answer := pending.answers.get()) is not None:
            yield answer

    def receive(self, requests: Iterable[trainer_pb2.RunRequest], context: Any) -> PendingJob:
        """The job and its blobs."""
        job = trainer_pb2.Job()
        pieces: dict[str, list[bytes]] = {}
        for request in requests:
            if request.WhichOneof("part") == "job":
                job = request.job
            else:
                pieces.setdefault(request.chunk.slot, []).append(request.chunk.data)
        return PendingJob(job, {slot: b"".join(found) for slot, found in pieces.items()})

    # The main thread

    def work(self) -> None:
        """Carry out jobs until there is a reason to end."""
        while True:
            try:
                pending = self._pending.get(timeout=self._idle_seconds)
            except queue.Empty:
                if self._close_the_door():
                    return
                continue
            if pending is None:
                return
            self._idle_seconds = pending.job.idle_seconds
            if not self._carry_out(pending):
                self.retire()
                return
            del pending  # frees its blobs, too

    def _carry_out(self, pending: PendingJob) -> bool:
        """Carry out a job; returns whether this process can be trusted with another one."""
        if pending.cancelled.is_set():
            return True
        sound = True
        try:
            with listening(pending.listen), turn(self._folder, self._accelerator()):
                for answer in self._outcome(pending):
                    pending.answers.put(answer)
        except Exception as error:
            sound = _is_sound(error)
            if not isinstance(error, Cancelled):
                traceback.print_exc()
            failure = trainer_pb2.Failure(error=type(error).__name__, message=told(error))
            failure.words = one_line(error, MAX_LOGGED) if self.tells_words else ""
            pending.answers.put(trainer_pb2.RunResponse(failure=failure))
        pending.answers.put(None)
        return sound

    def _accelerator(self) -> str:
        from client_app.plan.training import accelerator  # imports torch

        return accelerator()

    def _outcome(self, pending: PendingJob) -> Iterator[trainer_pb2.RunResponse]:
        if self._executor is None:
            from client_app.session import Executor  # seconds of imports

            self._executor = Executor()
        settings = read_settings(context_of(pending.job))
        threads = threads_for(settings.torch_threads, settings.state_dir)
        settings = replace(settings, torch_threads=threads)
        if pending.job.WhichOneof("kind") == "register":
            yield trainer_pb2.RunResponse(registration=self._executor.register(settings))
            return
        report, uploads = self._executor.carry_out(settings, pending.job.plan, pending.blobs)
        for chunk in in_pieces(uploads):
            yield trainer_pb2.RunResponse(chunk=chunk)
        yield trainer_pb2.RunResponse(report=report)

    def _close_the_door(self) -> bool:
        """Take no more jobs because the trainer is idle, unless one has just come."""
        with self._admission:
            self._retiring = self._pending.empty()
            return self._retiring


@contextlib.contextmanager
def turn(folder: Path | None, device: str) -> Iterator[None]:
    """Let only one job at a time run on a device, across all trainers; the lock ends with its process.

    Raises:
        Cancelled: nobody waits for this job any more.
    """
    if folder is None or not device:
        yield
        return
    with (folder / f"{device}.device").open("ab") as file:
        while True:
            tick("waiting for the device")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def _is_sound(error: Exception) -> bool:
    """Whether an error concerns the plan alone. Memory and CUDA errors leave a process that may fail again."""
    from client_app.plan.training import TrainingError

    return isinstance(error, ValueError | OSError | Cancelled | TrainingError)


# ------------------------------------------------------------------------------------------------------- the process


def main(arguments: list[str] | None = None) -> None:
    """Serve one owner's client until there is a reason to end."""
    parser = argparse.ArgumentParser(description="FedAlloy's resident trainer; ClientApps start it.")
    parser.add_argument("--owner", type=Owner.parse, required=True, help="process id and start tick")
    parser.add_argument("--lock", type=int, required=True, help="descriptor of the locked lock file")
    given = parser.parse_args(arguments)
    os.set_inheritable(given.lock, False)  # held until this process ends, and not passed on
    private_mask()
    residence = Residence.of(given.owner)
    residence.sweep()
    residence.socket.unlink(missing_ok=True)  # left by a killed trainer, because this one holds the lock
    trainer = Trainer(code_digest(), residence.folder)
    server = private_server(trainer, residence.socket)
    server.start()
    inode = inode_of(residence.socket)
    threading.Thread(target=_watch, args=(trainer, residence, inode), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(residence, inode))
    _say(f"trainer {os.getpid()} of process {given.owner.pid} is up")
    trainer.work()
    server.stop(grace=10).wait()  # the last answer may still be on its way
    _leave(residence, inode)


def private_server(trainer: TrainerServiceServicer, path: Path) -> grpc.Server:
    """A server at a socket that only this user can open; not started yet."""
    server = grpc.server(ThreadPoolExecutor(max_workers=8), options=NO_LIMIT)
    add_TrainerServiceServicer_to_server(trainer, server)  # type: ignore[no-untyped-call]
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(before)
    return server


def _watch(trainer: Trainer, residence: Residence, inode: int) -> None:
    """End this process at once when its owner has ended; let it retire when nobody can find its socket any more."""
    descriptor = -1
    with contextlib.suppress(OSError, AttributeError):  # Linux before 5.3, or the owner has ended already
        descriptor = os.pidfd_open(residence.owner.pid)
    while residence.owner.lives:
        if inode_of(residence.socket) != inode:
            _say("the socket has gone")
            trainer.retire()
            inode = inode_of(residence.socket)
        if descriptor >= 0:
            select.select([descriptor], [], [], 2.0)
        else:
            time.sleep(0.5)
    _say("the owner has gone")
    _leave(residence, inode)


def _leave(residence: Residence, inode: int) -> None:
    """End now. Whatever runs is abandoned; the kernel takes memory, GPU memory and the lock back."""
    if inode_of(residence.socket) == inode:
        residence.socket.unlink(missing_ok=True)
    if not residence.owner.lives:
        residence.sweep()
    sys.stderr.flush()
    os._exit(0)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
