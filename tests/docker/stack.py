"""The compose files at work: a copy of the checkout's image sources, a project of its own, and looks from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.docker.engine import ROOT
from tests.in_process import EXACT

SOURCES = ("proto", "fedalloy_adapters", "strategies", "client_app", "server_app", "docker")
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
CLIENTS = ("client-0", "client-1", "client-2")
# The compose file has four clients; what this leaves out is no part of the project.
THREE_CLIENTS = """
services:
  client-3-pod: { profiles: [left-out] }
  supernode-3: { profiles: [left-out] }
  superexec-clientapp-3: { profiles: [left-out] }
"""
# Runs in a pod's network namespace: turns segmentation offload off, because an interface counts the headers of a large
# packet once that the cable will see many times, and then says what the interfaces have counted.
METER = """
import array, fcntl, socket, struct, time
def names():
    return [name for _, name in socket.if_nameindex() if name.startswith("eth")]
handle, off = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), set()
while True:
    for name in set(names()) - off:
        for command in (0x1F, 0x24, 0x2C):  # ETHTOOL_STSO, SGSO, SGRO
            value = array.array("B", struct.pack("II", command, 0))
            fcntl.ioctl(handle, 0x8946, struct.pack("16sP", name.encode(), value.buffer_info()[0]))
        off.add(name)
    fields = [line.split() for line in open("/proc/net/dev") if ":" in line]
    print(time.time(), *(f"{f[0][:-1]}={f[1]}/{f[9]}" for f in fields if f[0].startswith("eth")), flush=True)
    time.sleep(0.1)
"""


class OutOfTimeError(AssertionError):
    """The hard cap of the whole test."""


class Meter:
    """Bytes that a pod's network interfaces have received and sent, with the times at which they were read."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.looks: list[tuple[float, int, int]] = []
        self._process = process
        self._before: dict[str, tuple[int, int]] = {}
        self._total = [0, 0]
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            when, *interfaces = line.split()
            now = {}
            for interface in interfaces:
                name, _, counts = interface.partition("=")
                received, _, sent = counts.partition("/")
                now[name] = (int(received), int(sent))
            for name, counters in now.items():  # a network that was cut and healed comes with an interface of its own
                for position in (0, 1):
                    self._total[position] += counters[position] - self._before.get(name, (0, 0))[position]
            self._before = now
            self.looks.append((float(when), self._total[0], self._total[1]))

    def between(self, start: float, end: float) -> tuple[int, int]:
        """Bytes received and sent between two moments."""
        (_, *first), (_, *last) = (min(self.looks, key=lambda look: abs(look[0] - when)) for when in (start, end))
        return last[0] - first[0], last[1] - first[1]


