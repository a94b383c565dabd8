"""A SuperLink and SuperNodes as real processes inside :class:`namespaces.Namespaces`, with or without TLS and keys."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from server_app.tools.cluster.certificates import make_client_key, make_server_files
from tests.e2e.namespaces import Namespaces, enter

BINARIES = Path(sys.executable).parent
CONNECTION = "here"


@dataclass
class Fleet:
    """A running federation; ``directory`` holds certificates, keys, logs and each process's ``FLWR_HOME``."""

    namespaces: Namespaces
    directory: Path
    tls: bool
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    authority: Path = Path()

    @property
    def certificates(self) -> Path:
        """Folder of certificates and keys."""
        return self.directory / "certificates"

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers."""
        trust = ["--insecure"]
        if self.tls:
            files = make_server_files(self.certificates, [cable.server_address for cable in self.namespaces.cables])
            trust = ["--ssl-ca-certfile", str(files.authority), "--ssl-certfile", str(files.certificate)]
            trust += ["--ssl-keyfile", str(files.key), "--enable-supernode-auth"]
            self.authority = files.authority
        home = self._home("superlink")
        how = f'root-certificates = "{self.authority}"' if self.tls else "insecure = true"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:8000"\n{how}\n'
        )
        self._start(
            self.namespaces.server,
            "superlink",
            ["flower-superlink", *trust, "--disable-runtime-dependency-installation"],
        )
        self._persistently("list", CONNECTION)

    def start_supernode(self, number: int, node_config: str) -> None:
        """Start SuperNode ``number`` in its namespace; with TLS its key is registered first."""
        cable = self.namespaces.cables[number]
        trust = ["--insecure"]
        if self.tls:
            private, public = make_client_key(self.certificates, f"node{number}")
            self._persistently("supernode", "register", str(public), CONNECTION)
            trust = ["--root-certificates", str(self.authority), "--auth-supernode-private-key", str(private)]
        command = [
            "flower-supernode",
            *trust,
            "--superlink",
            f"{cable.server_address}:9092",
            "--node-config",
            node_config,
        ]
        self._start(cable.namespace, f"supernode{number}", command)

    def submit(self, app: Path, run_config: str) -> None:
        """``flwr run`` without waiting for the run.

        Raises:
            RuntimeError: the SuperLink did not take it.
        """
        started = self.flwr("run", str(app), CONNECTION, "--run-config", run_config)
        if started.returncode != 0:
            raise RuntimeError(f"flwr run failed:\n{started.stdout}\n{self.log('superlink')}")

    def status(self) -> str:
        """The last run's status, for example ``finished:completed``."""
        listed = self.flwr("list", CONNECTION, "--format", "json")
        found = re.search(r'"status": "([^"]*)"', listed.stdout)
        return found.group(1) if found else "unknown"

    def flwr(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """The ``flwr`` command beside the SuperLink."""
        return subprocess.run(
            [str(BINARIES / "flwr"), *arguments],
            cwd=self.directory,
            env=self._environment("superlink"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
            preexec_fn=lambda: enter(self.namespaces.server),
        )

    def log(self, name: str) -> str:
        """The last lines of a process's log."""
        return "\n".join((self.directory / f"{name}.log").read_text(errors="replace").splitlines()[-60:])

    def stop(self) -> None:
        """End all processes that were started here, SuperNodes first."""
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def _persistently(self, *arguments: str) -> None:
        """On a busy machine the SuperLink comes up late and the command's own timeout is short."""
        deadline = time.monotonic() + 120
        while (ended := self.flwr(*arguments)).returncode != 0:
            if time.monotonic() > deadline or self.processes[0].poll() is not None:
                raise RuntimeError(f"flwr {' '.join(arguments)} failed:\n{ended.stdout}\n{self.log('superlink')}")
            time.sleep(0.5)

    def _start(self, namespace: str, name: str, command: list[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    [str(BINARIES / command[0]), *command[1:]],
                    cwd=self.directory,
                    env=self._environment(name),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=lambda: enter(namespace),
                )
            )

    def _home(self, name: str) -> Path:
        home = self.directory / f"home-{name}"
        home.mkdir(exist_ok=True)
        return home

    def _environment(self, name: str) -> Mapping[str, str]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        # SuperLink and SuperNode look their helpers up in PATH.
        path = f"{BINARIES}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **quiet, "PATH": path, "FLWR_HOME": str(self._home(name)), "OMP_NUM_THREADS": "1"}


@contextmanager
def fleet(directory: Path, clients: int, tls: bool) -> Iterator[Fleet]:
    """A federation with its SuperLink running and no SuperNode yet.

    Raises:
        NamespacesUnavailableError: no network namespaces here.
    """
    with ExitStack() as stack:
        federation = Fleet(stack.enter_context(Namespaces(clients)), directory, tls)
        stack.callback(federation.stop)
        federation.start_superlink()
        yield federation
