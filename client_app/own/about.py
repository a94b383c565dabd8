"""``about.json`` beside a personal model: base model, tasks, rank, examples and metrics, for whoever exports it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from client_app.data.dataset import ClientData
from client_app.model.personal import PersonalModel
from client_app.settings import Settings
from fedalloy_adapters.files.atomic_files import write_durably
from proto.fedalloy.v1 import report_pb2

ABOUT = "about.json"


def precision_of(model: PersonalModel) -> str:
    """The number format of the frozen base; an adapter also corrects rounding errors of its base."""
    quantised = getattr(model.module, "is_loaded_in_4bit", False)
    return "nf4" if quantised else str(model.dtype).removeprefix("torch.")


def write_about(
    directory: Path, settings: Settings, model: PersonalModel, data: ClientData, report: report_pb2.Report
) -> None:
    """Write the file where a plan has saved a personal model."""
    if not any(result.HasField("save") for result in report.results):
        return
    found: dict[str, Any] = {
        "client": settings.client_id,
        "run": report.run_name,
        "base_model": model.base.name,
        "tasks": {name: task.kind for name, task in data.each_task.items()},
        "base_precision": precision_of(model),
        "rank": settings.rank,
        "examples": {split: len(rows) for split, rows in data.splits.items()},
        "metrics": {
            result.evaluate.split: {
                name: value for name, value in sorted(result.evaluate.metrics.items()) if math.isfinite(value)
            }
            for result in report.results
            if result.HasField("evaluate") and result.evaluate.label == "personal"
        },
    }
    write_durably(directory / ABOUT, (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())
