"""A local cluster of stock Flower processes: one SuperLink and N SuperNodes, TLS and SuperNode authentication on.

``<directory>/`` holds ``cluster.json`` (the processes, so that another command can stop them), ``certificates/``,
``keys/``, ``logs/``, one ``FLWR_HOME`` per process in ``homes/``, and ``flwr-home/config.toml`` with the connection
``fedalloy`` that stock ``flwr`` commands use.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from client_app.processors import usable_cores
from fedalloy_adapters.files.atomic_files import write_durably
from server_app.tools.cluster.certificates import (
    ServerFiles,
    make_client_key,
    make_server_files,
    private_folder,
    require_client_ids,
)
from server_app.tools.cluster.link_check import advice
from server_app.tools.cluster.superlink import ClusterError, SuperLink, app_directory, last_words, literal
from server_app.tools.cluster.supernode_keys import node_id_of

CONNECTION = "fedalloy"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Process:
    """A process that the cluster started; pid and start time name it, so a recycled pid is never touched.

    ``started`` is the result of :func:`started`.
    """

    name: str
    pid: int
    started: float

    def find(self) -> psutil.Process | None:
        """The live process, or None."""
        try:
            found = psutil.Process(self.pid)
            alive = abs(started(found) - self.started) < 0.1 and found.status() != psutil.STATUS_ZOMBIE
            return found if alive else None
        except psutil.NoSuchProcess:
            return None


def started(process: psutil.Process) -> float:
    """When a process started, in seconds; on Linux since the boot, so that changes of the clock do not matter.

    Linux gives the boot time in whole seconds of the wall clock. So a start in wall-clock time changes by
    a whole second when the clock is corrected by a little.
    """
    return process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0)


@dataclass(frozen=True)
class Settings:
    """What to start. A port of 0 is chosen; ``prefixes`` are put before a process's own command (by process name).

    ``node_config`` has keys for clients, by client id, that are added or replace the usual ones.
    """

    client_ids: tuple[str, ...]
    runs_dir: Path
    host: str = "127.0.0.1"
    fleet_port: int = 0
    http_port: int = 0
    prefixes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    superlink_arguments: tuple[str, ...] = ()
    startup_timeout: float = 90.0
    node_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class LocalCluster(SuperLink):
    """Start, watch and stop; a context manager that always stops what it started."""

    def __init__(self, directory: Path, settings: Settings, say: Say = lambda text: None) -> None:
        super().__init__(CONNECTION, directory.resolve() / "logs")
        self.directory = directory.resolve()
        self.settings = settings
        self.say = say
        self.processes: list[Process] = []
        self.nodes: dict[str, str] = {}
        """Node ids by client id."""
        self.fleet_port = settings.fleet_port
        self.http_port = settings.http_port

    def __enter__(self) -> LocalCluster:
        self.up()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.down()

    def up(self) -> None:
        """Start everything and wait until every SuperNode is online.

        Raises:
            CertificateError: a client id is not a file name.
            ClusterError: a port is taken, a cluster runs here already, or something did not start.
        """
        require_client_ids(self.settings.client_ids)
        if running(self.directory):
            raise ClusterError(
                f"a cluster is running from {self.directory}; fedalloy cluster up restarts its ended processes, "
                "fedalloy cluster down stops it"
            )
        private_folder(self.directory)
        self.settings.runs_dir.mkdir(parents=True, exist_ok=True)
        host = self.settings.host
        self.fleet_port = _free_port(host, self.settings.fleet_port, "the Fleet link")
        self.http_port = _free_port("127.0.0.1", self.settings.http_port, "the control API")
        try:
            self._up(host)
        except BaseException:
            self.down()
            raise

    def _up(self, host: str) -> None:
        files = make_server_files(self.directory / "certificates", [host])
        self._write_connection(files)
        self.start_superlink(files)
        count = len(self.settings.client_ids)
        self.say(f"SuperLink is up ({host}:{self.fleet_port}, TLS); starting {count} SuperNodes, 10 to 20 s")
        for index, client_id in enumerate(self.settings.client_ids):
            private, public = make_client_key(self.directory / "keys", client_id)
            said = self.flwr("supernode", "register", str(public), CONNECTION, "--name", client_id, "--format", "json")
            self.nodes[client_id] = node_id_of(said)
            self.start_supernode(index, private, files)
        self.wait_for_nodes()
        self.say(f"{len(self.settings.client_ids)} SuperNodes are online, each with a key of its own")

    def start_superlink(self, files: ServerFiles) -> Process:
        """Start the SuperLink and wait until it answers (again, if it was stopped)."""
        host = self.settings.host
        process = self._start(
            "superlink",
            [
                "flower-superlink",
                *("--ssl-ca-certfile", str(files.authority)),
                *("--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)),
                *("--fleet-api-address", f"{host}:{self.fleet_port}", "--port", str(self.http_port)),
                "--enable-supernode-auth",
                "--disable-runtime-dependency-installation",
                *self.settings.superlink_arguments,
            ],
        )
        self._wait_for_port(host, self.fleet_port)
        self._wait_for_port("127.0.0.1", self.http_port)
        return process

    def start_supernode(self, index: int, key: Path, files: ServerFiles | None = None, name: str = "") -> Process:
        """Start one SuperNode as client ``index`` with a private key (again, if it was stopped)."""
        authority = files.authority if files else self.directory / "certificates" / "ca.crt"
        client_id = self.settings.client_ids[index]
        node_config: dict[str, Any] = {
            "client-id": client_id,
            "partition-id": index,
            "num-partitions": len(self.settings.client_ids),
            "state-dir": str(self.settings.runs_dir.resolve()),
            "client.accept-keys": "all",
            # Set here, not found by the client: SuperNodes come and go, and a run should give the same numbers again.
            "torch-threads": max(1, usable_cores() // len(self.settings.client_ids)),
        }
        node_config |= self.settings.node_config.get(client_id, {})
        return self._start(
            name or f"supernode-{client_id}",
            [
                "flower-supernode",
                *("--root-certificates", str(authority), "--auth-supernode-private-key", str(key)),
                *("--superlink", f"{self.settings.host}:{self.fleet_port}"),
                *("--port", str(_free_port("127.0.0.1", 0, ""))),
                *("--node-config", " ".join(f"{option}={literal(value)}" for option, value in node_config.items())),
            ],
        )

    def down(self) -> None:
        """Stop every process that was started, with all its descendants; nothing happens if nothing runs."""
        stop(self.directory, self.processes)
        self.processes = []

    def environment(self, home: str = "flwr-home") -> dict[str, str]:
        """The environment of a process; every process has a ``FLWR_HOME`` of its own."""
        path = self.directory / home
        path.mkdir(parents=True, exist_ok=True)
        bin_folder = str(Path(sys.executable).parent)
        return os.environ | {
            "FLWR_HOME": str(path),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
            "OMP_NUM_THREADS": "1",  # clients share the cores
            "PATH": bin_folder + os.pathsep + os.environ.get("PATH", ""),  # Flower finds its own programs through PATH
            "COLUMNS": "200",
        }

    def stop_hint(self) -> str:
        """The commands that a user can type next."""
        app, home = app_directory(), self.directory / "flwr-home"
        tables = [self.settings.node_config.get(name, {}) for name in self.settings.client_ids]
        lacking = any("data-path" in table and "base-model" not in table for table in tables)
        note = "# instead of BASE-MODEL: a Hugging Face id, or the folder of a model\n" if lacking else ""
        more = " base-model='BASE-MODEL'" if lacking else ""
        return (
            f"export FLWR_HOME={home}\n{note}"
            f"fedalloy submit {app} {CONNECTION} --stream \\\n"
            f"    --run-config \"strategy='fedmerge' num-server-rounds=5{more}\"\n"
            f"fedalloy cluster down --dir {self.directory}"
        )

    def _start(self, name: str, command: Sequence[str]) -> Process:
        logs = self.directory / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name}.log").open("ab") as output:
            child = subprocess.Popen(
                [*self.settings.prefixes.get(name, ()), *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment(f"homes/{name}"),
                cwd=app_directory(),
                start_new_session=True,
            )
        process = Process(name, child.pid, started(psutil.Process(child.pid)))
        self.processes = [other for other in self.processes if other.name != name] + [process]
        state = {
            "fleet_port": self.fleet_port,
            "http_port": self.http_port,
            "host": self.settings.host,
            "runs_dir": str(self.settings.runs_dir.resolve()),
            "client_ids": list(self.settings.client_ids),
            "node_config": {name: dict(table) for name, table in self.settings.node_config.items()},
            "nodes": self.nodes,
            "processes": [asdict(other) for other in self.processes],
        }
        write_durably(self.directory / "cluster.json", json.dumps(state, indent=2).encode())
        return process

    def _write_connection(self, files: ServerFiles) -> None:
        home = self.directory / "flwr-home"
        home.mkdir(exist_ok=True)
        text = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.http_port}"\nroot-certificates = "{files.authority}"\n'
        )
        write_durably(home / "config.toml", text.encode())

    def _wait_for_port(self, host: str, port: int) -> None:
        deadline = time.monotonic() + self.settings.startup_timeout
        while time.monotonic() < deadline:
            self._require_alive()
            if self.settings.prefixes.get("superlink"):  # in another network namespace; its port cannot be tried here
                time.sleep(3)
                return
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((host, port)) == 0:
                    return
            time.sleep(0.1)
        raise ClusterError(f"nothing listens on {host}:{port} after {self.settings.startup_timeout:.0f} s")

    def wait_for_nodes(self) -> None:
        """Wait until every SuperNode is online.

        Raises:
            ClusterError: one ended, or they are not online within ``startup_timeout``.
        """
        deadline = time.monotonic() + self.settings.startup_timeout
        wanted, online, said = len(self.settings.client_ids), 0, 0
        while time.monotonic() < deadline:
            self._require_alive()
            nodes = json.loads(self.flwr("supernode", "list", CONNECTION, "--format", "json"))["nodes"]
            online = sum(node["status"] == "online" for node in nodes)
            if online >= wanted:
                return
            if online > said:
                self.say(f"{online} of {wanted} SuperNodes are online")
                said = online
            time.sleep(0.2)
        raise ClusterError(
            f"{online} of {wanted} SuperNodes are online after {self.settings.startup_timeout:.0f} s; "
            f"see {self.directory / 'logs'}"
        )

    def _require_alive(self) -> None:
        for process in self.processes:
            if process.find() is None:
                log = self.directory / "logs" / f"{process.name}.log"
                said = log.read_text(errors="replace")
                what = advice(said)
                raise ClusterError(f"{process.name} ended: {last_words(said)} {what and f'- {what} '}(log: {log})")


def read_state(directory: Path) -> dict[str, Any] | None:
    """``cluster.json``, or None if no cluster was started."""
    try:
        found: dict[str, Any] = json.loads((directory / "cluster.json").read_text())
        return found
    except FileNotFoundError:
        return None


def running(directory: Path) -> list[Process]:
    """Processes of the cluster started from ``directory`` that are alive."""
    state = read_state(directory)
    found = [Process(**item) for item in state["processes"]] if state else []
    return [process for process in found if process.find() is not None]


def stop(directory: Path, more: Sequence[Process] = ()) -> int:
    """Stop a cluster: SuperNodes, then the SuperLink, each with its descendants; returns how many processes ended."""
    found = {(process.pid, process.started): process for process in [*running(directory), *more]}
    count = _end(list(found.values()))
    (directory / "cluster.json").unlink(missing_ok=True)
    return count


def _end(processes: Sequence[Process]) -> int:
    """Send SIGTERM to processes and all their descendants, then SIGKILL to those left; returns how many there were."""
    roots = [alive for process in processes if (alive := process.find()) is not None]
    family: list[psutil.Process] = []
    for root in roots:
        try:
            family += [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    for member in family:
        _quietly(member.terminate)
    for member in psutil.wait_procs(family, timeout=5)[1]:
        _quietly(member.kill)
    psutil.wait_procs(family, timeout=5)
    return len(family)


def _free_port(host: str, port: int, purpose: str) -> int:
    """``port`` if it is free; a free one for 0.

    Raises:
        ClusterError: the port is taken; names the process that holds it, if that can be read.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host if _is_local(host) else "", port))
        except OSError as error:
            if not port:
                raise ClusterError(f"no free port on {host}: {error}") from None
            raise ClusterError(f"port {port} for {purpose} is in use{_holder(port)}; choose another one") from None
        return int(probe.getsockname()[1])


def _is_local(host: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
        return True


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,) and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""


def _quietly(action: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        action()
