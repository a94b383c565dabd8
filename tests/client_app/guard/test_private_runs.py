"""Runs of clients whose examples are under differential privacy: what leaves, in every place where it could."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server_app.run.ending.summary import headline
from tests.in_process import run_in_process
from tests.toys import tiny_models, toy_data

pytest.importorskip("opacus", reason="opacus (extra privacy) is not installed")
SCORES = ("accuracy", "loss", "f1", "auroc")


def run_with(folder: Path, metrics: str) -> Any:
    base = tiny_models.save_bert(folder / "bert", toy_data.VOCABULARY)

    def node(index: int) -> dict[str, Any]:
        toy_data.write_jsonl(folder / f"{index}.jsonl", toy_data.opinions(40, index))
        dp = {"dp.epsilon": 20.0, "dp.delta": 1e-3, "dp.noise-multiplier": 1.0, "dp.metrics": metrics}
        return {"client-id": "ab"[index], "data-path": str(folder / f"{index}.jsonl"), "labels": "neg,pos", **dp}

    return run_in_process(
        folder, 2, node_config=node, base_model=str(base), run_name="run", strategy="fedavg", num_server_rounds=2,
        local_steps=2, batch_size=8, lora_r=2,
    )  # fmt: skip


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a JSON value, with their keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, name)
    elif isinstance(value, float):
        yield name, value


def test_no_score_is_anywhere_unless_the_owner_tells_those_of_held_out_examples(tmp_path: Path) -> None:
    found: dict[str, set[str]] = {}
    for metrics in ("none", "held-out"):
        (tmp_path / metrics).mkdir()
        run = run_with(tmp_path / metrics, metrics)
        summary = json.loads((run.path / "summary.json").read_text())
        assert {client: said["budget"] for client, said in summary["privacy"].items()} == {"a": 20.0, "b": 20.0}
        told = [*numbers(summary), *(pair for record in run.rounds() for pair in numbers(record))]
        found[metrics] = {name for name, _ in told if any(score in name.split("/")[-1] for score in SCORES)}
        assert ("no client tells a score" in headline(summary)) == (metrics == "none")
    assert found["none"] == set()
    assert any("accuracy" in name for name in found["held-out"])
    assert not any("train" in name and "loss" in name for name in found["held-out"])
