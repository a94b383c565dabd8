"""A client's personal model out of a run, as a PEFT directory of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from server_app.tools.errors import ToolError

MIXTURE_FILE = "mixture.json"
FILES = ("adapter_config.json", "adapter_model.safetensors")


class ExportError(ToolError):
    """There is nothing to export, or the destination is taken; the message names what there is."""


def export_adapter(run: Path, client_id: str, destination: Path) -> Path:
    """Copy ``<run>/clients/<client-id>/adapter`` to ``destination``, all of it or nothing.

    ``PeftModel.from_pretrained(base_model, destination)`` loads it; where it :func:`is_in_parts`, each folder in it.

    Args:
        run: a run directory on the machine that holds this client's files.
        client_id: one of its clients.
        destination: a folder that does not exist yet, or is empty.

    Raises:
        ExportError: no such run or client, no personal model yet, or the destination is not empty.
    """
    clients = run / "clients"
    if not clients.is_dir():
        raise ExportError(f"{run} has no clients/ folder; on this machine, is it the client's state-dir?")
    known = sorted(path.name for path in clients.iterdir() if path.is_dir())
    if client_id not in known:
        raise ExportError(f"run {run.name!r} has no client {client_id!r}; it has {', '.join(known) or 'none'}")
    source = clients / client_id / "adapter"
    in_parts = is_in_parts(source)
    if not in_parts and not all((source / name).is_file() for name in FILES):
        raise ExportError(f"client {client_id!r} has no personal model yet in {run} (it is saved after the last round)")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ExportError(f"{destination} exists and is not an empty folder")
    staged = destination.with_name(f".{destination.name}-{os.getpid()}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        if in_parts:
            shutil.copytree(source, staged)
        else:
            staged.mkdir()
            for name in FILES:
                shutil.copyfile(source / name, staged / name)
        if destination.exists():
            destination.rmdir()
        os.rename(staged, destination)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise ExportError(f"cannot write {destination}: {error.strerror or error}") from error
    return destination


def is_in_parts(folder: Path) -> bool:
    """Whether a personal model could not become one adapter, because its coefficients depend on the input.

    It is then a PEFT directory per slot, ``gates.safetensors``, and ``mixture.json``, which says how they add up.
    """
    return (folder / MIXTURE_FILE).is_file()
