"""A client's personal model on its disk, for exports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_app.tools.errors import ToolError

MIXTURE_FILE = "mixture.json"
FILES = ("adapter_config.json", "adapter_model.safetensors")


class ExportError(ToolError):
    """There is nothing to export, or the destination exists; the message names what exists."""


@dataclass(frozen=True)
class Personal:
    """A client's personal model: its PEFT directory, and the client's notes about it."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def run(self) -> Path:
        """The run's folder on this machine."""
        return self.folder.parents[2]

    @property
    def task(self) -> str:
        """The kind of its task; empty if it has several, or is older than ``about.json``."""
        kinds = set(self.about.get("tasks", {}).values())
        return str(kinds.pop()) if len(kinds) == 1 else ""

    @property
    def config(self) -> dict[str, Any]:
        """``adapter_config.json``."""
        found: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        return found

    @property
    def base(self) -> Path:
        """The folder of the base model on this machine.

        Raises:
            ExportError: it is not here.
        """
        from client_app.model.bases.model_folders import find_model

        name = self.config.get("base_model_name_or_path")
        if not name:
            raise ExportError(f"{self.folder / 'adapter_config.json'} names no base model")
        try:
            return Path(find_model(name, self.folder.parents[3] / ".cache").folder)
        except ValueError as error:
            raise ExportError(f"the base model {name!r} is not on this machine: {error}") from None


def is_in_parts(folder: Path) -> bool:
    """Whether a personal model could not become one adapter, because its coefficients depend on the input.

    It then consists of a PEFT directory per slot, ``gates.safetensors``, and ``mixture.json``, which says how they add
    up.
    """
    return (folder / MIXTURE_FILE).is_file()


def require_one(personal: Personal, form: str) -> None:
    """Refuse a model that is not a single adapter.

    Raises:
        ExportError: it is in parts.
    """
    if is_in_parts(personal.folder):
        parts = sorted(path.name for path in personal.folder.iterdir() if path.is_dir())
        raise ExportError(
            f"client {personal.about.get('client', '?')!r} cannot be exported as {form}: its model adds up "
            f"{', '.join(parts)} with coefficients that depend on the input, which {form} cannot hold; "
            "--as peft writes the parts"
        )


def clients_of(run: Path) -> list[str]:
    """The clients whose files are in a run's folder on this machine.

    Raises:
        ExportError: there are none.
    """
    clients = run / "clients"
    if not clients.is_dir():
        raise ExportError(
            f"{run} has no clients/ folder; clients keep their models on their own machines: run this at the client, "
            f"with <state-dir>/{run.name}"
        )
    return sorted(path.name for path in clients.iterdir() if path.is_dir())


def find(run: Path, client_id: str) -> Personal:
    """One client's model.

    Raises:
        ExportError: there is no such run or client, or no personal model yet.
    """
    known = clients_of(run)
    if client_id not in known:
        raise ExportError(f"run {run.name!r} has no client {client_id!r}; it has {', '.join(known) or 'none'}")
    source = run / "clients" / client_id / "adapter"
    if not is_in_parts(source) and not all((source / name).is_file() for name in FILES):
        raise ExportError(f"client {client_id!r} has no personal model yet in {run} (it is saved after the last round)")
    try:
        about = json.loads((run / "clients" / client_id / "about.json").read_text())
    except (OSError, ValueError):
        about = {}
    return Personal(source, about)
