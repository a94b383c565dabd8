"""A run on disk: ``runs/<name>/{config.toml, rounds.jsonl, checkpoints/round-0005/, summary.json, ledger.sqlite}``.

Everything is valid after a kill at any moment: files are written, flushed and renamed; ``rounds.jsonl`` is appended to
line by line, and readers skip a line that a kill tore. A checkpoint names the digest of its numbers; a torn one is
skipped, too, and the one before it is used. ``registrations/`` has each client's registration, ``resume.toml`` the
run-config that continues the run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import BankError, FileRow, link
from fedalloy_adapters.files.atomic_files import locked, open_private, private_folder, sync, write_durably
from fedalloy_adapters.files.sealed_json import sealed, unsealed
from fedalloy_adapters.wire.codec import Encoding, encode
from strategies.framework.exchange import State

_CHECKPOINT = re.compile(r"round-(\d+)")
TRIES, TRY_SECONDS = 5, 0.05
RESUMABLE_PHASES = ("train", "deliver", "counters")
"""Phases whose records a resumed run writes again."""


@dataclass(frozen=True)
class Checkpoint:
    """A run on disk after a round: the strategy's state, and the JSON values that the loop needs to continue."""

    round: int
    state: State
    run: Mapping[str, Any]


class RunDirectoryError(RuntimeError):
    """A run directory cannot be created, written or read."""


