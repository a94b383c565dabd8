from __future__ import annotations

from pathlib import Path

from examples import image_folders
from tests.examples.one_run import run_example


def test_every_orchard_sorts_its_fruit(tmp_path: Path) -> None:
    summary = run_example(image_folders.main, tmp_path / "orchards", strategy="fedavg", local_steps=40)
    for client in summary["clients"].values():
        assert client["accuracy"] > 0.5, "chance is a third"
