"""The address of a client's resident trainer: its owner, its socket, its lock, and the code that it runs.

A trainer belongs to one SuperNode (its *owner*) and ends with it. ``<temporary folder>/fedalloy-<uid>/`` (mode 0700)
holds, for an owner with process id P of process namespace N (containers may share the folder) that started at kernel
tick T::

    N-P-T.sock    the socket, mode 0600
    N-P-T.lock    locked (flock) by whoever starts the trainer, and by the trainer as long as it lives

The path is short because a Unix-domain socket's path may have at most 107 bytes. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flwr.app import Context

from client_app.settings import SettingsError, TrainerSettings
from client_app.sockets import WireError, ancestors
from client_app.trainer.calls import TrainerError

__all__ = ["Owner", "Residence", "TrainerError", "code_digest", "find_owner", "inode_of", "read_trainer_settings"]

MAX_SOCKET_PATH = 107
UNFIT = re.compile(r"[%?#,]")
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy", "flwr", "protobuf", "grpcio")
PACKAGES = ("proto", "fedalloy_adapters", "client_app")
MAX_IDLE = 1e6
"""Seconds; a thread cannot wait much longer than a century, and cannot wait for infinity."""


def read_trainer_settings(context: Context) -> TrainerSettings:
    """Trainer settings from Flower's context.

    Raises:
        SettingsError: a value has the wrong type or is not positive; names the key.
    """
    config = {**context.run_config, **context.node_config}
    resident = config.get("trainer.resident", True)
    if not isinstance(resident, bool):
        raise SettingsError(f"trainer.resident = {resident!r}, expected true or false")
    idle = config.get("trainer.idle-seconds", 300.0)
    if isinstance(idle, bool) or not isinstance(idle, int | float) or not 0 < idle <= MAX_IDLE:
        raise SettingsError(f"trainer.idle-seconds = {idle!r}, expected a positive number, at most {MAX_IDLE:g}")
    return TrainerSettings(resident, float(idle))


@dataclass(frozen=True)
class Owner:
    """The process that a trainer belongs to; its start time tells it from a later one with the same id."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Owner:
        """A live process.

        Raises:
            TrainerError: there is no such process, or no ``/proc``.
        """
        started = _start_tick(pid)
        if started is None:
            raise TrainerError(f"process {pid}, to which the trainer would belong, is not running")
        return cls(pid, started)

    @classmethod
    def parse(cls, text: str) -> Owner:
        """The inverse of ``str``.

        Raises:
            ValueError: the text has another form.
        """
        pid, _, started = text.partition("-")
        return cls(int(pid), int(started))

    def __str__(self) -> str:
        return f"{self.pid}-{self.started}"

    @property
    def lives(self) -> bool:
        """Whether the process still runs."""
        return _start_tick(self.pid) == self.started


def find_owner() -> Owner | None:
    """The SuperNode above this ClientApp, or its SuperExec if that was started separately (process isolation).

    None if there is neither: in Flower's simulation engine, a debugger, a test, or a system without ``/proc``. Nothing
    would end a trainer there.
    """
    executor = None
    try:
        for generation, (pid, arguments) in enumerate(ancestors()):
            names = {os.path.basename(argument) for argument in arguments[:3]}
            if "flower-supernode" in names:
                return Owner.of(pid)
            if "flower-superlink" in names:  # above a simulated client
                return None
            if generation == 0 and "flower-superexec" in names:
                executor = Owner.of(pid)
    except (WireError, TrainerError):
        return None
    return executor


@dataclass(frozen=True)
class Residence:
    """The files of an owner's trainer."""

    owner: Owner
    folder: Path

    @classmethod
    def of(cls, owner: Owner) -> Residence:
        """The residence of an owner; its folder is made if needed.

        Raises:
            TrainerError: the folder belongs to somebody else, or the path would be too long for a socket.
        """
        return cls(owner, _private_folder(len(f"/{_namespace()}-{owner}.sock")))

    @property
    def socket(self) -> Path:
        """The socket's path."""
        return self.folder / f"{_namespace()}-{self.owner}.sock"

    @property
    def lock(self) -> Path:
        """The lock file's path."""
        return self.folder / f"{_namespace()}-{self.owner}.lock"

    def sweep(self) -> None:
        """Remove what trainers of dead owners left when they were killed."""
        prefix = f"{_namespace()}-"
        for path in self.folder.glob(f"{prefix}*-*.*"):
            if not Owner.parse(path.stem.removeprefix(prefix)).lives:
                path.unlink(missing_ok=True)


def temporary_folders() -> list[str]:
    """Folders for sockets; all processes of this user take the first that works."""
    return list(dict.fromkeys((tempfile.gettempdir(), "/tmp")))


@cache
def code_digest() -> bytes:
    """32 bytes that change with the app's code, the relevant libraries, and the Python that runs them."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256(repr((sys.version, sys.executable, str(root))).encode())
    for name in LIBRARIES:
        try:
            digest.update(f"{name} {version(name)}\n".encode())
        except PackageNotFoundError:
            digest.update(f"{name} is missing\n".encode())
    digest.update(bytes.fromhex(source_digest()))
    return digest.digest()


@cache
def source_digest(packages: tuple[str, ...] = PACKAGES) -> str:
    """SHA-256 of the app's source files, wherever they are."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def inode_of(path: Path) -> int:
    """The inode of the file that is there now; -1 if there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return -1


@cache
def _namespace() -> int:
    """Process ids and start ticks mean something only inside their namespace."""
    return os.stat("/proc/self/ns/pid").st_ino


def _start_tick(pid: int) -> int | None:
    """When a process started, in kernel ticks since boot; None if it does not run (a zombie does not)."""
    try:
        # The second field is the name in parentheses and may contain anything, so count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _private_folder(name_length: int) -> Path:
    """A folder for sockets that only this user may enter."""
    name = f"fedalloy-{os.geteuid()}"
    tried = []
    for parent in temporary_folders():
        folder = Path(parent) / name
        if strange := UNFIT.findall(str(folder)):
            tried.append(f"{folder}: gRPC takes {strange[0]!r} for a part of an address, not of a path")
            continue
        length = len(os.fsencode(folder)) + name_length
        if length > MAX_SOCKET_PATH:
            tried.append(f"{folder}: {length} bytes with the socket's name, expected at most {MAX_SOCKET_PATH}")
            continue
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
            continue
        # Everybody can write to /tmp: somebody else may have made this folder, or a link of this name, first.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            tried.append(
                f"{folder}: expected a folder of user {os.geteuid()} with mode 700, found "
                f"{stat.filemode(found.st_mode)} of user {found.st_uid}"
            )
            continue
        return folder
    raise TrainerError(f"no folder for the trainer's socket. {'; '.join(tried)}")