class RunDirectory:
    """One run's folder.

    Raises:
        RunDirectoryError: the folder exists already, or cannot be written (full disk, read-only); says where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, runs_dir: Path, name: str, config: str) -> RunDirectory:
        """Make a new folder with its configuration. It appears all at once, so only one of two processes succeeds."""
        path = runs_dir / name
        staged = runs_dir / f".{name}-{secrets.token_hex(4)}"
        resume = f"resume = {toml_string(str(path.resolve()))}\n"
        without = "".join(f"{line}\n" for line in config.split("\n") if line and not line.startswith("resume ="))
        try:
            write_durably(staged / "resume.toml", (without + resume).encode())
            write_durably(staged / "config.toml", config.encode())
            os.rename(staged, path)  # replaces an empty folder only
            sync(runs_dir)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                held = "a run" if (path / "config.toml").exists() else "files that are not a run's"
                raise RunDirectoryError(
                    f"{path} already holds {held}; choose another run-name, or continue a run with resume"
                ) from None
            raise RunDirectoryError(_explain(path, error)) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The folder of a run.

        Raises:
            RunDirectoryError: there is no run.
        """
        if not (path / "config.toml").exists():
            raise RunDirectoryError(
                f"resume: {path} holds no run (no config.toml); name the folder of an unfinished one"
            )
        return cls(path)

    @property
    def finished(self) -> bool:
        """Whether the run has its summary, which is written last."""
        return (self.path / "summary.json").exists()

    def extend(self, rounds: int) -> None:
        """Give the run this many rounds, also in its configuration; it is then no longer finished."""
        try:
            for name in ("resume.toml", "config.toml"):
                lines = (self.path / name).read_text("utf-8").splitlines()
                kept = [line for line in lines if not line.startswith("num-server-rounds =")]
                text = "".join(f"{line}\n" for line in [*kept, f"num-server-rounds = {rounds}"])
                write_durably(self.path / name, text.encode())
            (self.path / "summary.json").unlink(missing_ok=True)
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error

    @property
    def how_to_resume(self) -> str:
        """The command with which a user continues the run."""
        return f"continue it with: flwr run . <connection> --run-config {self.path.resolve() / 'resume.toml'}"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder: no other process writes here meanwhile.

        Raises:
            RunDirectoryError: another process does, for example because the run to be resumed is still running.
        """
        with ExitStack() as stack:
            try:
                for _ in range(TRIES - 1):  # a process that tests the lock (fedalloy watch) holds it briefly
                    try:
                        stack.enter_context(locked(self.path / ".lock", wait=False))
                        break
                    except BlockingIOError:
                        time.sleep(TRY_SECONDS)
                else:
                    stack.enter_context(locked(self.path / ".lock", wait=False))
            except BlockingIOError:
                raise RunDirectoryError(
                    f"another process is carrying out the run in {self.path}; stop it first (flwr list, flwr stop)"
                ) from None
            except OSError as error:
                raise RunDirectoryError(_explain(self.path, error)) from error
            yield

    def run_key(self) -> bytes:
        """The key that proves to clients that a plan belongs to this run; drawn at its beginning, kept for resuming."""
        path = self.path / "run.key"
        try:
            if not path.exists():
                write_durably(path, secrets.token_bytes(32))
            return path.read_bytes()
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error

    def config(self) -> dict[str, Any]:
        """The run-config that the run was started with.

        Raises:
            RunDirectoryError: the file cannot be read.
        """
        try:
            return dict(dotted(tomllib.loads((self.path / "config.toml").read_text("utf-8"))))
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"cannot read {self.path / 'config.toml'}: {error}") from None

    def append_round(self, record: dict[str, Any]) -> None:
        """Append one line to ``rounds.jsonl`` and flush it to the disk."""
        line = json.dumps(record, sort_keys=False, allow_nan=False) + "\n"
        try:
            with open(open_private(self.path / "rounds.jsonl", os.O_RDWR | os.O_APPEND), "a+b") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a kill tore the last line; begin a new one
                        file.write(b"\n")
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error

    def rounds(self) -> list[dict[str, Any]]:
        """All valid records: torn lines are left out, and records that a resumed run has repeated appear once."""
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        records: list[dict[str, Any]] = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(record, dict) or not isinstance(record.get("phase"), str):
                continue
            if not isinstance(record.get("round"), int) or not isinstance(record.get("clients", {}), dict):
                continue
            if record.get("phase") == "resumed":
                given_up = record["round"]
                records = [old for old in records if old["phase"] not in RESUMABLE_PHASES or old["round"] <= given_up]
            records.append(record)
        return records

    def save_checkpoint(
        self, round_: int, state: State, keep: int, run: Mapping[str, Any] | None = None, pinned: int | None = None
    ) -> None:
        """The strategy's state after a round, as ``checkpoints/round-0005/``.

        All checkpoints except the last ``keep`` and that of the round ``pinned`` are removed.
        """
        folder = self.path / "checkpoints"
        final = folder / f"round-{round_:04d}"
        staged = folder / f".round-{round_:04d}-{os.getpid()}"
        try:
            for unfinished in folder.glob(".round-*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            private_folder(staged)
            rows = _link_rows(state.rows, staged / "rows")
            tensors = save({name: tensor.contiguous() for name, tensor in state.tensors.items()})
            digest = hashlib.sha256(tensors).hexdigest()
            written = {"round": round_, "values": state.values, "run": dict(run or {}), "sha256": digest}
            written |= {"rows": rows}
            write_durably(staged / "state.safetensors", tensors)
            write_durably(staged / "state.json", sealed(written))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(staged, final)
            sync(folder)
            for old in self._checkpoints()[:-keep]:
                if pinned is None or old.name != f"round-{pinned:04d}":
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error
        except BankError as error:
            raise RunDirectoryError(f"cannot write the run directory {self.path}: {error}") from error

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None; torn ones are skipped."""
        return self._first_whole(reversed(self._checkpoints()))

    def checkpoint(self, round_: int) -> Checkpoint | None:
        """The checkpoint after a round, or None if it is missing or torn."""
        return self._first_whole([self.path / "checkpoints" / f"round-{round_:04d}"])

    def _first_whole(self, folders: Iterable[Path]) -> Checkpoint | None:
        for folder in folders:
            try:
                saved = unsealed((folder / "state.json").read_text())
                data = (folder / "state.safetensors").read_bytes()
                if hashlib.sha256(data).hexdigest() != saved["sha256"]:
                    continue
                rows = _linked_rows(folder / "rows", saved.get("rows", {}))
                return Checkpoint(int(saved["round"]), State(load(data), saved["values"], rows), saved["run"])
            except (OSError, ValueError, KeyError, TypeError, SafetensorError, BankError):
                continue
        return None

    def _checkpoints(self) -> list[Path]:
        found = [
            (int(match.group(1)), path)
            for path in (self.path / "checkpoints").glob("round-*")
            if (match := _CHECKPOINT.fullmatch(path.name))
        ]
        return [path for _, path in sorted(found)]

    def save_registration(self, client_id: str, data: bytes) -> None:
        """Save a client's registration, so that a resumed run knows it before the client is back."""
        path = self.path / "registrations" / f"{client_id}.pb"
        try:
            if not path.exists() or path.read_bytes() != data:
                write_durably(path, data)
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error

    def registration(self, client_id: str) -> bytes:
        """The registration that :meth:`save_registration` wrote.

        Raises:
            RunDirectoryError: it is not there.
        """
        path = self.path / "registrations" / f"{client_id}.pb"
        try:
            return path.read_bytes()
        except OSError as error:
            raise RunDirectoryError(f"cannot read {path}: {error.strerror or error}") from None

    def save_adapters(self, folder: Path, adapters: Mapping[str, Adapter]) -> None:
        """Write clients' adapters, each to a file with its layout."""
        try:
            for client_id, adapter in adapters.items():
                blob = encode(adapter, Encoding.FP32, include_layout=True).blob
                write_durably(folder / f"{client_id}.adapter", blob)
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` (other tools read it)."""
        try:
            write_durably(self.path / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error


def dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of run-config, whose keys have dots: because TOML reads ``a.b = 1`` as a nested table."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def toml_string(text: str) -> str:
    """A TOML basic string on one line; characters that would end it or are not printable are escaped (TOML 1.0)."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text) + '"'


def _link_rows(rows: Mapping[str, FileRow], folder: Path) -> dict[str, dict[str, str]]:
    """Link the rows' files into ``folder``, flushed to the disk; returns file and digest of the numbers by name.

    Raises:
        BankError: a row cannot be read or linked.
        OSError: the folder cannot be written.
    """
    found: dict[str, dict[str, str]] = {}
    if rows:
        private_folder(folder)
    for index, (name, row) in enumerate(rows.items()):
        file = folder / f"{index:06d}.safetensors"
        link(row, file)
        sync(file)
        found[name] = {"file": file.name, "sha256": row.sha256}
    if rows:
        sync(folder)
    return found


def _linked_rows(folder: Path, saved: Mapping[str, Mapping[str, str]]) -> dict[str, FileRow]:
    """The rows that :func:`_link_rows` has linked.

    Raises:
        BankError: a file is not there, or is torn.
    """
    rows = {name: FileRow(folder / entry["file"]) for name, entry in saved.items()}
    for name, row in rows.items():
        if row.sha256 != saved[name]["sha256"]:
            raise BankError(f"{row.path} is not what the checkpoint has written")
    return rows


def _explain(path: Path, error: OSError) -> str:
    return f"cannot write the run directory {path}: {error.strerror or error}"
