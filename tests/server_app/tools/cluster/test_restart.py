"""``cluster up`` on a running cluster restarts what has ended, and says what cannot start. The rest is in tests/e2e."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from server_app.tools.cluster import restart
from server_app.tools.cluster.local import LocalCluster, Process, Settings, started
from server_app.tools.cluster.restart import restart_ended
from server_app.tools.cluster.superlink import ClusterError


def state(folder: Path, **alive: bool) -> None:
    me = {"pid": os.getpid(), "started": started(psutil.Process())}
    processes = [{"name": name, **(me if lives else me | {"started": 1.0})} for name, lives in alive.items()]
    (folder / "cluster.json").write_text(json.dumps({"processes": processes, "client_ids": []}))


def test_where_all_runs_there_is_nothing_to_start_again(tmp_path: Path) -> None:
    state(tmp_path, superlink=True)
    with pytest.raises(ClusterError, match="is running; stop it with"):
        restart_ended(tmp_path, print)


def test_a_superlink_that_ended_took_the_keys_with_it(tmp_path: Path) -> None:
    state(tmp_path, superlink=False, node=True)
    with pytest.raises(ClusterError, match="its keys with it; start anew"):
        restart_ended(tmp_path, print)


class Restarted(LocalCluster):
    """Its SuperNodes print given texts, one for each start, and end."""

    says: ClassVar[list[str]] = []

    def start_supernode(self, index: int, key: Path, files: object = None, name: str = "") -> Process:
        log = self.directory / "logs" / f"supernode-{self.settings.client_ids[index]}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as file:
            file.write(self.says.pop(0))
        return Process("supernode-berlin", os.getpid(), 1.0)

    def wait_for_nodes(self) -> None:
        """All are online."""


HELD = "[code: 2004] Failed to activate SuperNode.\n"
"""A process that is refused because the SuperLink has not noticed yet that its predecessor was killed."""


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (["INFO : SuperNode ID: 7\n"], []),
        ([HELD, HELD, "INFO : SuperNode ID: 7\n"], ["the SuperLink has not noticed yet what has ended; trying again"]),
    ],
)
def test_a_killed_supernode_is_started_until_the_superlink_takes_it(
    says: list[str], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "LocalCluster", Restarted)
    monkeypatch.setattr(restart, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(Restarted, "says", says)
    state(tmp_path, **{"superlink": True, "supernode-berlin": False})
    written = json.loads((tmp_path / "cluster.json").read_text())
    more = {"client_ids": ["berlin"], "nodes": {}, "node_config": {}, "runs_dir": str(tmp_path), "host": "127.0.0.1"}
    (tmp_path / "cluster.json").write_text(json.dumps(written | more | {"fleet_port": 1, "http_port": 2}))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "supernode-berlin.log").write_text("INFO : SuperNode ID: 6\nof the process before\n")
    said: list[str] = []
    assert restart_ended(tmp_path, said.append) == ["supernode-berlin"]
    assert not says
    assert [line.removesuffix(" for up to a minute") for line in said] == told


def test_one_that_ends_for_another_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restarted, "says", ["Port in server address 127.0.0.1:1 is already in use.\n"])
    cluster = Restarted(tmp_path, Settings(("berlin",), tmp_path))
    with pytest.raises(ClusterError, match=r"^supernode-berlin ended: Port in server .* \(log: .*berlin\.log\)$"):
        list(restart._until_online([restart._Start(cluster, "berlin")], 5.0))


def test_the_command_that_is_printed_fits_the_clients(tmp_path: Path) -> None:
    """Clients with data of their own need a base model, which nobody can guess."""
    own = {"berlin": {"data-path": "/data/berlin.jsonl"}}
    hints = [
        LocalCluster(tmp_path, Settings(("berlin",), tmp_path, node_config=table)).stop_hint()
        for table in (own, {"berlin": own["berlin"] | {"base-model": "org/name"}}, {})
    ]
    assert ["base-model='BASE-MODEL'" in hint for hint in hints] == [True, False, False]
    assert "instead of BASE-MODEL" in hints[0]
