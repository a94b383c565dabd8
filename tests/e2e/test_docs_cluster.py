"""The page "Your own cluster", by hand: its commands as they stand there, on one machine, with ports of their own.

Certificates, a SuperLink, a key and a SuperNode for each of two clients, a check, and a run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from tests.test_docs import BLOCKS, ROOT, Block, name

BIN = Path(sys.executable).parent
CLIENTS = ("berlin", "paris")


def block_with(word: str) -> Block:
    (found,) = [b for b in BLOCKS if name(b.page) == "docs/cluster.md" and word in b.text]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ByHand:
    """A folder, and terminals in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet, self.control = free_port(), free_port()
        self.stack = ExitStack()

    def environment(self, home: str) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(self.folder / home),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05", "FLWR_TELEMETRY_ENABLED": "0", "COLUMNS": "200",
        }  # fmt: skip

    def words(self, command: Sequence[str], client: str = "berlin") -> list[str]:
        """A command of the page, for this machine."""
        changed = []
        for word in command:
            word = word.replace("server.example.org:9092", f"127.0.0.1:{self.fleet}")
            word = word.replace("server.example.org", "127.0.0.1").replace("0.0.0.0", "127.0.0.1")
            word = word.replace("berlin", client).replace("FOLDER", "FOLDER-OF-MINE")
            if client == "paris":
                word = word.replace("partition-id=0", "partition-id=1")
            changed.append({"9094": str(free_port()), ".": str(ROOT)}.get(word, word))
        return changed

    def types(self, command: Sequence[str], *, succeeds: bool = True) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment("home"), capture_output=True, text=True, timeout=540
        )
        said = done.stdout + done.stderr
        assert (done.returncode == 0) == succeeds, said
        return said

    def leaves_running(self, command: Sequence[str], home: str) -> None:
        log = self.stack.enter_context((self.folder / f"{home}.log").open("wb"))
        (self.folder / home).mkdir()
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment(home), stdout=log, stderr=subprocess.STDOUT
        )
        self.stack.callback(_end, process)

    def waits_for(self, port: int) -> None:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError((self.folder / "superlink.log").read_text())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it with its descendants, which Flower leaves behind if they are busy."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(30)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[ByHand]:
    found = ByHand(tmp_path)
    with found.stack:
        yield found


@pytest.mark.skipif(os.environ.get("FEDALLOY_FAULTS") != "long", reason="two minutes; run it with FEDALLOY_FAULTS=long")
def test_the_page_is_carried_out_by_hand(hand: ByHand) -> None:
    (certificates,) = block_with("fedalloy certificates").commands()
    hand.types([word.replace("berlin", ",".join(CLIENTS)) for word in hand.words(certificates)])
    superlink, register, supernode, run = block_with("flower-superlink").commands()
    ports = ["--port", str(hand.control), "--fleet-api-address", f"127.0.0.1:{hand.fleet}"]
    hand.leaves_running([*hand.words(superlink), *ports], "superlink")
    hand.waits_for(hand.fleet)
    hand.waits_for(hand.control)
    (hand.folder / "home").mkdir()
    (hand.folder / "home" / "config.toml").write_text(
        f'[superlink.my-superlink]\naddress = "127.0.0.1:{hand.control}"\n'
        f'root-certificates = "{hand.folder}/FOLDER-OF-MINE/public/ca.crt"\n'
    )
    hand.types(hand.words(register))
    (check,) = block_with("fedalloy check").commands()
    at = {"ca.crt": "FOLDER-OF-MINE/public/ca.crt", "berlin": "FOLDER-OF-MINE/clients/berlin/berlin"}
    checked = [at.get(word, word).replace("server.example.org:9092", f"127.0.0.1:{hand.fleet}") for word in check]
    assert "the SuperLink knows this key" in hand.types(checked)
    said = hand.types([word.replace("berlin", "paris") for word in checked], succeeds=False)
    assert "does not know the key" in said
    assert "flwr supernode register paris.pub CONNECTION --name CLIENT-ID" in said
    hand.types(hand.words(register, "paris"))
    for client in CLIENTS:
        hand.leaves_running(hand.words(supernode, client), client)
    small = (
        "num-server-rounds=1 local-steps=1 run-name='by-hand' startup-timeout=240.0 round-timeout=240.0 runs-dir='"
        + str(hand.folder)
    )
    said = hand.types([word.replace("num-server-rounds=5", f"{small}/runs'") for word in hand.words(run)])
    assert "finished: mean accuracy" in said
    assert "berlin" in hand.types(["fedalloy", "report", "runs/by-hand"])
    assert "round 0: registration" in hand.types(["fedalloy", "traffic", "runs/by-hand"])
