"""Continue an unfinished run: its directory must fit the options, and its clients keep their places."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from client_app.trainer.address import LIBRARIES, PACKAGES, source_digest
from fedalloy_adapters.layout import Layout, LayoutError
from proto.fedalloy.v1 import report_pb2
from server_app.run.options import RunOptions, known_keys
from server_app.run.run_directory import Checkpoint, RunDirectory, RunDirectoryError
from strategies.framework.answers import client_from
from strategies.framework.exchange import BadAnswerError, Client
from strategies.framework.options import RunConfig

FREE_KEYS = {
    "resume", "deliver", "adopt", "run-name", "runs-dir", "min-clients", "round-timeout", "startup-timeout",
    "poll-interval", "keep-checkpoints", "on-divergence", "adopt-examples", "adopt-evaluations", "adopt-sources",
}  # fmt: skip
"""Keys that may have other values in a resumed run. Of these, only ``min-clients`` can change results, if
``fraction-clients`` is below 1: no round has fewer clients."""
_FREE_PREFIXES = ("trainer.", "client.")


def open_again(path: Path, run_config: RunConfig, options: RunOptions) -> RunDirectory:
    """Open the folder of a run to continue: after its last complete round, with more rounds, or to deliver models.

    Raises:
        RunDirectoryError: there is no run, it is finished and the options ask for nothing more, or it began with other
            settings.
    """
    directory = RunDirectory.open(path)
    before = int(directory.config().get("num-server-rounds", RunOptions.num_server_rounds))
    more = options.num_server_rounds if options.num_server_rounds > before and not options.is_over else 0
    if directory.finished and not more and not options.is_over:
        raise RunDirectoryError(
            f"resume: the run in {path} is finished after {before} rounds; to train on, set num-server-rounds to "
            f"more than that; to deliver models to clients that were absent: fedalloy deliver {path}"
        )
    if more and options.task_arrival != "all":
        raise RunDirectoryError(
            f"resume: num-server-rounds = {more}, it was {before}, and task-arrival = {options.task_arrival!r} divides "
            "the data among as many rounds as the run began with"
        )
    require_same_config(directory, run_config, {"num-server-rounds"} if more else set())
    if more:
        directory.extend(more)
    return directory


def checkpoint_of(directory: RunDirectory) -> Checkpoint | None:
    """The state to continue from; None if the run has not begun.

    Raises:
        RunDirectoryError: no checkpoint is whole, and clients are ahead of a start.
    """
    found = directory.newest_checkpoint()
    if found is None and any(record["phase"] == "train" for record in directory.rounds()):
        raise RunDirectoryError(
            f"resume: no checkpoint in {directory.path / 'checkpoints'} is whole, and clients are rounds "
            "ahead of a start; put a copy of one back, or start a run with another run-name"
        )
    return found


def require_same_config(directory: RunDirectory, run_config: RunConfig, free: Collection[str] = ()) -> None:
    """Require the run-config with which the run began.

    Raises:
        RunDirectoryError: names the keys that differ, and the file with the right values.
    """
    before, defaults = directory.config(), known_keys()
    different = []
    for key in sorted({*before, *run_config} - FREE_KEYS - set(free)):
        old, new = before.get(key, defaults.get(key)), run_config.get(key, defaults.get(key))
        if old != new and not key.startswith(_FREE_PREFIXES):
            different.append(f"{key} = {new!r}, it was {old!r}")
    if different:
        raise RunDirectoryError(
            f"resume: the run in {directory.path} was started with another run-config: {'; '.join(different[:5])}. "
            f"With the one it had, {directory.how_to_resume}"
        )


def code_versions() -> dict[str, str]:
    """Everything besides run-config that decides numbers: the app's source, Python, and the libraries that compute."""
    found = {"fedalloy": source_digest((*PACKAGES, "server_app", "strategies")), "python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def changed_code(before: Mapping[str, str] | None) -> dict[str, str]:
    """Versions that differ from the run's earlier ones, in words; empty if the earlier ones are not known."""
    if before is None:
        return {}
    now = code_versions()
    return {
        name: f"{now.get(name, 'none')[:16]}, it was {before.get(name, 'none')[:16]}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }


@dataclass(frozen=True)
class SavedClient:
    """A client as it was enrolled: ``examples`` is the number that counts; ``node_id`` is 0 until it is back."""

    client: Client
    key: bytes


def clients_to_json(clients: Mapping[str, Client], keys: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Enrolled clients, in order, for a checkpoint; their registrations are files of their own, with this SHA-256."""
    return [
        {"id": c.id, "examples": c.examples, "key": keys.get(c.id, b"").hex(), "sha256": c.registration_sha256}
        for c in clients.values()
    ]


def saved_clients(directory: RunDirectory, checkpoint: Checkpoint) -> list[SavedClient]:
    """The clients of a checkpoint in the order of their enrolment.

    Raises:
        RunDirectoryError: a registration is missing or damaged.
    """
    found = []
    for entry in checkpoint.run.get("clients", ()):
        try:
            said = directory.registration(entry["id"])
            if entry.get("sha256") not in (None, hashlib.sha256(said).hexdigest()):
                raise ValueError("it is not the one that the client was enrolled with")
            registration = report_pb2.Registration.FromString(said)
            client = client_from(registration, Layout.from_proto(registration.layout), 0)
        except (LayoutError, BadAnswerError, DecodeError, ValueError) as error:
            raise RunDirectoryError(f"registration of client {entry['id']!r} in {directory.path}: {error}") from None
        found.append(SavedClient(replace(client, examples=entry["examples"]), bytes.fromhex(entry["key"])))
    return found
