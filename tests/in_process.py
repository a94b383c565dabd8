"""A federation in one process for tests: see :mod:`server_app.tools.compare.in_process_grid`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from server_app.tools.compare.in_process_grid import FIRST_NODE, InProcessGrid, Tamper

__all__ = ["EXACT", "FIRST_NODE", "InProcessGrid", "Tamper", "run_config_of", "run_in_process"]

EXACT = {"uplink-encoding": "fp32", "downlink-encoding": "fp32"}
"""Run-config with which every number arrives as it was sent; it is not the default."""


def run_config_of(**config: Any) -> dict[str, Any]:
    """Keys with underscores for dashes and dots: ``fedmerge__lr_w`` is ``fedmerge.lr-w``."""
    return {key.replace("__", ".").replace("_", "-"): value for key, value in config.items()}


def run_in_process(
    runs_dir: Path,
    clients: int = 4,
    tamper: Tamper | None = None,
    node_config: Callable[[int], dict[str, Any]] | None = None,
    **run_config: Any,
) -> Any:
    """Run the real server loop; keys as in :func:`run_config_of`. Adapters travel in fp32 where nothing else is asked
    for, so that tests can compare with closed forms, and benchmarks strategies without their encoding's errors."""
    from server_app.run.loop import run

    config = EXACT | run_config_of(**run_config)
    config.setdefault("runs-dir", str(runs_dir))
    config.setdefault("min-clients", clients)
    grid = InProcessGrid(clients, runs_dir, config, node_config, tamper)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    return run(grid, context)
