"""``about.json``: written beside a saved personal model, without metrics that are not numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from client_app.own.about import ABOUT, write_about
from proto.fedalloy.v1 import report_pb2


def test_it_says_what_an_export_needs_and_only_of_saved_models(tmp_path: Path) -> None:
    settings: Any = SimpleNamespace(client_id="ada", rank=8)
    model: Any = SimpleNamespace(base=SimpleNamespace(name="org/base"), module=None, dtype=torch.bfloat16)
    data: Any = SimpleNamespace(each_task={"t": SimpleNamespace(kind="causal-lm")}, splits={"train": [1, 2]})
    report = report_pb2.Report(run_name="r")
    metrics = {"loss": 1.5, "perplexity": float("inf")}
    report.results.add().evaluate.CopyFrom(report_pb2.EvaluateResult(label="personal", split="test", metrics=metrics))
    write_about(tmp_path, settings, model, data, report)
    assert not (tmp_path / ABOUT).exists()
    report.results.add().save.SetInParent()
    write_about(tmp_path, settings, model, data, report)
    found = json.loads((tmp_path / ABOUT).read_text())
    assert found["tasks"] == {"t": "causal-lm"}
    assert found["base_precision"] == "bfloat16"
    assert found["metrics"] == {"test": {"loss": 1.5}}
    assert (found["base_model"], found["rank"], found["examples"]) == ("org/base", 8, {"train": 2})
