"""Copies runs from a cluster's own storage (a container's volume) to a user's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from server_app.tools.errors import ToolError


class CollectError(ToolError):
    """A run cannot be copied; the message names it and says why."""


def collect(run: Path, destination: Path) -> Path:
    """Copy a run directory into ``destination``, again if it was copied before; returns the copy.

    If this process may change owners (root in a container), the copy belongs to the owner of ``destination``.

    Raises:
        CollectError: another run has this name there, or it cannot be written.
    """
    target = destination / run.name
    config = "config.toml"
    try:
        if target.exists() and _content(target / config) != _content(run / config):
            raise CollectError(f"{target} is another run; move it away to collect {run.name!r}")
        _copy(run, target)
        if os.geteuid() == 0:
            give_to_owner_of(destination, target)
    except OSError as error:
        raise CollectError(f"cannot copy {run} to {destination}: {error}") from error
    return target


def _copy(run: Path, target: Path) -> None:
    """Copy over existing files; files of a running run may vanish meanwhile (old checkpoints)."""
    for stale in target.rglob("*.sqlite-*"):  # SQLite would replay an older copy's log into the new one
        stale.unlink()
    try:
        shutil.copytree(run, target, dirs_exist_ok=True, symlinks=True)
    except shutil.Error as error:
        failed = [(source, why) for source, _, why in error.args[0] if os.path.lexists(source)]
        if failed:
            raise OSError("; ".join(f"{source}: {why}" for source, why in failed)) from None


def collect_all(runs: Path, destination: Path) -> list[Path]:
    """:meth:`collect` every run below ``runs``.

    Raises:
        CollectError: as for :func:`collect`; the other runs have been copied.
    """
    copies, failed = [], []
    for config in sorted(runs.glob("[!.]*/config.toml")):  # a hidden folder was killed before it became a run
        try:
            copies.append(collect(config.parent, destination))
        except CollectError as error:
            failed.append(str(error))
    if failed:
        raise CollectError("; ".join(failed))
    return copies


def give_to_owner_of(example: Path, folder: Path) -> None:
    """Give ``folder`` and everything in it to the owner of ``example``."""
    owner = example.stat()
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
