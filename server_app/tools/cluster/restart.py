"""Restarts SuperNodes of a local cluster that have ended, as they were or with other node-config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server_app.tools.cluster.local import LocalCluster, Process, Say, Settings, read_state
from server_app.tools.cluster.superlink import ClusterError


def restart_ended(directory: Path, say: Say, node_config: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Restart the SuperNodes of a running cluster that have ended; returns their processes' names.

    ``node_config`` replaces the node-config that they were started with.

    Raises:
        ClusterError: all of it runs; or the SuperLink has ended, and only it knew the clients' keys.
    """
    state = read_state(directory) or {"processes": [], "client_ids": []}
    processes = [Process(**item) for item in state["processes"]]
    ended = [process.name for process in processes if process.find() is None]
    if not ended:
        raise ClusterError(f"all of the cluster in {directory} is running; stop it with: fedalloy cluster down")
    if "superlink" in ended:
        raise ClusterError(
            f"the SuperLink of the cluster in {directory} has ended, and its keys with it; start anew with: fedalloy "
            "cluster down, then fedalloy cluster up"
        )
    settings = Settings(
        tuple(state["client_ids"]),
        Path(state["runs_dir"]),
        state["host"],
        state["fleet_port"],
        state["http_port"],
        node_config=node_config or state["node_config"],
    )
    cluster = LocalCluster(directory, settings, say)
    cluster.processes, cluster.nodes = processes, dict(state["nodes"])
    for index, client_id in enumerate(settings.client_ids):
        if f"supernode-{client_id}" in ended:
            cluster.start_supernode(index, cluster.directory / "keys" / client_id)
    cluster.wait_for_nodes()
    return ended
