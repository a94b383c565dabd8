"""``cluster up`` where a cluster runs: what has ended starts again; what cannot is said. The rest is in tests/e2e."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from server_app.tools.cluster.local import LocalCluster, Settings, started
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


def test_the_command_that_is_printed_fits_the_clients(tmp_path: Path) -> None:
    """Clients with data of their own need a base model, which nobody can guess."""
    own = {"berlin": {"data-path": "/data/berlin.jsonl"}}
    hints = [
        LocalCluster(tmp_path, Settings(("berlin",), tmp_path, node_config=table)).stop_hint()
        for table in (own, {"berlin": own["berlin"] | {"base-model": "org/name"}}, {})
    ]
    assert ["base-model='BASE-MODEL'" in hint for hint in hints] == [True, False, False]
    assert "instead of BASE-MODEL" in hints[0]
