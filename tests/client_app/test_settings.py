"""Node-config: a key that nobody reads is refused by name, and data of one's own are never replaced by a scenario's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client_app.session import base_and_data
from client_app.settings import NodeConfigError, node_keys, read_settings, require_node_keys


def context(node: dict[str, Any], **run: Any) -> Context:
    return Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=run)


def test_misspelt_keys_are_refused_all_at_once_with_the_nearest_known_ones_and_without_their_values() -> None:
    node = {"data-pth": "/secret/x.jsonl", "split-colum": "part", "qqqq": 1, "client-id": "berlin"}
    with pytest.raises(NodeConfigError) as raised:
        read_settings(context(node | {"partition-id": 0, "num-partitions": 4}))
    said = str(raised.value)
    assert "'data-pth' (did you mean 'data-path'?), 'split-colum' (did you mean 'split-column'?), 'qqqq'" in said
    assert "secret" not in said
    assert raised.value.told == said


def test_every_documented_key_is_known() -> None:
    require_node_keys(
        {key: "" for key in ("client-id", "data-path", "client.allow-steps", "trainer.resident", "lora-r")}
    )
    assert len(node_keys()) == len(set(node_keys())) > 40


def test_a_run_with_a_base_model_never_falls_back_to_a_scenario(tmp_path: Path) -> None:
    node = {"partition-id": 0, "num-partitions": 4, "state-dir": str(tmp_path)}
    settings = read_settings(context(node, **{"base-model": "some/model"}))
    with pytest.raises(NodeConfigError, match="base-model is set, and node-config has no data-path"):
        base_and_data(settings)


def test_threads_are_the_owners_alone() -> None:
    node = {"partition-id": 0, "num-partitions": 1}
    assert read_settings(Context(1, 1, {**node, "torch-threads": 3}, RecordDict(), {})).torch_threads == 3
    assert read_settings(Context(1, 1, node, RecordDict(), {"torch-threads": 8})).torch_threads == 0
    for wrong in (-1, True, "two", 2.0):
        with pytest.raises(NodeConfigError, match="torch-threads is not a whole number"):
            read_settings(Context(1, 1, {**node, "torch-threads": wrong}, RecordDict(), {}))
