"""A run on disk: ``runs/<name>/{config.toml, rounds.jsonl, checkpoints/round-0005/, summary.json, ledger.sqlite}``.

Everything is valid after a kill at any moment: files are written, flushed and renamed; ``rounds.jsonl`` is appended to
line by line, and a line that a kill tore is passed over when it is read.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from adapters.durable import sync, write_durably
from strategies.base import State


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
        """A new folder with its configuration."""
        path = runs_dir / name
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / "config.toml").exists():
                raise RunDirectoryError(f"{path} already holds a run; choose another run-name")
            write_durably(path / "config.toml", config.encode())
        except OSError as error:
            raise RunDirectoryError(_explain(path, error)) from error
        return cls(path)

    def append_round(self, record: dict[str, Any]) -> None:
        """Append one line to ``rounds.jsonl`` and flush it to the disk."""
        line = json.dumps(record, sort_keys=False, allow_nan=False) + "\n"
        try:
            with (self.path / "rounds.jsonl").open("a+b") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a kill tore the last line; what follows gets one of its own
                        file.write(b"\n")
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error

    def rounds(self) -> list[dict[str, Any]]:
        """All records; a line that a kill tore is left out."""
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        records = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def save_checkpoint(self, round_: int, state: State, keep: int) -> None:
        """The strategy's state after a round, as ``checkpoints/round-0005/``; all but the last ``keep`` are removed."""
        folder = self.path / "checkpoints"
        final = folder / f"round-{round_:04d}"
        staged = folder / f".round-{round_:04d}-{os.getpid()}"
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
            write_durably(staged / "state.safetensors", save(tensors))
            write_durably(staged / "state.json", json.dumps({"round": round_, "values": state.values}).encode())
            shutil.rmtree(final, ignore_errors=True)
            os.rename(staged, final)
            sync(folder)
            for old in sorted(folder.glob("round-*"))[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error

    def load_checkpoint(self) -> tuple[int, State] | None:
        """Round and state of the newest checkpoint that is whole, or None."""
        for folder in sorted((self.path / "checkpoints").glob("round-*"), reverse=True):
            try:
                saved = json.loads((folder / "state.json").read_text())
                return int(saved["round"]), State(load_file(folder / "state.safetensors"), saved["values"])
            except (OSError, ValueError, KeyError, SafetensorError):
                continue
        return None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` (other tools read it)."""
        try:
            write_durably(self.path / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise RunDirectoryError(_explain(self.path, error)) from error


def _explain(path: Path, error: OSError) -> str:
    return f"cannot write the run directory {path}: {error.strerror or error}"
