"""Restarts SuperNodes of a local cluster that have ended, as they were or with other node-config."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server_app.tools.cluster.local import LocalCluster, Process, Say, Settings, read_state
from server_app.tools.cluster.superlink import ClusterError, last_words

ONLINE, STILL_HELD = "SuperNode ID:", "Failed to activate SuperNode"
"""What Flower (1.39) writes when a SuperNode is online, and when another one with its key still counts as online."""
AGAIN_SECONDS = 5.0


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
    waiting = [client_id for client_id in settings.client_ids if f"supernode-{client_id}" in ended]
    for seconds in _until_online([_Start(cluster, client_id) for client_id in waiting], settings.startup_timeout):
        time.sleep(seconds)
    cluster.wait_for_nodes()
    return ended


class _Start:
    """One SuperNode that is started again, as often as that takes."""

    def __init__(self, cluster: LocalCluster, client_id: str) -> None:
        self.cluster = cluster
        self.client_id = client_id
        self.index = cluster.settings.client_ids.index(client_id)
        self.log = cluster.directory / "logs" / f"supernode-{client_id}.log"
        self.again()

    def again(self) -> None:
        """Start it; what its log has said before is another process's."""
        self._known = self.log.stat().st_size if self.log.exists() else 0
        self.process = self.cluster.start_supernode(self.index, self.cluster.directory / "keys" / self.client_id)

    @property
    def said(self) -> str:
        """What it has said since it was started."""
        with self.log.open("rb") as file:
            file.seek(self._known)
            return file.read().decode(errors="replace")


def _until_online(starts: list[_Start], timeout: float) -> Iterator[float]:
    """Yield seconds to wait until all are online.

    The SuperLink takes a SuperNode that was killed for online until its heartbeats have been missing for a minute, and
    refuses another one with its key until then; the SuperLink's own list does not show this.

    Raises:
        ClusterError: one ended for another reason, or is not online in time.
    """
    deadline, told = time.monotonic() + timeout, False
    while starts:
        for start in [start for start in starts if ONLINE in start.said]:
            starts.remove(start)
        for start in [start for start in starts if start.process.find() is None]:
            said, name = start.said, start.process.name
            if STILL_HELD not in said or time.monotonic() > deadline:
                raise ClusterError(f"{name} ended: {last_words(said)} (log: {start.log})")
            if not told:
                start.cluster.say("the SuperLink has not noticed yet what has ended; trying again for up to a minute")
                told = True
            yield AGAIN_SECONDS
            start.again()
        if starts and time.monotonic() > deadline:
            names = ", ".join(start.client_id for start in starts)
            raise ClusterError(f"not online after {timeout:.0f} s: {names}; see {starts[0].log.parent}")
        yield 0.2
