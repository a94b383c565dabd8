"""``fedalloy site serve``: the trainer as the owner's own service, alone with the data.

The owner starts it from the installed package, and it keeps running: no run brings code to it or ends it. Relays
(:mod:`client_app.trainer.relay`) pass it what came over the network. Only ``site.toml`` decides what it does.
"""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from client_app.guard.disclosure import told
from client_app.guard.record import Record
from client_app.settings import require_node_keys
from client_app.site.gate import VERSION, admit, settings_of
from client_app.site.site_file import Site, SiteFileError
from client_app.trainer.address import MAX_SOCKET_PATH, UNFIT, inode_of
from client_app.trainer.calls import in_pieces, listens
from client_app.trainer.server import PendingJob, Trainer, private_server
from fedalloy_adapters.files.atomic_files import locked, private_folder, private_mask
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import report_pb2, trainer_pb2

if TYPE_CHECKING:
    from client_app.session import Executor

BROKEN = 70
"""Exit status after an error that may have broken more than a plan; a supervisor then starts the service again."""


class SiteTrainer(Trainer):
    """A trainer that checks every job against the site's file, and that only its owner can end."""

    tells_words = False

    def __init__(self, site: Site) -> None:
        super().__init__(b"", None)
        self.site = site
        self.record = Record(site.state_dir, site.client_id)
        self._noted: set[tuple[str, ...]] = set()

    def Greet(self, request: trainer_pb2.GreetRequest, context: Any) -> trainer_pb2.GreetResponse:
        """See ``trainer.proto``."""
        return trainer_pb2.GreetResponse(pid=os.getpid(), version=VERSION)

    def Retire(self, request: trainer_pb2.RetireRequest, context: Any) -> trainer_pb2.RetireResponse:
        """Refuse: only the owner ends the service."""
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "a site's service ends when its owner ends it")
        raise AssertionError

    def receive(self, requests: Iterable[trainer_pb2.RunRequest], context: Any) -> PendingJob:
        """The job and its blobs, up to the owner's bound on a plan's blobs."""
        most = (self._bound_mb() or float("inf")) * 10**6
        return super().receive(_bounded(requests, most, context), context)

    def work(self) -> None:
        """Carry out jobs until the process ends."""
        while True:
            pending = self._pending.get()
            if pending is None:
                return
            if not self._carry_out(pending):
                return
            del pending

    def _carry_out(self, pending: PendingJob) -> bool:
        sound = super()._carry_out(pending)
        asked = pending.job.site.WhichOneof("asked") or "something else"
        say(f"{asked}; newest line of the record: {self.record.last()}")
        return sound

    def _outcome(self, pending: PendingJob) -> Iterator[trainer_pb2.RunResponse]:
        job = pending.job
        try:
            admitted = admit(self.site, job, pending.blobs)
        except Exception as error:
            kind = job.site.WhichOneof("asked") or "nothing"
            self.record.append("refused", **self._claimed(job), asked=kind, error=one_line(told(error), 500))
            raise
        if admitted.ignored:
            note = (admitted.run_name, *map(str, admitted.ignored.items()))
            if note not in self._noted:
                self._noted.add(note)
                self.record.append("ignored", run=admitted.run_name, values=dict(admitted.ignored))
        executor = self._executor_now()
        if admitted.plan is None:
            yield trainer_pb2.RunResponse(registration=executor.register(admitted.settings, admitted.run_name))
            return
        report, uploads = executor.carry_out(admitted.settings, admitted.plan, pending.blobs)
        for chunk in in_pieces(uploads):
            yield trainer_pb2.RunResponse(chunk=chunk)
        yield trainer_pb2.RunResponse(report=report)

    def _executor_now(self) -> Executor:
        if self._executor is None:
            from client_app.session import Executor

            self._executor = Executor(report_pb2.TRAINER_MODE_INSTALLED)
        return self._executor

    def _bound_mb(self) -> float:
        return float(self.site.client.get("client.max-download-mb", 4096.0))

    def _claimed(self, job: trainer_pb2.Job) -> dict[str, Any]:
        """The run that a refused job claimed to belong to."""
        from proto.fedalloy.v1 import plan_pb2

        kind = plan_pb2.Plan if job.site.WhichOneof("asked") == "plan" else plan_pb2.RegisterRequest
        words = job.site.plan or job.site.register
        with contextlib.suppress(Exception):
            return {"run": one_line(kind.FromString(words).run_name, 80)}
        return {"run": ""}


def _bounded(requests: Iterable[trainer_pb2.RunRequest], most: float, context: Any) -> Iterator[trainer_pb2.RunRequest]:
    size = 0
    for request in requests:
        size += len(request.chunk.data) + len(request.chunk.slot)
        if size > most:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than client.max-download-mb, {most / 10**6:g}")
        yield request


def serve(site: Site) -> None:
    """Serve until the process is ended.

    Raises:
        SiteFileError: the socket's path cannot be used, somebody listens there, or the file has unknown settings.
    """
    private_mask()
    _require_sound(site)
    private_folder(site.state_dir)
    with _alone(site):
        trainer = SiteTrainer(site)
        server = open_socket(trainer, site)
        inode = inode_of(site.socket)
        signal.signal(signal.SIGTERM, lambda number, frame: _end(site.socket, inode))
        signal.signal(signal.SIGINT, lambda number, frame: _end(site.socket, inode))
        servers = ", ".join(site.servers.values()) or "anybody who can open the socket"
        say(f"client {site.client_id!r} serves {', '.join(site.runs)} for {servers} at {site.socket}")
        say(f"its record: {trainer.record.path}")
        trainer.work()
        server.stop(grace=10).wait()
        site.socket.unlink(missing_ok=True)
    sys.exit(BROKEN)


def say(text: str) -> None:
    """Write a line to the service's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _require_sound(site: Site) -> None:
    """Check at the start what would otherwise fail at the first plan."""
    path = str(site.socket)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH or UNFIT.search(path):
        raise SiteFileError(f"socket = {path!r}, expected at most {MAX_SOCKET_PATH} bytes and none of % ? # ,")
    try:
        require_node_keys(site.client, str(site.path))
        settings_of(site, {})
    except ValueError as error:
        raise SiteFileError(f"{site.path}: {error}") from None


@contextlib.contextmanager
def _alone(site: Site) -> Iterator[None]:
    """Allow one service for each client: two would have separate budgets."""
    try:
        with locked(site.state_dir / f".{site.client_id}.service.lock", wait=False):
            yield
    except BlockingIOError:
        raise SiteFileError(f"{site.path}: a service of client {site.client_id!r} runs already") from None


def open_socket(trainer: SiteTrainer, site: Site) -> grpc.Server:
    """Open the socket to this user and the group that the file names."""
    path = site.socket
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode) or listens(path):
            raise SiteFileError(f"socket = {str(path)!r}: something else is there")
        path.unlink()  # left by a killed service, because this one holds the lock
    if not path.parent.is_dir():
        raise SiteFileError(f"socket = {str(path)!r}: there is no folder {path.parent}")
    server = private_server(trainer, path)
    if site.socket_group:
        _share(path, site.socket_group)
    server.start()
    return server


def _share(path: Path, group: str) -> None:
    try:
        number = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        os.chown(path, -1, number)
        path.chmod(0o660)
    except (KeyError, OSError) as error:
        raise SiteFileError(f"socket-group = {group!r} cannot have the socket: {error}") from None


def _end(path: Path, inode: int) -> None:
    if inode_of(path) == inode:
        path.unlink(missing_ok=True)
    sys.stderr.flush()
    os._exit(0)
