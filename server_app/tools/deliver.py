"""``fedalloy deliver``: models for clients that were absent when a run delivered, through a short run of its own."""

from __future__ import annotations

from pathlib import Path

from server_app.run.ending.late_delivery import MISSING, last_delivery, wanted_clients
from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.superlink import ClusterError, SuperLink
from server_app.tools.demo import why


def deliver(run: Path, clients: str, superlink: SuperLink) -> list[str]:
    """Deliver the models of a finished run; returns the ids of the clients that have theirs now.

    Args:
        run: the run's folder on the server.
        clients: ids, comma-separated; ``all``, or empty for those without.
        superlink: the one to which their SuperNodes are connected.

    Raises:
        RunDirectoryError: no such run or client, or the run is not finished.
        ClusterError: the delivery failed; says why.
    """
    directory = RunDirectory.open(run)
    wanted = wanted_clients(clients or MISSING, directory)
    if not wanted:
        return []
    config = directory.config() | {"resume": str(run.resolve()), "deliver": clients or MISSING}
    outcome = superlink.run(config)
    if not outcome.completed:
        raise ClusterError(why(directory.path, outcome))
    return [name for name in wanted if last_delivery(directory).get(name, {}).get("status") == "ok"]
