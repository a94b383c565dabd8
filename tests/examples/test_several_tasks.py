from __future__ import annotations

from pathlib import Path

from examples import several_tasks
from tests.examples.one_run import run_example


def test_every_clinic_is_scored_on_its_own_tasks(tmp_path: Path) -> None:
    summary = run_example(several_tasks.main, tmp_path / "clinics", strategy="tap", local_steps=4, tap__distill_steps=2)
    assert set(summary["clients"]["bern"]) >= {"notes/accuracy", "scans/exact_match"}
    assert "notes/accuracy" in summary["clients"]["lyon"]
    assert "scans/exact_match" in summary["clients"]["graz"]
