"""``fedalloy run``, ``watch``, ``adopt`` and ``deliver`` on real processes.

What Ctrl-C asks, exit codes, lines without a terminal; schedules, patience and choice at delivery; a newcomer.
"""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from server_app.tools.cluster.local import LocalCluster

FEDALLOY = str(Path(sys.executable).parent / "fedalloy")
SMALL = {"strategy": "fedmerge", "num-server-rounds": 1, "local-steps": 5, "min-clients": 3}
QUESTION = "Stop the run?"

pytestmark = pytest.mark.timeout(1800)  # of a hang; a busy machine takes long


@dataclass
class Terminal:
    """A command in a terminal of 80 columns, and all that it has printed."""

    command: subprocess.Popen[bytes]
    handle: int
    printed: str = ""

    def wait_for(self, text: str) -> None:
        """Read until it has printed this; an error if it ends before."""
        while text not in self.printed:
            assert self._read(), self.printed

    def types(self, keys: str) -> None:
        os.write(self.handle, keys.encode())

    def exit_code(self) -> int:
        while self._read():
            pass
        return self.command.wait()

    def _read(self) -> bool:
        if select.select([self.handle], [], [], 1)[0]:
            with suppress(OSError):  # Linux's end of a terminal
                found = os.read(self.handle, 1 << 16)
                self.printed += found.decode(errors="replace")
                return bool(found)
            return False
        return True


@contextmanager
def terminal(cluster: LocalCluster, *words: str) -> Iterator[Terminal]:
    """``fedalloy`` in a terminal; Ctrl-C is a key there."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    start = [sys.executable, "-c", _INSIDE, FEDALLOY, *words, "--dir", str(cluster.directory)]
    command = subprocess.Popen(
        start, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        yield Terminal(command, ours)
    finally:
        command.kill()
        command.wait()
        os.close(ours)


_INSIDE = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Makes the terminal that of the session: only so does the key become a signal. Tests in a shell's background have
inherited that it is ignored."""


def types(*words: str) -> tuple[int, list[str]]:
    """Exit code and lines of a command without a terminal."""
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run([FEDALLOY, *words], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def started(name: str, **more: object) -> tuple[str, ...]:
    config = SMALL | {"run-name": name} | {key.replace("_", "-"): value for key, value in more.items()}
    return "run", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items()), "--no-check"


@pytest.fixture(scope="module")
def left(cluster: LocalCluster) -> Path:
    """A run whose command was left by Ctrl-C while it began."""
    with terminal(cluster, *started("left")) as shown:
        shown.wait_for("clients register")
        shown.types("\x03")
        shown.wait_for(QUESTION)
        shown.types("n\n")
        assert shown.exit_code() == 130, shown.printed
    path = cluster.settings.runs_dir / "left"
    assert f"it continues: fedalloy watch {path}" in " ".join(shown.printed.split())
    return path


def test_a_run_that_ctrl_c_left_goes_on_and_can_be_watched_to_its_end(left: Path) -> None:
    code, lines = types("watch", str(left))
    assert code == 0, lines
    assert lines[0].startswith("clients register: 3 of 3 answered")
    assert lines[-1].startswith("finished: mean accuracy ")
    assert max(map(len, lines)) <= 80
    assert not any("\x1b" in line for line in lines)
    again = types("watch", str(left))
    assert again == (0, lines)


def test_a_run_that_ctrl_c_stopped_is_not_carried_out_any_more(cluster: LocalCluster) -> None:
    with terminal(cluster, *started("stopped", local_steps=2000)) as shown:
        shown.wait_for("clients register")
        shown.types("\x03")
        shown.wait_for(QUESTION)
        shown.types("y\n")
        assert shown.exit_code() == 130, shown.printed
    assert "interrupted; it was told to stop" in shown.printed
    path = cluster.settings.runs_dir / "stopped"
    code, lines = types("watch", str(path))
    assert code == 1
    assert "no process is carrying it out" in lines[-1]
    assert not (path / "summary.json").exists()


def test_a_run_that_fails_says_why_and_ends_with_1(cluster: LocalCluster) -> None:
    command = started("few", min_clients=5, startup_timeout=1.0)
    code, lines = types(*command, "--dir", str(cluster.directory))
    assert code == 1
    assert lines[-1].startswith("error: 3 of at least 5 SuperNodes are online")


SERVICE = {
    "num_server_rounds": 2,
    "local_epochs": 0.2,
    "schedule": "cosine",
    "schedule_over": "run",
    "warmup_steps": 1,
    "patience": 2,
    "deliver_choice": "validation",
}


def test_a_newcomer_adopts_what_two_others_have_trained(cluster: LocalCluster) -> None:
    """Schedules, patience and choice are on in the run of the two; the third client never trains."""
    command = started("service", clients="berlin,paris", min_clients=2, **SERVICE)
    code, lines = types(*command, "--dir", str(cluster.directory))
    path = cluster.settings.runs_dir / "service"
    assert code == 0, lines
    before = json.loads((path / "summary.json").read_text())
    assert before["clients"].keys() == before["given"].keys() == {"berlin", "paris"}, lines
    assert set(before["given"].values()) <= {"merged", "best", "global", "local"}

    code, lines = types("adopt", str(path), "--dir", str(cluster.directory))
    assert code == 0, lines
    assert len(lines) == 1
    assert lines[0].startswith("rome: ")
    after = json.loads((path / "summary.json").read_text())
    found = after["adopted"]["rome"]
    assert found["evaluations"] > 0
    assert after["clients"].keys() == {"berlin", "paris", "rome"}
    assert (path / "clients" / "rome" / "adapter" / "adapter_model.safetensors").is_file()
    assert after["given"] == before["given"]
    assert after["rounds"] == before["rounds"]

    code, lines = types("adopt", str(path), "--node", "paris", "--dir", str(cluster.directory))
    assert code == 1
    assert "paris" in lines[-1]
    code, lines = types("deliver", str(path), "paris,rome", "--dir", str(cluster.directory))
    assert (code, lines) == (0, ["delivered: paris, rome"])
    again = json.loads((path / "summary.json").read_text())
    assert again["clients"] == after["clients"]
    assert again["adopted"] == after["adopted"]  # not the strategy's model for somebody who never trained
