"""The federation in one process: what its own mistakes look like."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Message

from tests.in_process import run_in_process


def test_a_tamper_that_fails_ends_the_run_at_once(runs_dir: Path) -> None:
    """The server takes a ValueError for an answer that cannot be read, and waits for another one until the timeout."""

    def tamper(node: int, message: Message, reply: Message | None) -> Message | None:
        raise ValueError(f"of node {node}")

    with pytest.raises(RuntimeError, match="tamper failed: ValueError: of node 2"):
        run_in_process(runs_dir, 2, tamper, run_name="run", strategy="local", num_server_rounds=1, scenario="digits")
