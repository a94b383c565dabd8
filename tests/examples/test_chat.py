from __future__ import annotations

from pathlib import Path

from examples import chat
from tests.examples.one_run import run_example


def test_every_shop_learns_its_own_answers(tmp_path: Path) -> None:
    summary = run_example(chat.main, tmp_path / "shops", strategy="local", local_steps=25)
    for client in summary["clients"].values():
        assert client["loss"] < 3.5, "an untrained model is near 4.7"
        assert "exact_match" in client