class Stack:
    """One compose project; :meth:`close` removes its containers, networks and volumes."""

    def __init__(self, folder: Path, environment: Mapping[str, str], deadline: float) -> None:
        self.folder = folder
        self.deadline = deadline
        self.project = f"fedalloy-test-{os.getpid()}"
        self.image = f"{self.project}:test"
        self.environment = {**environment, "COMPOSE_PROJECT_NAME": self.project, "FEDALLOY_IMAGE": self.image}
        self.overlays: list[str] = []
        self.meters: dict[str, Meter] = {}
        self._processes: list[subprocess.Popen[str]] = []
        for name in SOURCES:
            ignored = shutil.ignore_patterns("__pycache__", "*.whl", "keys")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for name in FILES:
            shutil.copy(ROOT / name, folder / name)
        (folder / "docker" / "three-clients.yaml").write_text(THREE_CLIENTS)
        if os.geteuid() == 0:  # a checkout of somebody else's, so that its owner can be told from root
            os.chown(folder / "pyproject.toml", 12345, 23456)

    # ---------------------------------------------------------------------------------------------- commands

    def remaining(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError("the cluster test has used up its time")
        return left

    def docker(self, *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            ["docker", *arguments],
            capture_output=True, text=True, env={**self.environment, **(environment or {})}, check=False,
            timeout=self.remaining(), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"docker {' '.join(arguments)}: {(done.stdout + done.stderr)[-4000:]}")
        return done.stdout + ("" if check else done.stderr)

    def compose(self, *arguments: str, check: bool = True) -> str:
        files = ["compose.yaml", "three-clients.yaml", *self.overlays]
        given = [argument for name in files for argument in ("-f", str(self.folder / "docker" / name))]
        return self.docker("compose", "--ansi", "never", *given, *arguments, check=check)

    def container(self, service: str) -> str:
        return self.compose("ps", "-aq", service).strip()

    def build(self) -> None:
        """The image, with the CPU torch that this test run itself uses where one can be downloaded."""
        wheels = self.folder / "docker" / "wheels"
        if torch.version.cuda is None:
            got = subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"torch=={torch.__version__}"],
                cwd=wheels,
                capture_output=True, check=False, timeout=self.remaining(),
            )  # fmt: skip
            if got.returncode == 0:
                self.environment |= {"TORCH_INDEX": ""}
        self.compose("build", "--quiet", "certificates")

    def close(self) -> None:
        """Nothing of the project stays; works after the deadline, too."""
        self.deadline = time.monotonic() + 120
        self.stop_meters()
        self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "2", check=False)
        self.docker("image", "rm", "--force", self.image, check=False)

    def wait_for(self, what: str, condition: Callable[[], bool], interval: float = 0.5) -> None:
        while not condition():
            try:
                self.remaining()
            except OutOfTimeError:
                raise OutOfTimeError(f"gave up waiting for {what}\n{self.logs()}") from None
            time.sleep(interval)

    def logs(self) -> str:
        self.deadline = max(self.deadline, time.monotonic() + 30)
        return self.compose("logs", "--no-color", "--tail", "25", check=False)[-12000:]

    # ------------------------------------------------------------------------------------------------ meters

    def start_meters(self) -> None:
        """One for every pod, in its network namespace; wait until each has looked once."""
        for pod in ("server-pod", *(f"{client}-pod" for client in CLIENTS)):
            command = ["docker", "run", "--rm", "--name", f"{self.project}-meter-{pod}", "--user", "0"]
            command += ["--cap-drop", "ALL", "--cap-add", "NET_ADMIN", "--network", f"container:{self.container(pod)}"]
            command += [self.image, "python", "-c", METER]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self.environment,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._processes.append(process)
            self.meters[pod.removesuffix("-pod")] = Meter(process)
        self.wait_for("the meters", lambda: all(meter.looks for meter in self.meters.values()))

    def stop_meters(self) -> None:
        names = [f"{self.project}-meter-{name}-pod" for name in self.meters]
        if names:
            self.docker("rm", "--force", *names, check=False)
        for process in self._processes:
            process.wait(timeout=30)
        self._processes, self.meters = [], {}

    # -------------------------------------------------------------------------------------------------- runs

    def cli(self, *words: str) -> str:
        """A command of the service ``cli`` in a cluster that is up, whose keys are not made and registered again."""
        return self.compose("run", "--rm", "-T", "--no-deps", "cli", *words)

    def submit(self, name: str, **config: Any) -> None:
        """``flwr run`` once all SuperNodes are connected, without waiting for its end."""
        given = {"run-name": name, "runs-dir": "/app/runs", "scenario": "digits", "strategy": "fedmerge"}
        given |= EXACT  # see tests/e2e/test_cluster.py
        given |= {key.replace("_", "-"): value for key, value in config.items()}
        text = " ".join(f"{key}={value!r}" for key, value in given.items())
        said = self.compose("run", "--rm", "-T", "cli", "flwr", "run", ".", "fedalloy", "--run-config", text)
        assert "Successfully started run" in said, said

    def rounds(self, name: str) -> list[dict[str, Any]]:
        """What the run has recorded so far."""
        text = self.compose("exec", "-T", "superexec-serverapp", "cat", f"/app/runs/{name}/rounds.jsonl", check=False)
        lines = [line for line in text.splitlines() if line.startswith("{")]
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_round(self, name: str, phase: str, round_: int = 0) -> None:
        """Until the run has recorded this; fails at once when the run has given up."""

        def recorded() -> bool:
            found = self.rounds(name)
            stopped = [record["reason"] for record in found if record["phase"] == "stopped"]
            assert not stopped, f"{stopped}\n{self.logs()}"
            return any(record["phase"] == phase and record["round"] >= round_ for record in found)

        self.wait_for(f"{phase} {round_} of {name}", recorded)
