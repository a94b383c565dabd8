"""The ServerApp's process; whole runs are in tests/e2e."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("given", "expected"), [("", "PASSIVE"), ("active", "ACTIVE")])
def test_idle_threads_of_the_server_sleep_unless_its_owner_says_otherwise(given: str, expected: str) -> None:
    """As OpenMP itself understood it: it reads its settings once, when torch is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", "import server_app.app"], env=environment, capture_output=True, text=True, check=True
    )
    told = [line for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    if not told:
        pytest.skip("this torch computes without OpenMP")
    assert expected in told[0]
