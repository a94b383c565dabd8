"""A SuperLink that runs somewhere, reached through stock ``flwr`` commands and a named connection."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_app.tools.bundle.screen import reason_in
from server_app.tools.errors import ToolError

PACKED = "server_app.tools.bundle.start"
"""The module behind ``fedalloy submit``."""
TRIES = 60
"""Number of tries to get a run's status, a second apart, while the SuperLink does not answer."""


class ClusterError(ToolError):
    """A cluster cannot be started or reached, or is not as expected; the message says what to do."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: Flower's own status (``finished:completed``), and where its log is."""

    run_id: str
    status: str
    log: Path

    @property
    def completed(self) -> bool:
        """Whether the ServerApp ended without an error."""
        return self.status == "finished:completed"

    @property
    def words(self) -> str:
        """Status and log, in words."""
        return f"the run ended as {self.status}; log: {self.log}"

    def why(self, run: Path | None = None) -> str:
        """Why it did not succeed, as far as its output says, and the run's folder if this machine has it."""
        from server_app.run.run_directory import RunDirectory  # imports torch, which most commands do not need

        printed = self.log.read_text(errors="replace") if self.log.exists() else ""
        records = RunDirectory(run).rounds() if run else []
        stopped = [str(record["reason"]) for record in records if record["phase"] == "stopped"]
        return next(said for said in (reason_in(printed), *stopped[-1:], self.words) if said)


class SuperLink:
    """Starts runs and asks about them.

    Args:
        connection: its name in ``$FLWR_HOME/config.toml``.
        logs: a folder for the output of runs.
    """

    def __init__(self, connection: str, logs: Path) -> None:
        self.connection = connection
        self.logs = logs

    def environment(self) -> dict[str, str]:
        """The environment of ``flwr`` commands."""
        return os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "200"}

    def run(
        self,
        run_config: Mapping[str, Any],
        watch: Callable[[], object] = lambda: None,
        app: Path | None = None,
        stops: Callable[[], bool] = lambda: True,
    ) -> RunOutcome:
        """``fedalloy submit`` with these run-config keys; ``watch`` is called a few times a second while it runs.

        ``app`` is the folder of another Flower app; ``flwr run`` then starts that one.

        Flower's exit code says nothing about the run, and its stream of messages breaks when the SuperLink restarts,
        which a run may survive; so the status decides. When this is interrupted, the run is stopped if ``stops()``.

        Raises:
            ClusterError: Flower refused the run, or the SuperLink is gone.
            KeyboardInterrupt: Ctrl-C.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"run-{int(time.time() * 1000)}.log"
        config = " ".join(f"{key}={literal(value)}" for key, value in run_config.items())
        start = ["flwr", "run", str(app)] if app else [sys.executable, "-P", "-m", PACKED, str(app_directory())]
        command = [*start, self.connection, "--stream", "--run-config", config, *([] if app else ["--verbose"])]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment(),
                start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None:
                    watch()
                    time.sleep(0.2)
                run_id = _run_id(log)
                while not (status := self._status(run_id)).startswith("finished"):
                    watch()
                    time.sleep(1)
                watch()
                return RunOutcome(run_id, status, log)
            except KeyboardInterrupt:
                if stops():  # otherwise the run would go on without this command
                    with contextlib.suppress(ClusterError):
                        self.flwr("stop", _run_id(log), self.connection)
                raise
            finally:
                process.kill()
                process.wait()

    def flwr(self, *arguments: str) -> str:
        """Run a stock ``flwr`` command and return what it printed.

        Raises:
            ClusterError: it failed; the message has its last words.
        """
        done = subprocess.run(["flwr", *arguments], capture_output=True, text=True, env=self.environment(), check=False)
        if done.returncode != 0:
            raise ClusterError(f"flwr {' '.join(arguments[:2])} failed: {last_words(done.stdout + done.stderr)}")
        return done.stdout

    def online(self) -> int:
        """How many SuperNodes are online.

        Raises:
            ClusterError: the SuperLink cannot be reached.
        """
        nodes = json.loads(self.flwr("supernode", "list", self.connection, "--format", "json"))["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def _status(self, run_id: str) -> str:
        for attempt in range(TRIES):
            try:
                listed = json.loads(self.flwr("list", self.connection, "--run-id", run_id, "--format", "json"))
                return str(listed["runs"][0]["status"])
            except ClusterError:
                if attempt == TRIES - 1:
                    raise
                time.sleep(1)
        raise AssertionError("unreachable")


def app_directory() -> Path:
    """The checkout: the folder with the ``pyproject.toml`` of the Flower app.

    Raises:
        ClusterError: neither this package nor the current folder belongs to a checkout.
    """
    for folder in (Path(__file__).resolve().parents[3], Path.cwd()):
        project = folder / "pyproject.toml"
        if project.exists() and "[tool.flwr.app]" in project.read_text():
            return folder
    raise ClusterError("no FedAlloy checkout found: run this from the repository, or install it with pip install -e .")


def last_words(text: str) -> str:
    """The last line with a message, without the box that Flower draws around errors."""
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    said = [line for line in lines if line and line != "Error"]
    return said[-1] if said else "it said nothing"


def _run_id(log: Path) -> str:
    text = log.read_text(errors="replace")
    marker = "Successfully started run "
    if marker not in text:
        raise ClusterError(f"flwr run failed: {last_words(text)}")
    return text.split(marker, 1)[1].split()[0]


def literal(value: object) -> str:
    """A run-config value in the form that ``flwr run --run-config`` reads.

    Raises:
        ClusterError: there is no way to write it.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    quote = '"' if "'" in text else "'"
    if quote in text or (quote == '"' and "\\" in text) or not text.isprintable():
        raise ClusterError(f"{text!r} cannot be given to Flower: it has both kinds of quotes, or a control character")
    return f"{quote}{text}{quote}"
