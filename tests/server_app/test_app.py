"""The ServerApp's process; whole runs are in tests/e2e."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest


def turns(module: str, **given: str) -> int:
    """How often an idle thread of OpenMP turns before it sleeps, as OpenMP itself says while a process starts."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], env=environment, capture_output=True, text=True, check=True
    )
    told = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if told is None:
        pytest.skip("this torch does not compute with GNU's OpenMP")
    return sys.maxsize if told[1] == "INFINITE" else int(told[1])


def test_idle_threads_of_the_server_sleep_unless_its_owner_says_otherwise() -> None:
    """OpenMP reads its settings once, when torch is imported."""
    assert turns("torch") > 0
    assert turns("server_app.app") == 0
    assert turns("server_app.app", OMP_WAIT_POLICY="active") > 0
