"""``fedalloy deliver`` and ``adopt``: models after a run's end, through a short run of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server_app.run.ending.adoption import words_of
from server_app.run.ending.late_delivery import MISSING, NEW, last_delivery, wanted_clients, wanted_newcomers
from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.superlink import ClusterError, SuperLink


def deliver(run: Path, clients: str, superlink: SuperLink) -> list[str]:
    """Deliver the models of a finished run; returns the ids of the clients that now have theirs.

    Args:
        run: the run's folder on the server.
        clients: ids, comma-separated; ``all``, or empty for those without a model.
        superlink: the one to which their SuperNodes are connected.

    Raises:
        RunDirectoryError: there is no such run or client, or the run is not finished.
        ClusterError: the delivery failed; says why.
    """
    directory = RunDirectory.open(run)
    wanted = wanted_clients(clients or MISSING, directory)
    if not wanted:
        return []
    _run(directory, superlink, {"deliver": clients or MISSING})
    return [name for name in wanted if last_delivery(directory).get(name, {}).get("status") == "ok"]


def adopt(run: Path, clients: str, superlink: SuperLink, options: Mapping[str, Any]) -> dict[str, str]:
    """Give clients that never trained the best sum of a finished run's models; returns each one's model in words.

    Args:
        run: the run's folder on the server.
        clients: ids, comma-separated; empty: all that are online and never trained.
        superlink: the one to which their SuperNodes are connected.
        options: ``adopt-...`` keys of run-config that differ from the run's.

    Raises:
        RunDirectoryError: no such run, the run is not finished, or one of them trained in it.
        ClusterError: the adoption failed; says why.
    """
    directory = RunDirectory.open(run)
    wanted_newcomers(clients or NEW, directory)
    _run(directory, superlink, {"adopt": clients or NEW, **options})
    summary = json.loads((run / "summary.json").read_text())
    return {name: words_of(said) for name, said in summary.get("adopted", {}).items()}


def _run(directory: RunDirectory, superlink: SuperLink, more: Mapping[str, Any]) -> None:
    outcome = superlink.run({**directory.config(), "resume": str(directory.path.resolve()), **more})
    if not outcome.completed:
        raise ClusterError(outcome.why(directory.path))
