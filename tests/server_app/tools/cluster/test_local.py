"""What a local cluster tells its SuperNodes; that they start and run is tested end to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server_app.tools.cluster.local import LocalCluster, Settings


def test_a_clients_own_keys_replace_the_usual_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.common.config import parse_config_args

    started: list[Sequence[str]] = []
    monkeypatch.setattr(LocalCluster, "_start", lambda self, name, command: started.append(command))
    table: dict[str, dict[str, Any]] = {"client-5": {"partition-id": 5, "num-partitions": 12, "torch-threads": 1}}
    cluster = LocalCluster(tmp_path, Settings(("client-4", "client-5"), tmp_path, node_config=table))
    for index in range(2):
        cluster.start_supernode(index, tmp_path / "key")
    told = [parse_config_args([command[command.index("--node-config") + 1]]) for command in started]
    assert [(one["client-id"], one["partition-id"], one["num-partitions"]) for one in told] == [
        ("client-4", 0, 2), ("client-5", 5, 12)
    ]  # fmt: skip
    assert told[1]["torch-threads"] == 1
