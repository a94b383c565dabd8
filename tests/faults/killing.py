"""Starts the worker, and compares what runs left behind."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import strategies
from server_app.run.run_directory import RunDirectory
from strategies import STRATEGIES
from tests.in_process import run_config_of

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("FEDALLOY_FAULTS") == "long"
"""``make test-faults`` does everything; ``make test`` a short form."""
MAIN = ("fedavg", *strategies.MAIN)
"""The short form tries everything on these, and samples of it on other strategies."""
FAMILIES = tuple({kind.__base__: name for name, kind in STRATEGIES.items() if kind.about.group == "related"}.values())
"""One of the related strategies for each class that they are made from."""


class Killer:
    """Runs that are killed and resumed below one folder."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker", str(runs)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(runs / "worker.log").open("wb"),
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", (runs / "worker.log").read_text()

    def start(
        self,
        name: str,
        *,
        resume: bool = False,
        kill_at: int = 0,
        client_kill_at: int = 0,
        how: str = "kill",
        kill_after_round: int = 0,
        clock: float = 0.0,
        **config: Any,
    ) -> tuple[int, int]:
        """The child's wait status (0: it finished), and how many moments it had if it finished."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        task = {
            "name": name, "resume": resume, "kill_at": kill_at, "client_kill_at": client_kill_at, "how": how,
            "kill_after_round": kill_after_round, "clock": clock,
            "config": run_config_of(**config) | WITHOUT_NOISE.get(config["strategy"], {}),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return int(answer["status"]), int(answer["moments"])

    def finish(self, name: str, **config: Any) -> int:
        """Run to the end without a kill, from the start or from where a killed run was; moments."""
        resume = (self.runs / name / "config.toml").exists()
        status, moments = self.start(name, resume=resume, **config)
        assert status == 0, self.log()
        return moments

    def log(self) -> str:
        """What the worker said last."""
        return "\n".join((self.runs / "worker.log").read_text(errors="replace").splitlines()[-40:])

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


WITHOUT_NOISE = {"fedmosaic": {"fedmosaic.sketch-noise": 0.0}}
"""Noise comes from a client's secret and its run's name, which two runs do not share: they could not be compared."""

Left = tuple[dict[str, Any], dict[str, torch.Tensor], list[Any]]


def left_behind(run: Path) -> Left:
    """The final metrics; every number of the last checkpoint and of the clients' folders; the rounds' records."""
    directory = RunDirectory(run)
    summary = json.loads((run / "summary.json").read_text())
    found = directory.newest_checkpoint()
    assert found is not None
    numbers = {f"state/{name}": tensor for name, tensor in found.state.tensors.items()}
    for client in sorted(summary["clients"]):
        for part in ("slots", "adapter"):
            for path in sorted((run / "clients" / client / part).rglob("*.safetensors")):
                kept = load_file(path).items()
                numbers |= {f"{path.relative_to(run)}:{name}": tensor for name, tensor in kept}
    records = [
        [record["phase"], record["round"], _timeless(record.get("settled", {})),
         {name: [client["status"], client.get("train_loss"), client.get("metrics")]
          for name, client in record["clients"].items()}]
        for record in directory.rounds() if record["phase"] in ("train", "deliver")
    ]  # fmt: skip
    return {"clients": summary["clients"], "values": found.state.values}, numbers, records


def _timeless(settled: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settled.items() if "seconds" not in key}


def assert_same(run: Path, baseline: Path) -> None:
    """To the bit: metrics, strategy state, slots, personal models, records."""
    metrics, numbers, records = left_behind(run)
    expected_metrics, expected_numbers, expected_records = left_behind(baseline)
    assert metrics == expected_metrics
    assert records == expected_records
    assert set(numbers) == set(expected_numbers)
    assert len(numbers) > 2
    different = [name for name, tensor in expected_numbers.items() if not torch.equal(tensor, numbers[name])]
    assert not different


def assert_valid(run: Path, round_: int | None = None) -> None:
    """What is there can be read, and every round that ended is whole: its record, its checkpoint, the ledger.

    Args:
        run: the run's folder.
        round_: the last complete round, where that is known.
    """
    directory = RunDirectory(run)
    if (run / "config.toml").exists():
        directory.config()
    found = directory.newest_checkpoint()
    completed = found.round if found is not None else -1
    if round_ is not None:
        assert completed == round_
    newest = sorted((run / "checkpoints").glob("round-*"))[-1:]
    assert [folder.name for folder in newest] == ([f"round-{completed:04d}"] if found is not None else [])
    records = [record["round"] for record in directory.rounds() if record["phase"] == "train"]
    assert records in ([*range(1, completed)], [*range(1, completed + 1)])  # the checkpoint is written before the line
    if (run / "ledger.sqlite").exists():
        with contextlib.closing(sqlite3.connect(run / "ledger.sqlite")) as ledger:
            assert ledger.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
